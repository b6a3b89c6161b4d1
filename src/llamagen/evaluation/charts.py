"""Line charts as SVG, to stand inside a page.

Colours and the size of letters come from the page's style sheet (``assets/report.css``), so that a
chart follows its light and dark colours. Lengths are in units of the drawing, which the page
scales to the room there is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import unicodedata
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from llamagen.evaluation.markup import escaped, fixed_text, number_text, power_text, spelled

if TYPE_CHECKING:
    from llamagen.evaluation.report import Curve

COLOURS = 6
"""Classes "s0", "s1", ... of the style sheet; more series begin again, with other marks."""

_WIDTH = 360
_PLOT_HEIGHT = 190
_TOP, _RIGHT = 10, 14
_INSET = 10
"""Keeps the first and last points off the ends of the axis."""
_LINE = 18
"""Height of a line of text."""
_LETTER = 7
"""Width of a letter, on the safe side: fonts differ."""
_KEY = 26
"""Width of a line's sample in the legend."""
_Y_TICKS = 5
_X_TICKS = (8, 6, 5, 4, 3, 2)
_LARGEST = 1e100
"""What is beyond cannot be drawn: differences would overflow."""

# A circle, a square, a triangle, a diamond: for those who cannot tell the colours apart.
_MARKS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "M-3.2-3.2h6.4v6.4h-6.4z",
    "M0-4.2L4.1 3.2H-4.1z",
    "M0-4.6L4.6 0L0 4.6L-4.6 0z",
)

_Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: list[float]
    labels: list[str]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 (low) to 1 (high)."""
        scale: Callable[[float], float] = math.log10 if self.log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The axes and where they are drawn."""

    x: _Axis
    y: _Axis
    left: int

    @property
    def right(self) -> int:
        return _WIDTH - _RIGHT

    @property
    def bottom(self) -> int:
        return _TOP + _PLOT_HEIGHT

    def across(self, value: float) -> float:
        room = self.right - self.left - 2 * _INSET
        return self.left + _INSET + room * self.x.share(value)

    def down(self, value: float) -> float:
        return self.bottom - _PLOT_HEIGHT * self.y.share(value)


def line_chart(curve: Curve) -> str:
    """Draws the series of a curve; each point tells its values when pointed at.

    Points that are not finite, or not positive on a logarithmic axis, are left out, the line
    broken there, and their number is told below.
    """
    # NumPy's short floats would overflow where Python's do not.
    series = {
        name: [(float(x), float(y)) for x, y in points] for name, points in curve.series.items()
    }
    curve = dataclasses.replace(curve, series=series)
    given = [point for points in series.values() for point in points]
    drawn = [point for point in given if _drawable(point, curve.log_x)]
    if drawn:
        frame = _frame(drawn, curve.log_x)
        body = [_axes(frame), *_series(curve, frame)]
        left, height = frame.left, frame.bottom + 2 * _LINE
    else:
        body = [_text(_WIDTH / 2, _TOP + _LINE, "No points to draw", "middle")]
        left, height = 0, _TOP + 3 * _LINE
    centre = (left + _WIDTH - _RIGHT) / 2
    label = _shortened(curve.x, int(2 * (_WIDTH - centre) / _LETTER))
    body.append(_text(centre, height, label, "middle", kind="label"))
    legend, rows = _legend(list(series), left, height + _LINE + 4)
    body.append(legend)
    height += rows * _LINE + (4 if rows else 0)
    if missing := len(given) - len(drawn):
        height += _LINE
        note = f"{missing} of {len(given)} points cannot be drawn: see the values"
        body.append(_text(centre, height, note, "middle", kind="note"))
    summary = f"{spelled(curve.title)} over {curve.x}: a chart of {len(drawn)} points"
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height + 6}" role="img" '
        f'aria-label="{escaped(summary)}">{"".join(body)}</svg>'
    )


def round_ticks(low: float, high: float, most: int, *, outside: bool = False) -> list[float]:
    """At most ``most`` multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: least value of the axis.
        high: largest value, above ``low``.
        most: at least 2; with ``outside`` there can be two more.
        outside: the ticks enclose the values; otherwise they lie within.
    """
    exponent = math.floor(math.log10((high - low) / most))
    for factor, power in ((f, exponent + e) for e in (0, 1, 2) for f in (1, 2, 5)):
        step = factor * 10.0**power
        # A thousandth of a step is rounding, not another tick.
        first, last = math.ceil(low / step - 1e-3), math.floor(high / step + 1e-3)
        if last - first < most:
            break
    if outside:
        first, last = math.floor(low / step + 1e-3), math.ceil(high / step - 1e-3)
    # 3 * 0.1 is not 0.3 before it is rounded.
    return [round(number * step, max(0, -power)) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round values within positive bounds, for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = (low * (1 - 1e-9), high * (1 + 1e-9))
    for factors, every in (((1, 2, 5), 1), *(((1,), n) for n in range(1, len(decades) + 1))):
        chosen = [decade for decade in decades if decade % every == 0]
        ticks = [factor * 10.0**decade for decade in chosen for factor in factors]
        ticks = [tick for tick in ticks if within[0] <= tick <= within[1]]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) > 1 else round_ticks(low, high, most)


