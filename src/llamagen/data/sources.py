"""Opening images by the name of their source, of any kind."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from llamagen.data import datasets_library as library
from llamagen.data.collection import ImageCollection
from llamagen.data.columns import SourceConfig
from llamagen.data.images import ImageFolder
from llamagen.data.tables import find_table, open_table
from llamagen.support.errors import InputError


def open_images(
    source: str | Path,
    config: SourceConfig | None = None,
    *,
    split: str | None = None,
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
) -> ImageCollection:
    """Return the images of a source.

    Args:
        source: a folder of images, with a subfolder for each class or a table (metadata.csv or
            metadata.jsonl) or neither; such a table; Parquet or WebDataset tar files, as one
            file, a pattern or a folder; or a data set on the hub, "hf:owner/name".
        config: its columns, and the part of it.
        split: instead of that of ``config``.
        labelled: take classes, if there are any.
        class_names: the classes there may be, for images that belong to others (validation); by
            default those that are there.

    Raises:
        FileNotFoundError: there is no such folder or file.
        InputError: there are no images, or the source is damaged, or a class is none of
            ``class_names``.
    """
    config = config or SourceConfig()
    if is_library_source(source):
        dataset = library.load(str(source), split or config.split, config)
        return library.Table(
            dataset, str(source), config, labelled=labelled, class_names=class_names
        )
    path = Path(source)
    table = path if path.suffix.lower() in (".csv", ".jsonl") and path.is_file() else None
    table = table or find_table(path)
    if table is not None:
        return open_table(table, config, labelled=labelled, class_names=class_names)
    if labelled:
        return ImageFolder.scan(path, class_names=class_names)
    return ImageFolder.scan_unlabelled(path)


def is_library_source(source: str | Path) -> bool:
    """Return whether the ``datasets`` library reads a source.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is a file of another kind.
    """
    text = str(source)
    if text.startswith(library.HUB):
        return True
    path = Path(source)
    if path.is_dir():
        if find_table(path) is not None:
            return False
        inside = (entry.suffix.lower() for entry in path.glob("*") if entry.is_file())
        # A level below, as in the "data" folder of a data set cloned from the hub.
        below = (entry.suffix.lower() for entry in path.glob("data/*") if entry.is_file())
        return any(suffix in library.FORMATS for suffix in (*inside, *below))
    is_known = path.suffix.lower() in library.FORMATS
    # Not Path.glob: patterns may be absolute.
    if path.is_file() or glob.glob(text):  # noqa: PTH207
        if not is_known and path.suffix.lower() not in (".csv", ".jsonl"):
            raise InputError(
                f"{source} is no source of images; give a folder, a table (.csv, .jsonl), or "
                f"files ending in {', '.join(library.FORMATS)}"
            )
        return is_known
    if is_known:
        raise FileNotFoundError(f"{source} does not exist; give a folder or files with images")
    return False
