import itertools
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from llamagen.evaluation.charts import COLOURS, line_chart, log_ticks, round_ticks
from llamagen.evaluation.report import Curve


def curve(series, *, log_x=False, x="guidance scale"):
    return Curve(title="fid", x=x, series=series, log_x=log_x)


def drawn(svg):
    """Where points are, from left to right and from top to bottom."""
    found = re.findall(r'class="point s\d" transform="translate\((\S+) (\S+)\)"', svg)
    return [(float(x), float(y)) for x, y in found]


def texts(svg, kind):
    return [node.text for node in ET.fromstring(svg).iter("text") if node.get("class") == kind]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.1, 3.9), (-7, 1e6), (1e-7, 3e-7), (5, 5.003)])
@pytest.mark.parametrize("most", [2, 5, 8])
def test_ticks_are_multiples_of_a_round_step(low, high, most):
    ticks = round_ticks(low, high, most)
    assert 1 <= len(ticks) <= most
    assert low <= min(ticks)
    assert max(ticks) <= high
    steps = {f"{b - a:.6e}" for a, b in itertools.pairwise(ticks)}
    assert len(steps) <= 1
    for step in steps:
        assert re.fullmatch(r"[125]\.000000e[+-]\d+", step)
        assert all(abs(tick / float(step) - round(tick / float(step))) < 1e-6 for tick in ticks)


def test_ticks_have_no_rounding_errors():
    assert round_ticks(0, 0.5, 6) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_ticks_outside_enclose_the_values():
    assert round_ticks(2.1, 3.9, 5, outside=True) == [2.0, 2.5, 3.0, 3.5, 4.0]


def test_logarithmic_ticks():
    assert log_ticks(1, 16384, 6) == [1, 10, 100, 1000, 10000]
    assert log_ticks(10, 1000, 8) == [10, 20, 50, 100, 200, 500, 1000]
    assert log_ticks(1e-12, 1e12, 5) == [1e-10, 1e-5, 1.0, 1e5, 1e10]
    # Too short for powers of ten.
    assert log_ticks(3, 4, 6) == [3.0, 3.2, 3.4, 3.6, 3.8, 4.0]


def test_every_point_is_drawn_and_tells_its_values():
    svg = line_chart(
        curve({"top-k all": [(1.5, 4.25), (2.0, 3.071234)], "top-k 2000": [(1.5, 5.0)]})
    )
    titles = [node.text for node in ET.fromstring(svg).iter("title")]
    assert titles[:3] == [
        "top-k all: 4.25 at guidance scale 1.5",
        "top-k all: 3.071 at guidance scale 2",
        "top-k 2000: 5 at guidance scale 1.5",
    ]
    assert len(drawn(svg)) == 3
    assert texts(svg, "label") == ["guidance scale"]


def test_points_are_where_their_values_are():
    left, middle, right = drawn(line_chart(curve({"a": [(0, 1), (5, 2), (10, 3)]})))
    assert middle == pytest.approx(((left[0] + right[0]) / 2, (left[1] + right[1]) / 2), abs=0.1)
    assert left[0] < right[0]
    assert left[1] > right[1]


def test_a_logarithmic_axis():
    points = drawn(line_chart(curve({"a": [(1, 1), (10, 1), (100, 1)]}, log_x=True)))
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2, abs=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("place", ["x", "y"])
def test_what_cannot_be_drawn_breaks_the_line_and_is_told(bad, place):
    point = (bad, 2.0) if place == "x" else (2.0, bad)
    svg = line_chart(curve({"a": [(1.0, 1.0), point, (3.0, 3.0)]}))
    assert len(drawn(svg)) == 2
    assert "nan" not in svg
    assert "inf" not in svg
    (line,) = (node for node in ET.fromstring(svg) if node.get("class") == "line s0")
    assert line.get("d").count("M") == 2
    assert texts(svg, "note") == ["1 of 3 points cannot be drawn: see the values"]


def test_nothing_below_zero_on_a_logarithmic_axis():
    svg = line_chart(curve({"a": [(0, 1), (-1, 1), (10, 1)]}, log_x=True))
    assert len(drawn(svg)) == 1
    assert texts(svg, "note") == ["2 of 3 points cannot be drawn: see the values"]


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1.0, math.nan)]}])
@pytest.mark.parametrize("log_x", [False, True])
def test_empty_curves_say_so(series, log_x):
    assert "No points to draw" in texts(line_chart(curve(series, log_x=log_x)), "tick")


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 1.0)],
        [(0.0, 0.0)],
        [(1.0, 5.0), (2.0, 5.0)],
        [(3.0, 1.0), (3.0, 2.0)],
        [(1.0, 1.0), (1.0 + 1e-15, 1.0 + 1e-15)],
        [(1e99, -1e99), (-1e99, 1e99)],
        [(1e-320, 1e-320), (2e-320, 3e-320)],
        [(1.0, 1e6), (2.0, 1e6 + 1e-3)],
        [(1, 2), (np.int64(3), np.float32(4.0))],
    ],
)
@pytest.mark.parametrize("log_x", [False, True])
def test_odd_values_do_not_break_it(points, log_x):
    svg = line_chart(curve({"a": points}, log_x=log_x))
    width, height = map(float, ET.fromstring(svg).get("viewBox").split()[2:])
    for x, y in drawn(svg):
        assert 0 <= x <= width
        assert 0 <= y <= height
    shown = texts(svg, "tick")
    assert len(set(shown)) > 1


def test_series_differ_in_colour_or_mark():
    names = [f"series {number}" for number in range(2 * COLOURS)]
    svg = line_chart(curve({name: [(0, n), (1, n)] for n, name in enumerate(names)}))
    keys = [node for node in ET.fromstring(svg) if node.get("class", "").startswith("key")]
    assert len(keys) == len(names)
    assert len({(key.get("class"), key.findall("path")[1].get("d")) for key in keys}) == len(keys)


def test_long_names_stay_within_the_drawing():
    name = "a series whose name is far too long for any legend that one could think of"
    wide = "\N{CJK UNIFIED IDEOGRAPH-5927}" * 60
    svg = line_chart(curve({name: [(0, 1)], wide: [(1, 2)]}, x=name))
    for text in ET.fromstring(svg).iter("text"):
        assert len(text.text) <= 48
    assert name in [node.text for node in ET.fromstring(svg).iter("title")]


def test_texts_are_escaped():
    svg = line_chart(curve({"<script>&\"'": [(0, 1)]}, x="</svg><b>"))
    assert "<script" not in svg
    assert svg.count("</svg>") == 1
    ET.fromstring(svg)


def test_axis_labels_tell_ticks_apart():
    for low, high in ((1e6, 1e6 + 1), (1e12, 1e12 + 1e5), (1e-9, 3e-9), (0.001, 0.0011)):
        shown = texts(line_chart(curve({"": [(low, low), (high, high)]})), "tick")
        assert max(map(shown.count, shown)) <= 2
