"""Data sets that Hugging Face's ``datasets`` reads: the hub's, Parquet, WebDataset tars.

Images are decoded by us, so that damaged ones are skipped and odd ones come out as elsewhere.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
from PIL import Image

from llamagen.data.captions import caption_columns, captions_of
from llamagen.data.classes import classes_of
from llamagen.data.collection import ImageCollection
from llamagen.data.columns import (
    IMAGE_NAMES,
    LABEL_NAMES,
    SourceConfig,
    find_column,
)
from llamagen.data.images import CorruptImageError, decode_image
from llamagen.support.errors import InputError

FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
"""Ends of file names -> the library's name of the format."""
HUB = "hf:"
"""What the name of a data set on the hub begins with."""


def import_datasets() -> ModuleType:
    """The library.

    Raises:
        InputError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "hub data sets, Parquet and tar files need the datasets library; install it with: "
            "pip install 'llamagen[data]'"
        ) from error
    return datasets


def load(source: str, split: str, config: SourceConfig) -> Any:
    """What the library makes of a source: a ``Dataset``, or an ``IterableDataset`` to stream.

    Args:
        source: "hf:owner/name" or "hf:owner/name@revision", a folder, a file, or a pattern such
            as "shards/train-*.tar".
        split: its split; files that a pattern names are all of the split "train".
        config: the subset, and whether to stream.

    Raises:
        InputError: there is no such data set or split, or the library cannot read it.
    """
    datasets = import_datasets()
    arguments: dict[str, Any] = {"split": split, "streaming": config.streaming}
    if source.startswith(HUB):
        path, _, revision = source.removeprefix(HUB).partition("@")
        arguments |= {"revision": revision or None, "name": config.subset}
    elif Path(source).is_dir():
        if (Path(source) / "state.json").is_file() and not config.streaming:
            return _try(lambda: datasets.load_from_disk(source), source)
        path = source
        arguments |= {"name": config.subset}
    else:
        path = FORMATS[Path(source).suffix.lower()]
        arguments |= {"data_files": source}
    return _try(lambda: datasets.load_dataset(path, **arguments), source)


def _try(action: Any, source: str) -> Any:
    try:
        return action()
    # The library and what it is built on raise almost anything.
    except Exception as error:
        reasons = [error, error.__cause__, error.__context__]
        full = next((e for e in reasons if isinstance(e, OSError) and e.errno is not None), None)
        if full is not None and not isinstance(error, FileNotFoundError):
            raise full from error
        shown = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{source} cannot be read as a data set ({shown})") from error


class Table(ImageCollection):
    """A ``datasets.Dataset``: its images by row, its labels and captions in memory."""

    def __init__(
        self,
        dataset: Any,
        name: str,
        config: SourceConfig | None = None,
        *,
        labelled: bool = True,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Finds the columns.

        Raises:
            InputError: there is no column of images, or a label is missing or out of range.
        """
        config = config or SourceConfig()
        self.name = name
        columns = Columns.find(dataset.features, config, name)
        if labelled and columns.label is not None:
            values = dataset[columns.label][:]
            names = columns.class_names or class_names
            if names is not None and class_names is not None and tuple(names) != tuple(class_names):
                raise InputError(
                    f"the classes of {name} are not those of the training images; map them to the "
                    f"same names first"
                )
            self.labels, self.class_names = classes_of(values, name, class_names=names)
        if columns.captions:
            rows = dataset.select_columns(list(columns.captions))
            separator = config.caption_separator
            self.captions = tuple(captions_of(row, columns.captions, separator) for row in rows)
        self._dataset = undecoded(dataset, columns).select_columns([columns.image])
        self._column = columns.image
        self._rows = np.arange(len(dataset))

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """The number of the row."""
        return f"{self._rows[index]:09d}"

    def read(self, index: int) -> Image.Image:
        """Reads a row."""
        row = int(self._rows[index])
        value = self._dataset[row][self._column]
        return decode(value, Path(f"{self.name} row {row}"))

    def subset(self, indices: Sequence[int]) -> Self:
        """Some of the rows."""
        part = copy.copy(self)
        part._rows = self._rows[list(indices)]
        if self.labels is not None:
            part.labels = tuple(self.labels[i] for i in indices)
        if self.captions is not None:
            part.captions = tuple(self.captions[i] for i in indices)
        return part

    def digest(self) -> str:
        """Changes with the rows and the sizes of their images."""
        whole = hashlib.sha256(self._rows.tobytes())
        for chunk in self._dataset.data.column(self._column).chunks:
            whole.update(_sizes(chunk).tobytes())
        return whole.hexdigest()[:16]


