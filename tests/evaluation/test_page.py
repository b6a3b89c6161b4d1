import base64
import functools
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llamagen.evaluation.report import (
    JSON_NAME,
    PAGE_NAME,
    Curve,
    Picture,
    Report,
    Table,
    column_texts,
    draw_chart,
    render_page,
    require_page_packages,
    save_report,
    setting_text,
    spell,
    value_text,
)
from llamagen.support.errors import InputError

NASTY = """</style><script>x='"'</script>&amp;"""
VOID = {"meta", "link", "img", "br", "hr", "input", "source"}
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def report(**values):
    return Report(
        **{
            "protocol": "c2i",
            "title": "tiny: 50,000 images of 10 classes",
            "metrics": {"fid": 3.0712},
            "reference": {"source": "images.npz", "images": 10000},
            "samples": {"images": 50000, "size": "256x256"},
            "settings": {"guidance_scale": 2.0},
            **values,
        }
    )


def full(text="words"):
    """A report with every section, and ``text`` wherever there can be one."""
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    return report(
        protocol=text,
        title=text,
        metrics={text: 1.0, "kid": math.nan, "psnr": math.inf},
        reference={"source": text, text: text},
        samples={text: {text: [text]}},
        settings={text: text, "long": "/path" * 60},
        warnings=[text, "/path" * 60],
        tables=[
            Table(title=text, columns=(text, "fid"), rows=((text, 1.5), (None, 2.25)), note=text),
            Table(
                title="wide", columns=tuple("abcdefghij"), rows=(tuple(range(10**6, 10**6 + 10)),)
            ),
        ],
        curves=[Curve(title=text, x=text, series={text: [(1.0, 2.0), (2.0, math.nan)]})],
        pictures=[
            Picture(title=text, image=image, note=text),
            Picture(title="large", image=image.resize((2000, 40))),
        ],
        versions={text: text},
    )


@functools.cache
def full_page(text="words"):
    return render_page(full(text))


