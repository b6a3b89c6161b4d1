"""The captions of images: none, one, or several of which one is drawn each time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llamagen.data.columns import CAPTION_NAMES, SourceConfig, find_column


class Caption(NamedTuple):
    """A caption of an image."""

    text: str
    weight: float
    """How often it is drawn among those of its image; they add up to 1."""


Captions = tuple[Caption, ...]
"""All captions of an image; empty if it has none."""


def caption_columns(config: SourceConfig, columns: Sequence[str], where: str) -> dict[str, float]:
    """The columns of captions there are, and the weight of each.

    Raises:
        InputError: one that was asked for is not there.
    """
    names = config.caption_columns
    if not names:
        found = find_column("caption", None, CAPTION_NAMES, columns, where)
        return {} if found is None else {found: 1.0}
    for name in names:
        find_column("caption", name, CAPTION_NAMES, columns, where)
    weights = config.caption_weights or (1.0,) * len(names)
    return dict(zip(names, weights, strict=True))


def captions_of(
    values: Mapping[str, Any], columns: Mapping[str, float], separator: str | None
) -> Captions:
    """The captions of an image, from a row of a table.

    Args:
        values: the row.
        columns: which of it are captions, with the weight of each. A column that says nothing
            leaves its share to the others; several captions of one share its weight.
        separator: what stands between several captions in one text.
    """
    parts = {name: _texts(values.get(name), separator) for name in columns}
    whole = sum(columns[name] for name, texts in parts.items() if texts)
    if whole == 0:
        return ()
    return tuple(
        Caption(text, columns[name] / len(texts) / whole)
        for name, texts in parts.items()
        for text in texts
    )


def draw_caption(captions: Captions, number: float) -> str | None:
    """The caption that a number from 0 up to below 1 falls on; None if there is none."""
    if not captions:
        return None
    for text, weight in captions:
        number -= weight
        if number < 0:
            return text
    return captions[-1].text


def _texts(value: Any, separator: str | None) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    texts = [str(each) for each in values if each is not None and not _is_nan(each)]
    if separator is not None:
        texts = [part for text in texts for part in text.split(separator)]
    return [text.strip() for text in texts if text.strip()]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
