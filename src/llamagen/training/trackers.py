"""Destinations of a run's metrics and pictures: its folder, the terminal, TensorBoard, wandb."""

from __future__ import annotations

import abc
import contextlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import llamagen.support.storage as storage
from llamagen.support.errors import importing

METRICS_NAME = "metrics.jsonl"
CURVES_NAME = "curves.png"

_SHOWN = ("loss", "bits_per_code", "psnr", "codebook_usage", "grad_norm", "lr", "images_per_second")
"""Metrics of a line on the terminal, in this order."""
_LINES = (("train", "", None), ("validation", " (validation)", "o"))
"""Split, addition to the label, and marker of the lines of a metric's curves."""
_COLUMNS = 2
_PANEL = (5.6, 3.4)
"""Width and height of a panel of curves, in inches."""


class Tracker(abc.ABC):
    """A destination of what a run logs."""

    @abc.abstractmethod
    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Log the metrics of a split (train or validation)."""

    def picture(self, step: int, name: str, path: Path) -> None:  # noqa: B027
        """Log a PNG file."""

    def close(self) -> None:  # noqa: B027
        """Flush and close."""


class MetricsLog(Tracker):
    """metrics.jsonl: one JSON object per line, with ``step``, ``split`` and metrics."""

    def __init__(self, path: Path | None, *, last_step: int) -> None:
        """Drop the lines after ``last_step``, which a resumed run repeats. None: in memory only."""
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path is not None:
            self.records = [r for r in read_metrics(path) if r["step"] <= last_step]
            storage.write_text(path, "".join(json.dumps(r) + "\n" for r in self.records))

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append a line."""
        record = {"step": step, "split": split, **values}
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def latest(self, split: str) -> dict[str, float]:
        """Return the last metrics of ``split``; empty if there are none."""
        last: dict[str, Any] = next((r for r in reversed(self.records) if r["split"] == split), {})
        return {name: value for name, value in last.items() if name not in ("step", "split")}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a metrics file; the last may be cut off by a crash."""
    records: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            records.append(json.loads(line))  # noqa: PERF401  # those before a damaged line stay
    return records


class Console(Tracker):
    """Progress of a run: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, *, steps: int, first: int, name: str, quiet: bool) -> None:
        self._steps, self._quiet = steps, quiet
        self._bar = tqdm(
            total=steps,
            initial=first,
            desc=f"training {name}",
            unit="step",
            dynamic_ncols=True,
            # None: no bar where stderr is not a terminal.
            disable=True if quiet else None,
        )

    def stepped(self) -> None:
        """Count one more step."""
        self._bar.update()

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Show the most important metrics."""
        shown = [
            f"{name.replace('_per_second', '/s').replace('_', ' ')} {values[name]:.4g}"
            for name in _SHOWN
            if name in values
        ]
        if split == "train" and not self._bar.disable:
            self._bar.set_postfix_str(", ".join(shown[:2] + shown[-1:]), refresh=False)
        else:
            label = "" if split == "train" else f"{split}: "
            self.line(f"step {step}/{self._steps}  {label}{'  '.join(shown)}")

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self._quiet:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """See ``Tracker``."""
        self._bar.close()


class _TensorBoard(Tracker):
    """TensorBoard's files, in the run's folder."""

    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        del recipe
        with importing("tracker tensorboard needs", "'llamagen[train]'"):
            from torch.utils.tensorboard.writer import SummaryWriter
        self._writer = SummaryWriter(str(out / "tensorboard"))

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb(Tracker):
    """A run of Weights & Biases, the same one when training is resumed."""

    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        with importing("tracker wandb needs", "wandb"):
            import wandb
        self._wandb = wandb
        id_path = out / "wandb-id.txt"
        if not id_path.exists():
            storage.write_text(id_path, wandb.util.generate_id() + "\n")
        self._run = wandb.init(
            project="llamagen",
            name=out.name,
            id=id_path.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(out),
            config=dict(recipe),
        )

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        # Not wandb's own step, which may not decrease: a resumed run repeats some.
        self._run.log({"step": step, **{f"{split}/{name}": v for name, v in values.items()}})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
"""Called with the run's folder and its plain recipe; InputError if a package is not installed."""


def draw_curves(
    records: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[str]], path: Path
) -> None:
    """Draw metrics over steps into a PNG; raise InputError if matplotlib is not installed.

    ``records`` are lines of metrics.jsonl; ``panels`` name the metrics of each title.
    """
    with importing("curves need", "'llamagen[train]'"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    rows = -(-len(panels) // _COLUMNS)
    # Not pyplot, which has global state and chooses a window system.
    figure = Figure(figsize=(_COLUMNS * _PANEL[0], rows * _PANEL[1]), layout="constrained")
    for number, (title, names) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, _COLUMNS, number, title=title, xlabel="step")
        axis.grid(visible=True, alpha=0.3)
        for name, (split, suffix, marker) in itertools.product(names, _LINES):
            own = [(r["step"], r[name]) for r in records if r["split"] == split and name in r]
            if own:
                label = name.replace("_", " ") + suffix
                axis.plot(*zip(*own, strict=True), label=label, marker=marker, markersize=3)
        if axis.lines:
            axis.legend(fontsize="small")
    with storage.atomic_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
