"""Data sets read by Hugging Face's ``datasets``: on the hub, Parquet, WebDataset tar files.

Images are decoded as those of folders are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

import llamagen.support.storage as storage
from llamagen.data.columns import (
    IMAGE_NAMES,
    SourceConfig,
    find_column,
    read_annotations,
)
from llamagen.data.images import CorruptImageError, ImageCollection, decode_image
from llamagen.support.errors import InputError, importing, one_line

FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
"""Suffixes of files -> the library's name of the format."""
HUB = "hf:"
"""Prefix of the name of a data set on the hub."""


def import_datasets() -> ModuleType:
    """Return the library; InputError if it is not installed."""
    with importing("hub data sets, Parquet and tar files need", "'llamagen[data]'"):
        import datasets
    return datasets


def load(source: str, split: str, config: SourceConfig) -> Any:
    """Open a source as a ``Dataset``, or as an ``IterableDataset`` to stream; else InputError.

    It is "hf:owner/name" or "hf:owner/name@revision", a folder, a file, or a pattern such as
    "shards/train-*.tar"; ``split`` is "train" for files and patterns.
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
    # The library and its dependencies raise almost anything.
    except Exception as error:
        reasons = [error, error.__cause__, error.__context__]
        full = next((e for e in reasons if isinstance(e, OSError) and e.errno is not None), None)
        if full is not None and not isinstance(error, FileNotFoundError):
            raise full from error
        reason = one_line(error.__cause__ or error)
        raise InputError(f"{source} cannot be read as a data set ({reason})") from error


class Table(ImageCollection):
    """A ``datasets.Dataset``, with labels and captions in memory."""

    def __init__(
        self,
        dataset: Any,
        name: str,
        config: SourceConfig | None = None,
        *,
        labelled: bool = True,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Find the columns; InputError if there are no images, or for a label that is missing."""
        datasets = import_datasets()
        config = config or SourceConfig()
        self.name = name
        features, columns = dataset.features, list(dataset.features)
        self._column = image_column(features, config, name)
        typed = {c: f.names for c, f in features.items() if isinstance(f, datasets.ClassLabel)}
        self.labels, self.class_names, self.captions = read_annotations(
            lambda column: dataset[column][:],
            columns,
            config,
            name,
            labelled=labelled,
            typed=typed,
            class_names=class_names,
        )
        self._dataset = undecoded(dataset, self._column).select_columns([self._column])
        self._rows = np.arange(len(dataset))

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """Return the number of the row."""
        return f"{self._rows[index]:09d}"

    def read(self, index: int) -> Image.Image:
        """Read a row."""
        row = int(self._rows[index])
        return decode(self._dataset[row][self._column], Path(f"{self.name} row {row}"))

    def _select(self, indices: Sequence[int]) -> None:
        self._rows = self._rows[list(indices)]

    def digest(self) -> str:
        """Return a short text that depends on the rows and the sizes of their images."""
        chunks = self._dataset.data.column(self._column).chunks
        sizes = (_sizes(chunk).tobytes() for chunk in chunks)
        return storage.short_digest([self._rows.tobytes(), *sizes])

    def content_digest(self) -> str:
        """See ``ImageCollection``; how files divide the rows makes no difference."""
        chunks = self._dataset.data.column(self._column).chunks
        return storage.short_digest(itertools.chain.from_iterable(map(_contents, chunks)))


class InMemory(ImageCollection):
    """A few undecoded images in memory, such as the first of a streamed data set."""

    def __init__(self, values: Sequence[Any], name: str) -> None:
        self._values, self.name = list(values), name

    def __len__(self) -> int:
        return len(self._values)

    def key(self, index: int) -> str:
        """Return the image's position."""
        return f"{index:09d}"

    def read(self, index: int) -> Image.Image:
        """Decode an image."""
        return decode(self._values[index], Path(f"{self.name} row {index}"))

    def _select(self, indices: Sequence[int]) -> None:
        self._values = [self._values[i] for i in indices]

    def content_digest(self) -> str:
        """See ``ImageCollection``."""
        return storage.short_digest(repr(value).encode() for value in self._values)


def _sizes(chunk: Any) -> np.ndarray:
    """Return the bytes of each image of a chunk of a column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(chunk.type):
        chunk = chunk.field("bytes")
    return np.asarray(pc.fill_null(pc.binary_length(chunk), 0).to_numpy(zero_copy_only=False))


def _contents(chunk: Any) -> Iterator[Any]:
    """Yield the content of each image of a chunk of a column."""
    for value in chunk:
        content, path = value["bytes"], value["path"]
        if content.is_valid:
            yield content.as_buffer()
        elif path.is_valid and Path(path.as_py()).is_file():
            yield Path(path.as_py()).read_bytes()


def image_column(features: Mapping[str, Any], config: SourceConfig, name: str) -> str:
    """Return the column of images: that of ``config``, else by type or name, else InputError."""
    image = import_datasets().Image
    typed = [column for column, feature in features.items() if isinstance(feature, image)]
    known = [*typed, *IMAGE_NAMES]
    if found := find_column("image", config.image_column, known, list(features), name):
        return found
    raise InputError(
        f"{name} has no column of images (it has {', '.join(features)}); name it with "
        f"`image_column`"
    )


def undecoded(dataset: Any, column: str) -> Any:
    """Return the data set without decoding of a column of images."""
    return dataset.cast_column(column, import_datasets().Image(decode=False))


def decode(value: Any, path: Path) -> Image.Image:
    """Decode an image of the library's, as bytes or the path of a file; see ``open_image``."""
    value = value or {}
    if (content := value.get("bytes")) is None:
        if not value.get("path"):
            raise CorruptImageError(path, "there is no image")
        content = Path(value["path"]).read_bytes()
    return decode_image(content, path)
