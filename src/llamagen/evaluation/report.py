"""Results of an evaluation, as plain data."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from PIL import Image

JSON_NAME = "report.json"


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("llamagen", "torch", "numpy", "pillow")},
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of numbers or words."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    """Numbers are rounded where they are shown; None is shown as a dash."""
    note: str = ""
    """A sentence below it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Lines over a common axis."""

    title: str
    x: str
    """What the horizontal axis is."""
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
    """What was compared with what, how, and what came out of it."""

    protocol: str
    """The evaluation, as "c2i"."""
    title: str
    """One line that names what was evaluated."""
    metrics: dict[str, float]
    """Name -> value; names as in the papers."""
    reference: dict[str, Any]
    """What it was compared with, and how many images of it."""
    samples: dict[str, Any]
    """What was evaluated: how many images, of which size, resized how."""
    settings: dict[str, Any]
    """All else that the numbers depend on."""
    warnings: list[str] = dataclasses.field(default_factory=list)
    """Where this differs from the published protocol, or a number cannot be trusted."""
    tables: list[Table] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=_versions)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, as JSON takes it."""
        values = dataclasses.asdict(dataclasses.replace(self, pictures=[]))
        del values["pictures"]
        return values
