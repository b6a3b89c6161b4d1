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
    metrics: dict[str, float]
    """Name -> value; names as in the papers."""
    reference: dict[str, Any]
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
    versions: dict[str, str] = dataclasses.field(default_factory=_versions)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures, for JSON."""
        values = dataclasses.asdict(dataclasses.replace(self, pictures=[]))
        del values["pictures"]
        return values
