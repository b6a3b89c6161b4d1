"""Which column of a table holds the image, the label, the caption."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from llamagen.support.errors import InputError

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values")
LABEL_NAMES = ("label", "labels", "class", "class_name", "cls", "fine_label")
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "txt", "description")
FILE_NAMES = ("file_name", "file", "filename", "path", "image")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where images are in a data set that is more than a folder of classes."""

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
    """Columns of captions, of which one is drawn each time. Default: text, caption or txt if there
    is one."""
    caption_weights: tuple[float, ...] = ()
    """How often a caption of each of those columns is drawn. Default: all alike."""
    caption_separator: str | None = None
    """What stands between several captions in one value, as "|"."""
    streaming: bool = False
    """Read a hub data set, Parquet or tar files as they come, without a copy of the whole on the
    disk first (tokenizer training only)."""
    shuffle_buffer: int = 1000
    """Images that are shuffled among themselves where data is streamed; files are shuffled as
    wholes."""
    stream_parts: int = 8
    """Parts that the files of streamed data are dealt to, each with its own share of every batch.
    Processes share the parts, so their number must divide this one."""

    def __post_init__(self) -> None:
        for name in ("shuffle_buffer", "stream_parts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
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


def find_column(
    kind: str, wanted: str | None, known: Sequence[str], columns: Sequence[str], where: str
) -> str | None:
    """The column asked for, or the first of the known names that is there.

    Raises:
        InputError: the column asked for is not there.
    """
    if wanted is None:
        return next((name for name in known if name in columns), None)
    if wanted not in columns:
        raise InputError(
            f"{where} has no column {wanted!r} for the {kind}; it has {', '.join(columns)}"
        )
    return wanted