class InMemory(ImageCollection):
    """A few undecoded images, as those that a streamed data set begins with."""

    def __init__(self, values: Sequence[Any], name: str) -> None:
        self._values, self.name = tuple(values), name

    def __len__(self) -> int:
        return len(self._values)

    def key(self, index: int) -> str:
        """The image's place."""
        return f"{index:09d}"

    def read(self, index: int) -> Image.Image:
        """Decodes an image."""
        return decode(self._values[index], Path(f"{self.name} row {index}"))

    def subset(self, indices: Sequence[int]) -> Self:
        """Some of the images."""
        return type(self)([self._values[i] for i in indices], self.name)


def _sizes(chunk: Any) -> np.ndarray:
    """Bytes of each image of a chunk of a column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(chunk.type):
        chunk = chunk.field("bytes")
    return np.asarray(pc.fill_null(pc.binary_length(chunk), 0).to_numpy(zero_copy_only=False))


class Columns:
    """The columns of a data set that are read."""

    def __init__(
        self,
        image: str,
        label: str | None,
        captions: dict[str, float],
        class_names: Sequence[str] | None,
    ) -> None:
        self.image, self.label = image, label
        self.captions = captions
        """With the weight of each."""
        self.class_names = class_names
        """The classes' names, where the data set has them."""

    @classmethod
    def find(cls, features: Mapping[str, Any], config: SourceConfig, name: str) -> Columns:
        """Finds them by their types, then by their names.

        Raises:
            InputError: there is no column of images, or not the one that was asked for.
        """
        datasets = import_datasets()
        names = list(features)
        images = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
        image = find_column("image", config.image_column, [*images, *IMAGE_NAMES], names, name)
        if image is None:
            raise InputError(
                f"{name} has no column of images (it has {', '.join(names)}); name it with "
                f"`image_column`"
            )
        typed = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
        label = find_column("label", config.label_column, [*typed, *LABEL_NAMES], names, name)
        captions = caption_columns(config, names, name)
        named = getattr(features[label], "names", None) if label is not None else None
        return cls(image, label, captions, named)


def undecoded(dataset: Any, columns: Columns) -> Any:
    """The data set with its images as they are stored."""
    feature = import_datasets().Image(decode=False)
    return dataset.cast_column(columns.image, feature)


def decode(value: Any, path: Path) -> Image.Image:
    """An undecoded image of the library's: bytes, or the path of a file.

    Raises:
        CorruptImageError: it is missing, or no whole image.
        OSError: its file cannot be reached.
    """
    if value is None or (value.get("bytes") is None and not value.get("path")):
        raise CorruptImageError(path, "there is no image")
    content = value.get("bytes")
    if content is None:
        content = Path(value["path"]).read_bytes()
    return decode_image(content, path)


def files_of(dataset: Any) -> list[Any]:
    """An ``IterableDataset`` file by file."""
    count = dataset.num_shards
    return [dataset.shard(num_shards=count, index=index) for index in range(count)]


def examples(file: Any, first: int) -> Iterator[dict[str, Any]]:
    """The rows of one of ``files_of``, from one on."""
    yield from file.skip(first)