def _drawable(point: _Point, log_x: bool) -> bool:
    if not all(math.isfinite(value) and abs(value) < _LARGEST for value in point):
        return False
    return not log_x or point[0] > 1 / _LARGEST


def _frame(points: list[_Point], log_x: bool) -> _Frame:
    low, high = _apart([y for _, y in points])
    ticks = round_ticks(low, high, _Y_TICKS, outside=True)
    y = _Axis(ticks[0], ticks[-1], ticks, _tick_labels(ticks))
    left = 12 + _LETTER * max(map(len, y.labels))
    return _Frame(_x_axis([x for x, _ in points], log_x, _WIDTH - _RIGHT - left), y, left)


def _x_axis(values: list[float], log: bool, width: float) -> _Axis:
    low, high = _apart(values, log=log)
    for most in _X_TICKS:
        ticks = (log_ticks if log else round_ticks)(low, high, most)
        # On a logarithmic axis each tick is exact by itself; they have no common step.
        labels = [number_text(tick) for tick in ticks] if log else _tick_labels(ticks)
        if sum(_LETTER * (len(label) + 2) for label in labels) <= width:
            break
    return _Axis(low, high, ticks, labels, log)


def _apart(values: list[float], *, log: bool = False) -> _Point:
    """Least and largest value, moved apart if they are the same."""
    low, high = min(values), max(values)
    if log:
        return (low, high) if high > low * 1.001 else (low / 2, high * 2)
    largest = max(abs(low), abs(high))
    # Closer than that, floating-point numbers are no longer exact enough for round ticks.
    if high - low <= 1e-9 * largest:
        room = 0.1 * largest or 1.0
        return low - room, high + room
    return low, high


def _tick_labels(ticks: list[float]) -> list[str]:
    """With as many digits as tell the ticks apart."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    decimals = -math.floor(math.log10(step) + 1e-9)
    exponent = math.floor(math.log10(max(map(abs, ticks)) or 1.0))
    if exponent in range(-4, 7):
        return [fixed_text(tick, max(0, decimals)) for tick in ticks]
    return [power_text(tick, max(0, exponent + decimals)) for tick in ticks]


def _axes(frame: _Frame) -> str:
    parts = []
    for tick, label in zip(frame.y.ticks, frame.y.labels, strict=True):
        y = frame.down(tick)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        parts.append(_text(frame.left - 6, y + 4, label, "end"))
    for tick, label in zip(frame.x.ticks, frame.x.labels, strict=True):
        x = frame.across(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {frame.bottom}v4"/>')
        half = _LETTER * len(label) / 2
        parts.append(_text(min(x, _WIDTH - half), frame.bottom + _LINE, label, "middle"))
    parts.append(f'<path class="axis" d="M{frame.left:.1f} {frame.bottom}H{frame.right:.1f}"/>')
    return "".join(parts)


def _series(curve: Curve, frame: _Frame) -> Iterable[str]:
    """All lines, then all points, so that no line hides a point."""
    points = []
    for number, (name, values) in enumerate(curve.series.items()):
        line, command = "", "M"
        for x, y in values:
            if not _drawable((x, y), curve.log_x):
                command = "M"
                continue
            place = f"{frame.across(x):.1f} {frame.down(y):.1f}"
            line += f"{command}{place}"
            command = "L"
            told = f"{name}: {number_text(y)} at {curve.x} {number_text(x)}"
            # The invisible circle is what a finger or a pointer can hit.
            points.append(
                f'<g class="point s{number % COLOURS}" transform="translate({place})">'
                f"<title>{escaped(told.removeprefix(': '))}</title>"
                f'<circle class="target" r="9"/><path d="{_mark(number)}"/></g>'
            )
        yield f'<path class="line s{number % COLOURS}" d="{line}"/>' if line else ""
    yield from points


def _legend(names: list[str], left: int, top: int) -> tuple[str, int]:
    """The names of the series, as many in a row as have room; and how many rows."""
    if not any(names):
        return "", 0
    parts, x, row = [], left, 0
    for number, name in enumerate(names):
        shown = _shortened(name, int((_WIDTH - _RIGHT - left - _KEY) / _LETTER))
        width = _KEY + _LETTER * _letters(shown)
        if x > left and x + width > _WIDTH - _RIGHT:
            x, row = left, row + 1
        parts.append(
            f'<g class="key s{number % COLOURS}" transform="translate({x} '
            f'{top + row * _LINE})"><title>{escaped(name)}</title>'
            f'<path class="line" d="M0-4h20"/><path transform="translate(10 -4)" '
            f'd="{_mark(number)}"/>{_text(_KEY, 0, shown, "start")}</g>'
        )
        x += width + 2 * _LETTER
    return "".join(parts), row + 1


def _text(x: float, y: float, text: str, anchor: str, *, kind: str = "tick") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escaped(text)}</text>'


def _mark(number: int) -> str:
    return _MARKS[number % len(_MARKS)]


def _letters(text: str) -> int:
    """The width of a text in letters: those of East Asia are as wide as two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _shortened(text: str, room: int) -> str:
    if _letters(text) <= room:
        return text
    while text and _letters(text) > room - 1:
        text = text[:-1]
    return f"{text}\N{HORIZONTAL ELLIPSIS}"
