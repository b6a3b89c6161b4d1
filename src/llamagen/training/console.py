"""Progress of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tqdm import tqdm

from llamagen.training.trackers import Tracker

_SHOWN = ("loss", "bits_per_code", "psnr", "codebook_usage", "grad_norm", "lr", "images_per_second")
"""Metrics of a line, in this order; metrics.jsonl has all."""


class Console(Tracker):
    """Progress of one run."""

    def __init__(self, *, steps: int, first: int, description: str, quiet: bool) -> None:
        self._steps = steps
        self._quiet = quiet
        self._bar = tqdm(
            total=steps,
            initial=first,
            desc=description,
            unit="step",
            dynamic_ncols=True,
            # None: no bar where stderr is not a terminal.
            disable=True if quiet else None,
        )

    def stepped(self) -> None:
        """Count one more step."""
        self._bar.update()

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Show the metrics of a log line."""
        shown = [
            f"{name.replace('_per_second', '/s').replace('_', ' ')} {values[name]:.4g}"
            for name in _SHOWN
            if name in values
        ]
        if split == "train" and not self._bar.disable:
            self._bar.set_postfix_str(", ".join(shown[:2] + shown[-1:]), refresh=False)
            return
        label = "" if split == "train" else f"{split}: "
        self.line(f"step {step}/{self._steps}  {label}{'  '.join(shown)}")

    def line(self, text: str) -> None:
        """Print a line of its own."""
        if not self._quiet:
            # Above the bar, if there is one.
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """See ``Tracker``."""
        self._bar.close()
