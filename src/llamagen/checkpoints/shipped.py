"""The models that come with the package: pipeline folders that are found by name."""

from __future__ import annotations

from pathlib import Path

from llamagen.checkpoints.index import is_pipeline_folder

_FOLDER = Path(__file__).parent.parent / "assets" / "models"


def shipped_models() -> list[str]:
    """Their names."""
    if not _FOLDER.is_dir():
        return []
    return sorted(path.name for path in _FOLDER.iterdir() if is_pipeline_folder(path))


def find_shipped(name: str) -> Path | None:
    """The folder of the shipped model called ``name``, in any case; None if there is none."""
    wanted = name.lower()
    return _FOLDER / wanted if wanted in shipped_models() else None