class Page(HTMLParser):
    """Checks that tags are closed in order; collects them, and the text outside of styles."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("made", [report(), report(metrics={}, settings={})])
def test_tags_are_balanced(made):
    Page(render_page(made))


def test_all_text_is_escaped():
    plain, nasty = full_page(), full_page(NASTY)
    assert "<script" not in nasty
    assert [tag for tag, _ in Page(nasty).tags] == [tag for tag, _ in Page(plain).tags]
    assert Page(nasty).text.count(NASTY) == Page(plain).text.count("words") > 0


def test_unprintable_text_is_replaced(tmp_path):
    save_report(full("bytes \udcff, half a pair \ud800, a control \x00"), tmp_path)
    text = (tmp_path / PAGE_NAME).read_text(encoding="utf-8")
    assert "bytes \N{REPLACEMENT CHARACTER}, half a pair \N{REPLACEMENT CHARACTER}" in text


def test_loads_no_other_file():
    html = full_page()
    page = Page(html)
    assert page.all("script") == []
    addresses = [
        attributes[name]
        for _, attributes in page.tags
        for name in ("src", "srcset", "href")
        if name in attributes
    ]
    # An icon, a chart on light and on dark, two pictures.
    assert len(addresses) == 5
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in html


def test_names_both_sides_of_the_comparison():
    text = Page(render_page(report())).text
    assert "tiny: 50,000 images of 10 classes" in text
    assert "50,000 images, 256x256" in text
    assert "images.npz, 10,000 images" in text


def test_warnings_come_first():
    text = Page(render_page(report(warnings=["too few", "copies"]))).text
    assert text.index("2 warnings") < text.index("too few") < text.index("Metrics")
    assert "warning" not in Page(render_page(report())).text


def test_empty_sections_have_no_heading():
    headings = re.findall("<h2[^>]*>([^<]*)", render_page(report(metrics={})))
    assert headings == ["Details"]


def test_headings_do_not_skip_a_level():
    levels = [int(tag[1]) for tag, _ in Page(full_page()).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))


def test_tables_are_rounded_and_aligned():
    table = Table(title="t", columns=("a", "b"), rows=(("x", 1.23456), ("y", 10), ("z", None)))
    cells = re.findall("<td.*?</td>", render_page(report(tables=[table])))[:6]
    assert cells == [
        '<td class="word">x</td>',
        '<td class="number">1.235</td>',
        '<td class="word">y</td>',
        '<td class="number">10.000</td>',
        '<td class="word">z</td>',
        '<td class="number">\N{EN DASH}</td>',
    ]


def test_table_without_rows():
    Page(render_page(report(tables=[Table(title="t", columns=("a", "b"), rows=())])))


def test_nested_settings_are_shown():
    text = Page(render_page(report(settings={"outer": {"top_k": [1, None], "b": False}}))).text
    assert "top k1, \N{EN DASH}" in text.replace("\n", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (2.19731, "2.197"),
        (3.80, "3.8"),
        (999.96, "1000"),
        (123456.78, "123,457"),
        (50_000, "50,000"),
        (0.00012345, "0.0001234"),
        (0.0000123456, "1.235e-05"),
        (1.5e12, "1.5e+12"),
        (math.nan, "NaN"),
        (-math.inf, "-\N{INFINITY}"),
        (np.float32(0.5), "0.5"),
        (np.int64(1234), "1,234"),
        (True, "yes"),
        (None, "\N{EN DASH}"),
        ("words", "words"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert value_text(value) == text


def test_columns_have_equal_decimals():
    assert column_texts([5.46, 3.8, 3.07]) == ["5.46", "3.80", "3.07"]
    assert column_texts([1, 1.5, 2]) == ["1.0", "1.5", "2.0"]
    assert column_texts(["all", 100, 2000, None]) == ["all", "100", "2,000", "\N{EN DASH}"]
    assert column_texts([math.nan, 2.5]) == ["NaN", "2.5"]
    assert column_texts([1e-9, 2.5]) == ["1e-09", "2.5"]
    assert column_texts([]) == []


def test_settings_keep_all_digits():
    assert setting_text(0.123456789) == "0.123456789"
    assert setting_text(20240601) == "20240601"
    assert setting_text([1, None, 2.5]) == "1, \N{EN DASH}, 2.5"
    assert setting_text(()) == "\N{EN DASH}"


def test_names_are_spelled():
    assert spell("best_fid") == "best FID"
    assert spell("bits_per_code") == "bits per code"
    assert spell("/data/my_fid") == "/data/my_fid"


def svg_texts(svg):
    return ["".join(node.itertext()) for node in ET.fromstring(svg).findall(".//{*}text")]


def curve(series, **values):
    return Curve(**{"title": "fid", "x": "guidance scale", "series": series, **values})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_charts_label_axes_and_series(theme):
    chart = curve({"top-k all": [(1.5, 4.25), (2.0, 3.07)], "$k$ & <b>": [(1.5, 5.0)]})
    svg = draw_chart(chart, theme)
    assert {"guidance scale", "FID", "top-k all", "$k$ & <b>"} <= set(svg_texts(svg))
    assert svg == draw_chart(chart, theme)


@pytest.mark.parametrize(
    "series",
    [
        {},
        {"a": []},
        {"a": [(1.0, 1.0)]},
        {"a": [(1.0, math.nan), (math.inf, 2.0), (3.0, -math.inf)]},
        {"a": [(-1, 2), (0, 5), (np.int64(3), np.float32(4.0))]},
        {f"series {number}": [(0, number), (1, number)] for number in range(12)},
    ],
)
def test_charts_take_unusual_points(series):
    ET.fromstring(draw_chart(curve(series, log_x="a" in series), "light"))


def test_saves_two_files(tmp_path):
    made = full()
    made.metrics["ssim"] = math.nan
    save_report(made, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [PAGE_NAME, JSON_NAME]
    values = json.loads((tmp_path / "new" / JSON_NAME).read_text(encoding="utf-8"))
    assert values["metrics"]["words"] == 1.0
    assert values["metrics"]["psnr"] == math.inf
    assert math.isnan(values["metrics"]["ssim"])
    assert values["tables"][0]["rows"] == [["words", 1.5], [None, 2.25]]
    assert values["curves"][0]["series"]["words"][0] == [1.0, 2.0]
    assert "pictures" not in values
    assert set(report().versions) == {"python", "llamagen", "torch", "numpy", "pillow"}


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_package_is_named(monkeypatch, package):
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs .*{package}.*; .*pip install 'llamagen\[eval\]'"):
        require_page_packages()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "F", "I;16", "YCbCr"])
def test_pictures_are_embedded(mode):
    image = Image.new(mode, (24, 12))
    page = Page(render_page(report(pictures=[Picture(title="a title", image=image)])))
    (shown,) = page.all("img")
    encoded = shown["src"].removeprefix("data:image/png;base64,")
    inside = Image.open(io.BytesIO(base64.b64decode(encoded)))
    inside.load()
    assert (inside.format, inside.size) == ("PNG", (24, 12))
    assert shown["alt"] == "a title"


def test_small_pictures_are_enlarged_by_an_integer():
    small, large = Image.new("RGB", (24, 12)), Image.new("RGB", (321, 12))
    pictures = [Picture(title="", image=small), Picture(title="", image=large)]
    small, large = Page(render_page(report(pictures=pictures))).all("img")
    assert (small["width"], small["height"], small["class"]) == ("312", "156", "crisp")
    assert (large["width"], large["height"], large.get("class")) == ("321", "12", None)


def browse(url, profile):
    """The document of a page after it was shown, and what the browser had to say."""
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--user-data-dir={profile}", "--dump-dom", url),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the path")
@pytest.mark.parametrize("text", ["words", NASTY])
def test_in_a_browser(tmp_path, text):
    page = tmp_path / "report.html"
    page.write_text(full_page(text), encoding="utf-8")
    document, said = browse(page.as_uri(), tmp_path / "profile")
    assert said == []
    assert Page(document).all("script") == []

    # A window cannot be as narrow as a phone; a frame can.
    frames = tmp_path / "frames.html"
    source = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
    frames.write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><body><script>
        for (const width of [360, 1400]) {{
          const frame = document.createElement("iframe");
          frame.style.width = width + "px";
          frame.style.border = "0";
          frame.srcdoc = {source};
          frame.onload = () => {{
            const root = frame.contentDocument.documentElement;
            for (const part of root.querySelectorAll("details")) part.open = true;
            const told = document.createElement("output");
            told.textContent = [width, root.clientWidth, root.scrollWidth].join(" ");
            document.body.append(told);
          }};
          document.body.append(frame);
        }}
        </script>""",
        encoding="utf-8",
    )
    document, said = browse(frames.as_uri(), tmp_path / "profile")
    assert said == []
    measured = re.findall(r"<output>(\d+) (\d+) (\d+)</output>", document)
    assert sorted(int(width) for width, _, _ in measured) == [360, 1400]
    for _, client, scrolled in measured:
        assert int(scrolled) <= int(client)
