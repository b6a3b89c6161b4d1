"""An evaluation's report as one HTML file that needs no other, no script and no network."""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from llamagen.evaluation.charts import line_chart
from llamagen.evaluation.markup import (
    NOTHING,
    column_texts,
    escaped,
    is_number,
    setting_text,
    spelled,
    value_text,
)

if TYPE_CHECKING:
    from llamagen.evaluation.report import Curve, Picture, Report, Table

_SMALL = 320
"""Pictures of at most this many pixels a side keep their pixels sharp, and are enlarged by the
whole factor that leaves them within it: every page has room for that."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")

# Should markup ever get past the escaping, a browser still runs and loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_WARNING_SIGN = (
    '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M12 3 22.5 21h-21z"/>'
    '<path d="M12 9.5v5.5M12 17.2v1.3"/></svg>'
)


def render_page(report: Report) -> str:
    """The report for a browser. All of its texts may hold anything: they are escaped."""
    sections = (
        _header(report),
        _warnings(report.warnings),
        _metrics(report.metrics),
        _section("Tables", "tables", [*map(_table, report.tables)]),
        _section("Curves", "curves", [*map(_curve, report.curves)]),
        _section("Pictures", "pictures", [*map(_picture, report.pictures)]),
        _details(report),
    )
    return _PAGE.format(
        policy=_POLICY,
        title=escaped(report.title),
        style=_style(),
        body="\n".join(section for section in sections if section),
    )


def _style() -> str:
    assets = importlib.resources.files("llamagen") / "assets"
    return (assets / "report.css").read_text(encoding="utf-8")


def _header(report: Report) -> str:
    return (
        f'<header>\n<p class="kind">Evaluation report, protocol '
        f"<strong>{escaped(report.protocol)}</strong></p>\n"
        f"<h1>{escaped(report.title)}</h1>\n"
        f'<dl class="compared">\n'
        f"<div><dt>Evaluated</dt><dd>{_summary(report.samples)}</dd></div>\n"
        f"<div><dt>Compared with</dt><dd>{_summary(report.reference)}</dd></div>\n"
        f"</dl>\n</header>"
    )


def _summary(side: Mapping[str, Any]) -> str:
    """One side of the comparison in a line; the details below have all of it."""
    facts = [side[name] for name in ("source", "network", "size") if name in side]
    if is_number(count := side.get("images")):
        facts.insert(1 if "source" in side else 0, f"{value_text(count)} images")
    if not facts:
        facts = [f"{spelled(name)} {setting_text(value)}" for name, value in side.items()]
    return escaped(", ".join(map(value_text, facts)) or NOTHING)


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "\n".join(f"<li>{escaped(warning)}</li>" for warning in warnings)
    count = "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    return (
        f'<section class="warnings" aria-labelledby="warnings">\n'
        f'<h2 id="warnings">{_WARNING_SIGN}{count}</h2>\n<ul>\n{items}\n</ul>\n</section>'
    )


def _metrics(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    figures = []
    for name, value in metrics.items():
        text = value_text(value)
        # What is no number is told in words, which need more room than digits.
        kind = "" if any(letter.isdigit() for letter in text) else ' class="words"'
        figures.append(
            f"<div><dt>{escaped(spelled(name))}</dt><dd{kind}>{escaped(text)}</dd></div>"
        )
    return (
        '<section aria-labelledby="metrics">\n<h2 id="metrics">Metrics</h2>\n'
        '<dl class="metrics">\n' + "\n".join(figures) + "\n</dl>\n</section>"
    )


def _section(title: str, name: str, parts: Sequence[str]) -> str:
    if not parts:
        return ""
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{title}</h2>\n'
        f'<div class="{name}">\n' + "\n".join(parts) + "\n</div>\n</section>"
    )


def _table(table: Table) -> str:
    note = f'\n<p class="note">{escaped(table.note)}</p>' if table.note else ""
    title = spelled(table.title)
    return (
        f"<article>\n<h3>{escaped(title)}</h3>\n"
        f"{_grid(title, table.columns, table.rows)}{note}\n</article>"
    )


def _grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls within itself where it is wider than the page."""
    values = [[row[column] for row in rows] for column in range(len(columns))]
    texts = [column_texts(column) for column in values]
    kinds = [' class="number"' if any(map(is_number, column)) else "" for column in values]
    head = "".join(
        f'<th scope="col"{kind}>{escaped(spelled(name))}</th>'
        for name, kind in zip(columns, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escaped(column[number])}</td>"
            for column, kind in zip(texts, kinds, strict=True)
        )
        + "</tr>"
        for number in range(len(rows))
    )
    # Focusable, so that it can be scrolled by keyboard too.
    return (
        f'<div class="scroll" role="region" aria-label="{escaped(title)}" tabindex="0">'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _curve(curve: Curve) -> str:
    """The chart, and its numbers for those who cannot point at it or see it."""
    title = spelled(curve.title)
    rows = [(name, x, y) for name, points in curve.series.items() for x, y in points]
    values = _grid(f"Values of {title}", ("series", curve.x, title), rows)
    return (
        f"<figure>\n<figcaption><h3>{escaped(title)}</h3></figcaption>\n{line_chart(curve)}\n"
        f"<details><summary>Values</summary>\n{values}\n</details>\n</figure>"
    )


def _picture(picture: Picture) -> str:
    image = picture.image
    factor = max(1, _SMALL // max(image.size))
    kind = ' class="crisp"' if max(image.size) <= _SMALL else ""
    note = f'\n<p class="note">{escaped(picture.note)}</p>' if picture.note else ""
    return (
        f"<figure>\n<figcaption><h3>{escaped(picture.title)}</h3>{note}</figcaption>\n"
        f'<img{kind} src="data:image/png;base64,{_png(image)}" alt="{escaped(picture.title)}" '
        f'width="{image.width * factor}" height="{image.height * factor}">\n</figure>'
    )


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _details(report: Report) -> str:
    parts = {
        "Settings": report.settings,
        "Samples": report.samples,
        "Reference": report.reference,
        "Versions": report.versions,
    }
    blocks = [
        f"<details>\n<summary>{title}</summary>\n{_facts(values)}\n</details>"
        for title, values in parts.items()
        if values
    ]
    return _section("Details", "details", blocks)


def _facts(values: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escaped(spelled(str(name)))}</th>'
        f"<td>{_facts(value) if isinstance(value, Mapping) else escaped(setting_text(value))}</td>"
        f"</tr>"
        for name, value in values.items()
    )
    return f'<table class="facts">\n{rows}\n</table>'
