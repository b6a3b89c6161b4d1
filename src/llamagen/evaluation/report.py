"""Reports of evaluations: plain data, written as JSON and as one HTML file.

The page is the template ``assets/report.html.jinja``, with charts by matplotlib.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.resources
import io
import itertools
import math
import numbers
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image

import llamagen.support.storage as storage
from llamagen.support.errors import importing
from llamagen.support.pictures import image_bytes

JSON_NAME = "report.json"
PAGE_NAME = "report.html"

_SMALL = 320
"""Images of at most this many pixels a side are enlarged by an integer factor, without blur."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_THEMES = {
    # Series are at least 3:1 to the page and differ under any of the three colour blindnesses.
    "light": ("#1c2024", "#d9dee3", ("#0f5ab2", "#d84111", "#24a269", "#ba76b7", "#4c3407")),
    "dark": ("#e4e8ec", "#343b43", ("#3680d6", "#d16340", "#64ecab", "#eea2db", "#fff382")),
}
"""Colours of text, grid and series, as in the template's style sheet."""

# File names that are not UTF-8 arrive with surrogates, which no page can hold.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_IDENTIFIER = re.compile(r"[a-z0-9_]+")
_ABBREVIATIONS = {
    word.lower(): word
    for word in ("CLIP", "FID", "KID", "LPIPS", "PSNR", "SSIM", "rFID", "sFID", "rsFID")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of numbers or words."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    """The page rounds numbers and shows None as a dash."""
    note: str = ""
    """A sentence below it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Lines over a common axis."""

    title: str
    x: str
    """Label of the horizontal axis."""
    series: Mapping[str, Sequence[tuple[float, float]]]
    """Name -> points (x, y), in order of x."""
    log_x: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """An image with a title; in the page only."""

    title: str
    image: Image.Image
    note: str = ""


@dataclasses.dataclass(kw_only=True)
class Report:
    """A comparison: its sides, settings and results."""

    protocol: str
    """The evaluation, as "c2i"."""
    title: str
    """One line that names what was evaluated."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """Name -> value; names as in the papers."""
    reference: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The other side of the comparison, and its number of images."""
    samples: dict[str, Any]
    """The evaluated images: number, size, resizing."""
    settings: dict[str, Any]
    """Everything else that the results depend on."""
    warnings: list[str] = dataclasses.field(default_factory=list)
    """Differences from the published protocol, and results that cannot be trusted."""
    tables: list[Table] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {
            "python": platform.python_version(),
            **{name: version(name) for name in ("llamagen", "torch", "numpy", "pillow")},
        }
    )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures, for JSON."""
        values = dataclasses.asdict(dataclasses.replace(self, pictures=[]))
        del values["pictures"]
        return values


def require_page_packages() -> None:
    """Raise InputError if a package that pages need is missing, before anything is computed."""
    with importing("a report needs", "'llamagen[eval]'"):
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401


def save_report(report: Report, folder: Path) -> None:
    """Write ``report.json`` and ``report.html``, which loads no other file."""
    storage.write_json(folder / JSON_NAME, report.to_dict())
    storage.write_text(folder / PAGE_NAME, render_page(report))


def render_page(report: Report) -> str:
    """Return the page of a report. Its texts may hold anything: the template escapes them."""
    require_page_packages()
    import jinja2

    source = importlib.resources.files("llamagen") / "assets" / "report.html.jinja"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = (column_texts, setting_text, spell, value_text)
    environment.filters |= {each.__name__: each for each in filters}
    environment.tests["measured"] = _is_number
    page = environment.from_string(source.read_text(encoding="utf-8")).render(
        report=report,
        sides={"Evaluated": _summary(report.samples), "Compared with": _summary(report.reference)},
        charts=[
            {each: _address(draw_chart(curve, each).encode(), "image/svg+xml") for each in _THEMES}
            for curve in report.curves
        ],
        pictures=[_picture(picture.image) for picture in report.pictures],
    )
    return _printable(page)


def spell(name: str) -> str:
    """Return the name of a metric or setting for people: "best_fid" as "best FID"."""
    if not _IDENTIFIER.fullmatch(name):
        return name
    return " ".join(_ABBREVIATIONS.get(word, word) for word in name.split("_"))


def value_text(value: object) -> str:
    """Return a value for people; measured numbers have four significant digits."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if not isinstance(value, numbers.Real):
        return str(value)
    number = float(value)
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else f"{'-' if number < 0 else ''}\N{INFINITY}"
    return f"{number:,.0f}" if 1e3 <= abs(number) < 1e9 else f"{number:.4g}"


def column_texts(values: Sequence[object]) -> list[str]:
    """Return the cells of a column; its measured numbers have the same number of decimals."""
    texts = list(map(value_text, values))
    rounded = [text for value, text in zip(values, texts, strict=True) if _is_finite(value)]
    decimals = max((len(text.partition(".")[2]) for text in rounded), default=0)
    if decimals == 0 or any("e" in text for text in rounded):
        return texts
    return [f"{v:,.{decimals}f}" if _is_finite(v) else value_text(v) for v in values]


def setting_text(value: object) -> str:
    """Return a setting with all its digits, as one would type it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(setting_text, value)) or value_text(None)
    return str(value) if _is_finite(value) else value_text(value)


def draw_chart(curve: Curve, theme: str) -> str:
    """Return a line chart as transparent SVG; points that are not finite interrupt their line."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink, grid, colours = _THEMES[theme]
    styles = zip(itertools.cycle(colours), itertools.cycle("os^D"), strict=False)
    # Text stays text, in the reader's font; the salt makes the same chart the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llamagen"}):
        # Not pyplot: its global state and its choice of a window system are not ours to touch.
        figure = Figure(figsize=(5.2, 3.3), layout="constrained", facecolor="none")
        axes = figure.subplots()
        for points, (colour, marker) in zip(curve.series.values(), styles, strict=False):
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axes.plot(xs, ys, color=colour, marker=marker, markersize=5)
        axes.set_facecolor("none")
        axes.set_xlabel(_printable(curve.x), color=ink, parse_math=False)
        axes.set_ylabel(_printable(spell(curve.title)), color=ink, parse_math=False)
        if curve.log_x:
            axes.set_xscale("log", nonpositive="mask")
        axes.tick_params(colors=ink)
        axes.grid(color=grid)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(grid)
        if any(curve.series):
            names = list(map(_printable, curve.series))
            legend = axes.legend(axes.get_lines(), names, frameon=False, labelcolor=ink)
            for text in legend.get_texts():
                text.set_parse_math(False)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return file.getvalue()


def _picture(image: Image.Image) -> dict[str, Any]:
    """Address and size of an image as the page shows it."""
    factor = max(1, _SMALL // max(image.size))
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    return {
        "address": _address(image_bytes(image, "png"), "image/png"),
        "is_small": max(image.size) <= _SMALL,
        "size": (image.width * factor, image.height * factor),
    }


def _address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _summary(side: Mapping[str, Any]) -> str:
    """One side of the comparison in a line; the details have all of it."""
    facts = [side[name] for name in ("source", "network", "size") if name in side]
    if _is_number(count := side.get("images")):
        facts.insert(1 if "source" in side else 0, f"{value_text(count)} images")
    return ", ".join(map(str, facts)) or value_text(None)


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number, of Python or NumPy; truth values are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_finite(value: object) -> TypeGuard[float]:
    return _is_number(value) and math.isfinite(value)


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
