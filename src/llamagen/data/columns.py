"""Columns of a table with images, labels and captions; classes from labels."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llamagen.config import require_positive
from llamagen.data.captions import Captions, captions_of
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from llamagen.support.names import as_index, normal_name

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values")
LABEL_NAMES = ("label", "labels", "class", "class_name", "cls", "fine_label")
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "txt", "description")
FILE_NAMES = ("file_name", "file", "filename", "path", "image")
_MAX_CLASSES = 1_000_000
_NUMBER = re.compile("-?(0|[1-9][0-9]*)")
"""Other numbers, such as 007, are only names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Columns and split of a data set."""

    split: str = "train"
    """Split of a hub data set, or of a folder with Parquet or tar files, to train on or encode;
    slices such as train[:1000] too."""
    validation_split: str | None = None
    """Split for validation. Default: a part of the data is held out."""
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    image_column: str | None = None
    """Column of the image, or of its file's name. Default: the column of images there is, or
    file_name."""
    label_column: str | None = None
    """Column of the class. Default: label, class or cls if there is one."""
    caption_columns: tuple[str, ...] = ()
    """Columns of captions, of which one is sampled each time. Default: text, caption or txt if
    there is one."""
    caption_weights: tuple[float, ...] = ()
    """Relative frequency of a caption of each of those columns. Default: all alike."""
    caption_separator: str | None = None
    """Separator of several captions in one value, as "|"."""
    streaming: bool = False
    """Read a hub data set, Parquet or tar files as they come, without a copy of the whole on the
    disk first (tokenizer training only)."""
    shuffle_buffer: int = 1000
    """Images of a block that is shuffled where data is streamed; the order of files is shuffled,
    too."""
    stream_parts: int = 8
    """Parts that the files of streamed data are divided into, each with its own share of every
    batch. Processes share the parts, so their number must divide this one."""

    def __post_init__(self) -> None:
        require_positive(self, "shuffle_buffer", "stream_parts")
        weights = self.caption_weights
        if weights and (
            len(weights) != len(self.caption_columns)
            or not all(math.isfinite(weight) and weight > 0 for weight in weights)
        ):
            raise InputError(
                f"caption_weights are {weights} for the columns {self.caption_columns}, expected "
                f"a number above 0 for each"
            )
        if self.caption_separator == "":
            raise InputError("caption_separator is empty; give a character, or leave it out")


def sort_names(names: Iterable[str]) -> list[str]:
    """Sort names of classes: alphabetically, but numbers by their value."""
    names = sorted(names)
    if all(name.isascii() and name.isdecimal() for name in names):
        # Not int, which refuses very long ones.
        names.sort(key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))
    return names


def classes_of(
    values: Sequence[Any],
    where: str,
    *,
    typed: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the label of each image, and the names of all classes, from a column of labels.

    Values are names of classes, which are sorted. Numbers are names, too, but if they count from 0
    and at least half of them occur, those between are classes as well, so that a number is its own
    index.

    Args:
        values: the column.
        where: the table, for messages.
        typed: the names that ``values`` are indices of.
        class_names: the classes of the training images, of images for validation; the names here
            are found among them.

    InputError if a value is missing, a number is negative or too large, or a class is none of
    ``class_names``.
    """
    names = [_name_of(value) for value in values]
    for row, name in enumerate(names):
        if not name:
            raise InputError(f"row {row} of {where} has no label; give it one or remove the row")
    classes = tuple(sort_names(set(names)))
    are_numbers = all(map(_NUMBER.fullmatch, classes))
    if are_numbers:
        limit = _MAX_CLASSES if typed is None else len(typed)
        for row, number in enumerate(map(as_index, names)):
            if number is None or number >= limit:
                raise InputError(
                    f"row {row} of {where} has the label {names[row]}, expected 0 to {limit - 1}; "
                    f"is it a label at all?"
                )
        if typed is not None:
            classes = tuple(map(normal_name, typed))
            names, are_numbers = [classes[int(name)] for name in names], False
        elif classes[:1] == ("0",) and int(classes[-1]) < 2 * len(classes):
            classes = tuple(map(str, range(int(classes[-1]) + 1)))
    if class_names is not None:
        classes = tuple(class_names)
    index = Labels(classes).match(names, where)
    for row, name in enumerate(names):
        if name not in index:
            what = f"class {name!r}, which the training images do not have"
            if are_numbers and not any(map(_NUMBER.fullmatch, classes)):
                what = f"label {name}, but the classes are 0 to {len(classes) - 1}"
            raise InputError(f"row {row} of {where} has the {what}; rename it or remove the row")
    return tuple(index[name] for name in names), classes


def _name_of(value: Any) -> str:
    """Return a label as the name of a class; "" if it is missing."""
    if value is None or value != value:  # NaN
        return ""
    is_whole = isinstance(value, float) and value.is_integer()
    return normal_name(str(int(value) if is_whole else value))


def find_column(
    kind: str, wanted: str | None, known: Sequence[str], columns: Sequence[str], where: str
) -> str | None:
    """Return the column asked for (InputError if missing), or the first known one there is."""
    if wanted is None:
        return next((name for name in known if name in columns), None)
    if wanted in columns:
        return wanted
    raise InputError(
        f"{where} has no column {wanted!r} for the {kind}; it has {', '.join(columns)}"
    )


def caption_columns(config: SourceConfig, columns: Sequence[str], where: str) -> dict[str, float]:
    """Return the columns of captions, and the weight of each; errors as of ``find_column``."""
    wanted = config.caption_columns or (None,)
    found = (find_column("caption", name, CAPTION_NAMES, columns, where) for name in wanted)
    names = [name for name in found if name is not None]
    weights = config.caption_weights or (1.0,) * len(names)
    return dict(zip(names, weights, strict=True))


def read_annotations(
    values: Callable[[str], Sequence[Any]],
    columns: Sequence[str],
    config: SourceConfig,
    where: str,
    *,
    labelled: bool = True,
    typed: Mapping[str, Sequence[str]] | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[tuple[int, ...] | None, tuple[str, ...], tuple[Captions, ...] | None]:
    """Return the labels, if ``labelled``, their classes, and the captions of a table.

    None without a column. ``values`` returns those of a column, ``where`` is the table, for
    messages. ``typed`` are columns of labels that say which classes there are, the first choice by
    default; see ``classes_of`` for the rest.
    """
    labels: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    captions: tuple[Captions, ...] | None = None
    typed = typed or {}
    label = find_column("label", config.label_column, [*typed, *LABEL_NAMES], columns, where)
    if labelled and label is not None:
        labels, names = classes_of(
            values(label), where, typed=typed.get(label), class_names=class_names
        )
    if weights := caption_columns(config, columns, where):
        rows = zip(*map(values, weights), strict=True)
        dicts = (dict(zip(weights, row, strict=True)) for row in rows)
        captions = tuple(captions_of(row, weights, config.caption_separator) for row in dicts)
    return labels, names, captions
