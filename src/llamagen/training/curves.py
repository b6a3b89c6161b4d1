"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llamagen.support.storage as storage
from llamagen.support.errors import InputError

FILE_NAME = "curves.png"

_COLUMNS = 2
_PANEL = (5.6, 3.4)
"""Width and height of a panel in inches."""


def draw_curves(
    records: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[str]], path: Path
) -> None:
    """Draws metrics over steps into a PNG.

    Args:
        records: lines of metrics.jsonl.
        panels: title -> names of the metrics in it; a metric is drawn for each split that has it.
        path: where the picture goes.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "curves need matplotlib; install it with pip install 'llamagen[train]'"
        ) from error
    rows = -(-len(panels) // _COLUMNS)
    # Not pyplot: its global state and its choice of a window system are not ours to touch.
    figure = Figure(figsize=(_COLUMNS * _PANEL[0], rows * _PANEL[1]), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, title, _lines(records, names))
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    with storage.atomic_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _lines(
    records: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, tuple[list[int], list[float]]]:
    """Label -> steps and values, for each name and split that occur."""
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for name in names:
        for record in records:
            if name in record:
                words = name.replace("_", " ")
                label = words if record["split"] == "train" else f"{words} ({record['split']})"
                steps, values = lines.setdefault(label, ([], []))
                steps.append(record["step"])
                values.append(record[name])
    return lines


def _draw_panel(axis: Any, title: str, lines: Mapping[str, tuple[list[int], list[float]]]) -> None:
    for label, (steps, values) in lines.items():
        held_out = label.endswith(")")
        axis.plot(steps, values, label=label, marker="o" if held_out else None, markersize=3)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(visible=True, alpha=0.3)
    if lines:
        axis.legend(fontsize="small")
