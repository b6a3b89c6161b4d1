"""Captions of images, of which one is sampled each time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import llamagen.support.storage as storage
from llamagen.support.artifact import write_npy
from llamagen.support.errors import InputError
from llamagen.support.names import is_visible

_CONTENT_NAME = "captions.bin"
_ENDS_NAME = "captions.npy"
_AGAIN = "run llamagen extract-codes again"


class Caption(NamedTuple):
    """A caption of an image."""

    text: str
    weight: float
    """Probability among the captions of its image."""


Captions = tuple[Caption, ...]
"""All captions of an image; empty if it has none."""


def captions_of(
    values: Mapping[str, Any], columns: Mapping[str, float], separator: str | None
) -> Captions:
    """Return the captions of an image from a row of a table.

    ``columns`` have weights: several captions of a column, divided by ``separator``, share its
    weight; the other columns share that of an empty one.
    """
    parts = {name: _texts(values.get(name), separator) for name in columns}
    whole = sum(columns[name] for name, texts in parts.items() if texts)
    return tuple(
        Caption(text, columns[name] / len(texts) / whole)
        for name, texts in parts.items()
        for text in texts
    )


def draw_caption(captions: Captions, number: float) -> str | None:
    """Sample a caption by a uniform number in [0, 1); None if there are none."""
    for text, weight in captions:
        number -= weight
        if number < 0:
            return text
    return captions[-1].text if captions else None


class CaptionTable:
    """Captions of many images in a file, read one image at a time."""

    def __init__(self, folder: Path, images: int) -> None:
        """Open what ``write_captions`` wrote into ``folder``.

        FileNotFoundError or InputError if it is missing, damaged, or of other images.
        """
        content, ends = folder / _CONTENT_NAME, folder / _ENDS_NAME
        for path in (content, ends):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; {_AGAIN}")
        try:
            self._ends = np.load(ends, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{ends} is damaged ({error}); {_AGAIN}") from error
        size, last = content.stat().st_size, int(self._ends[-1]) if len(self._ends) else 0
        if len(self._ends) != images or size != last:
            raise InputError(
                f"{content} has {size} of {last} bytes for {len(self._ends)} of {images} images; "
                f"{_AGAIN}"
            )
        self._content = np.memmap(content, mode="r") if size else np.empty(0, "u1")

    def __getitem__(self, index: int) -> Captions:
        """Return the captions of an image."""
        start = int(self._ends[index - 1]) if index else 0
        text = self._content[start : int(self._ends[index])].tobytes()
        return tuple(Caption(caption, weight) for caption, weight in json.loads(text))


def write_captions(folder: Path, captions: Iterable[Captions]) -> None:
    """Write the captions of images, for ``CaptionTable``."""
    ends: list[int] = []
    with storage.atomic_file(folder / _CONTENT_NAME) as temporary, temporary.open("wb") as file:
        for each in captions:
            file.write(json.dumps(each, ensure_ascii=False).encode("utf-8", "surrogatepass"))
            ends.append(file.tell())
    with storage.atomic_file(folder / _ENDS_NAME) as temporary:
        write_npy(temporary, np.array(ends, dtype=np.int64))


def _texts(value: Any, separator: str | None) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    # Empty cells are None or NaN.
    values = [each for each in values if not (isinstance(each, float) and math.isnan(each))]
    texts = [str(each) for each in values if each is not None]
    if separator is not None:
        texts = [part for text in texts for part in text.split(separator)]
    return [text.strip() for text in texts if is_visible(text)]
