import base64
import io
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llamagen.evaluation.page import render_page
from llamagen.evaluation.report import Curve, Picture, Report, Table

NASTY = """</style><script>x='"'</script>&amp;"""
VOID = {"meta", "link", "img", "br", "hr", "input"}
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
    """A report that has everything, with ``text`` in every place for one."""
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


@pytest.mark.parametrize("made", [report(), full(), full(NASTY), report(metrics={}, settings={})])
def test_tags_are_balanced(made):
    Page(render_page(made))


def test_all_text_is_escaped():
    plain, nasty = render_page(full()), render_page(full(NASTY))
    assert "<script" not in nasty
    assert [tag for tag, _ in Page(nasty).tags] == [tag for tag, _ in Page(plain).tags]
    # What is escaped is still there to read.
    assert Page(nasty).text.count(NASTY) == Page(plain).text.count("words")


def test_any_text_can_be_written(tmp_path):
    full("bytes \udcff, half a pair \ud800, a control \x00").save(tmp_path)
    (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_needs_no_other_file():
    page = Page(render_page(full()))
    assert page.all("script") == []
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), tag
    assert "url(" not in render_page(full())


def test_it_says_what_was_compared_with_what():
    text = Page(render_page(report())).text
    assert "tiny: 50,000 images of 10 classes" in text
    assert "50,000 images, 256x256" in text
    assert "images.npz, 10,000 images" in text


def test_warnings_come_first():
    text = Page(render_page(report(warnings=["too few", "copies"]))).text
    assert text.index("2 warnings") < text.index("too few") < text.index("Metrics")
    assert "warning" not in Page(render_page(report())).text


def test_what_is_not_there_has_no_heading():
    headings = re.findall("<h2[^>]*>([^<]*)", render_page(report(metrics={})))
    assert headings == ["Details"]


def test_headings_do_not_skip_a_level():
    levels = [
        int(tag[1]) for tag, _ in Page(render_page(full())).tags if re.fullmatch("h[1-6]", tag)
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))


def test_values_that_are_no_numbers_are_words():
    text = Page(render_page(full())).text
    assert "not a number" in text
    assert "infinite" in text
    assert not re.search(r"\b(nan|inf)\b", text)


def test_tables_are_rounded_and_aligned():
    page = render_page(
        report(
            tables=[
                Table(title="t", columns=("a", "b"), rows=(("x", 1.23456), ("y", 10), ("z", None)))
            ]
        )
    )
    cells = re.findall("<td.*?</td>", page)[:6]
    assert cells == [
        "<td>x</td>",
        '<td class="number">1.235</td>',
        "<td>y</td>",
        '<td class="number">10.000</td>',
        "<td>z</td>",
        '<td class="number">\N{EN DASH}</td>',
    ]


def test_a_table_without_rows():
    Page(render_page(report(tables=[Table(title="t", columns=("a", "b"), rows=())])))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "F", "I;16", "YCbCr"])
def test_pictures_are_inside(mode):
    image = Image.new(mode, (24, 12))
    page = Page(render_page(report(pictures=[Picture(title="a title", image=image)])))
    (shown,) = page.all("img")
    encoded = shown["src"].removeprefix("data:image/png;base64,")
    inside = Image.open(io.BytesIO(base64.b64decode(encoded)))
    inside.load()
    assert (inside.format, inside.size) == ("PNG", (24, 12))
    assert shown["alt"] == "a title"


def test_small_pictures_are_enlarged_by_a_whole_factor():
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
    page.write_text(render_page(full(text)), encoding="utf-8")
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
