"""What a run tells the person watching: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from tqdm import tqdm

_ORDER = ("loss", "bits_per_code", "psnr", "codebook_usage", "grad_norm", "lr", "images_per_second")
"""What a line shows, if it is there; metrics.jsonl has everything."""


class Console:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def stepped(self) -> None:
        """One more step is done."""
        self._bar.update()

    def metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Shows the numbers of a log line."""
        shown = [f"{_words(name)} {_short(values[name])}" for name in _ORDER if name in values]
        if split == "train" and not self._bar.disable:
            self._bar.set_postfix_str(", ".join(shown[:2] + shown[-1:]), refresh=False)
            return
        label = "" if split == "train" else f"{split}: "
        self.line(f"step {step}/{self._steps}  {label}{'  '.join(shown)}")

    def line(self, text: str) -> None:
        """A line of its own."""
        if not self._quiet:
            # Above the bar, where there is one.
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def _words(name: str) -> str:
    return {"images_per_second": "images/s"}.get(name, name.replace("_", " "))


def _short(value: float) -> str:
    return f"{value:.4g}"
