"""Metrics of a run: their means between two log lines, and metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llamagen.support.storage as storage
from llamagen.support import distributed
from llamagen.training.trackers import Tracker

FILE_NAME = "metrics.jsonl"


class Meter:
    """Means of scalars. Sums stay on their device, so adding does not synchronise."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one scalar per name."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the mean of each name's values since ``clear``, over all processes."""
        return {name: total / self._counts[name] for name, total in self._totals().items()}

    def clear(self) -> None:
        """Reset all means."""
        self._sums.clear()
        self._counts.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint between two log lines."""
        return {"sums": self._totals(), "counts": dict(self._counts)}

    def _totals(self) -> dict[str, float]:
        """Return the sums, averaged over the processes, which have all added the same names."""
        if not self._sums:
            return {}
        sums = torch.stack([total.double().cpu() for total in self._sums.values()])
        return dict(zip(self._sums, distributed.mean(sums).tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from what ``state_dict`` returned."""
        self._sums = {
            name: torch.tensor(total, device=device) for name, total in state["sums"].items()
        }
        self._counts = dict(state["counts"])


class MetricsLog(Tracker):
    """One JSON object per line: ``step``, ``split`` (train or validation) and metrics."""

    def __init__(self, path: Path | None, *, last_step: int) -> None:
        """Lines after ``last_step`` are dropped: the run repeats those steps.

        Without a path they are in memory only.
        """
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path is None:
            return
        self.records = [r for r in read_metrics(path) if r["step"] <= last_step]
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        storage.write_text(path, lines)

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append a line."""
        record = {"step": step, "split": split, **values}
        self.records.append(record)
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def latest(self, split: str) -> dict[str, float]:
        """Return the last metrics of ``split``; empty if there are none."""
        for record in reversed(self.records):
            if record["split"] == split:
                return {k: v for k, v in record.items() if k not in ("step", "split")}
        return {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a metrics file; the last may be cut off by a crash."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
