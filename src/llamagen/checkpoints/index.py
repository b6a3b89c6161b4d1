"""The index of a pipeline folder, ``model_index.json``."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path

import llamagen.support.storage as storage
from llamagen.config import SamplingConfig, TextConfig, config_from_dict, config_to_dict, read_json
from llamagen.support.errors import InputError

INDEX_NAME = "model_index.json"
TEXT_ENCODER_FOLDER = "text_encoder"
"""Folder of a pipeline's own text encoder."""

_FORMAT = "llamagen-pipeline"
_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineIndex:
    """Metadata of a pipeline folder."""

    name: str
    """The model's name, as images record it."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """Settings for calls that give none."""
    text: TextConfig | None = None
    """Text encoder of a model conditioned on text."""
    llamagen_version: str = dataclasses.field(default_factory=lambda: version("llamagen"))
    """The version that wrote the folder."""


def is_pipeline_folder(folder: Path | str) -> bool:
    """Return whether ``folder`` holds a pipeline."""
    return (Path(folder) / INDEX_NAME).is_file()


def write_index(folder: Path | str, index: PipelineIndex) -> None:
    """Write the index of a pipeline folder."""
    values = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **config_to_dict(index)}
    storage.write_json(Path(folder) / INDEX_NAME, values)


def read_index(folder: Path | str) -> PipelineIndex:
    """Read the index of a pipeline folder.

    Raises:
        FileNotFoundError: the folder has none.
        InputError: it is damaged, of another program, or of a newer version of this one.
    """
    path = Path(folder) / INDEX_NAME
    values = read_json(path)
    if values.pop("format", None) != _FORMAT:
        raise InputError(
            f"{path} does not describe a llamagen pipeline; it may belong to another program"
        )
    found = values.pop("format_version", None)
    if not isinstance(found, int):
        raise InputError(f"{path}: format_version is {found!r}, expected a number")
    if found > _FORMAT_VERSION:
        raise InputError(
            f"{path} has format {found}, but this version of llamagen reads up to "
            f"{_FORMAT_VERSION}; upgrade it (pip install --upgrade llamagen)"
        )
    return config_from_dict(PipelineIndex, values, source=str(path))
