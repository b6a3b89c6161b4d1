"""Sets of images that are evaluated, read in parts, and results of them, computed in pieces.

Shapes: B images of H x W pixels, as uint8 (B, H, W, 3).
"""

from __future__ import annotations

import abc
import contextlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import llamagen.support.storage as storage
from llamagen.data.columns import SourceConfig
from llamagen.data.images import CorruptImageError
from llamagen.data.sources import open_images
from llamagen.data.views import center_crop
from llamagen.models.tokenizer import images_to_uint8
from llamagen.support import distributed
from llamagen.support.artifact import Advance, Artifact, Format, MakePiece, Settings
from llamagen.support.errors import InputError

_PART = 256
PIECE = 256
"""Images of a piece."""

Measure = Callable[[Tensor, range], Mapping[str, np.ndarray]]
"""Takes some images (B, 3, H, W) and their indices; returns arrays with a row for each."""


class ImageSet(abc.ABC):
    """Images of one size in a fixed order."""

    name: str
    """Their source, for reports."""
    identity: str
    """Changes whenever the images do."""
    labels: np.ndarray | None = None
    """(N,) index into ``class_names``; None where classes are not known."""
    class_names: tuple[str, ...] = ()
    captions: tuple[str, ...] | None = None
    """The most likely caption of each; None where there are none, "" for images without."""
    enlarged_from: tuple[int, int] | None = None
    """Height and width of the first image, if it had to be enlarged to the size of all."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, first: int, last: int) -> np.ndarray:
        """Return the images ``first`` to ``last - 1``; InputError if one is damaged or differs."""

    def tensor(self, first: int, last: int) -> Tensor:
        """Return images as uint8 (B, 3, H, W); see ``read``."""
        return torch.from_numpy(np.array(self.read(first, last))).movedim(-1, 1)

    def parts(self) -> Iterator[np.ndarray]:
        """All images, some hundred at a time."""
        for first in range(0, len(self), _PART):
            yield self.read(first, min(len(self), first + _PART))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.read(0, 1).shape[1:3]
        return height, width


class CollectedImages(ImageSet):
    """A folder, or any other source of images."""

    def __init__(
        self, source: str | Path, config: SourceConfig | None = None, *, size: int | None = None
    ) -> None:
        """Find images; see ``open_images``.

        With ``size`` the middle square is cropped to this side, as in published evaluations; else
        all images must have one size, and are taken as they are.
        """
        self._images = images = open_images(source, config)
        # A collection of a table has the name of the folder that the table lies in.
        self.name, self._side = str(source), size
        with distributed.main_first():
            # An image that is replaced under its old name is another one.
            content = (images.digest(), images.content_digest(), images.annotations())
            self.identity = _digest(*content, size)
        self.class_names = images.class_names
        if images.labels is not None:
            self.labels = np.array(images.labels)
        if images.captions is not None:
            self.captions = tuple(
                max(each, key=lambda caption: caption.weight).text if each else ""
                for each in images.captions
            )

    def __len__(self) -> int:
        return len(self._images)

    @property
    def enlarged_from(self) -> tuple[int, int] | None:  # type: ignore[override]  # read when asked
        """See the base."""
        if self._side is None:
            return None
        width, height = self._images.read(0).size
        return (height, width) if min(height, width) < self._side else None

    def read(self, first: int, last: int) -> np.ndarray:
        """See ``ImageSet``. An image that cannot be read is an error: scores would change."""
        arrays: list[np.ndarray] = []
        for index in range(first, last):
            try:
                image = self._images.read(index)
            except CorruptImageError as error:
                raise InputError(f"{error}; repair or remove it, and evaluate again") from error
            array = np.asarray(image if self._side is None else center_crop(image, self._side))
            if arrays and array.shape != arrays[0].shape:
                raise InputError(
                    f"{self._images.key(index)} in {self.name} has {size_text(array.shape)} "
                    f"pixels, but {self._images.key(first)} has {size_text(arrays[0].shape)}; use "
                    f"images of one size, or crop all with size"
                )
            arrays.append(array)
        return np.stack(arrays)


class ArchivedImages(ImageSet):
    """The images of an .npz file in the form of ADM's evaluator: ``arr_0``, uint8 (N, H, W, 3)."""

    def __init__(self, path: Path) -> None:
        """Read the file's header; InputError if it holds no images, or is damaged."""
        self.path, self.name = path, str(path)
        with _open_array(path, "arr_0") as (_, shape, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] == 0:
                raise InputError(
                    f"arr_0 in {path} is {dtype} {shape}, expected images: uint8 (N, H, W, 3)"
                )
        self._shape = shape
        with _open_archive(path) as archive:
            self.identity = _digest(archive.getinfo("arr_0.npy").CRC, shape)

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, first: int, last: int) -> np.ndarray:
        """See ``ImageSet``; reads no more of the file than it must."""
        each = int(np.prod(self._shape[1:]))
        with _open_array(self.path, "arr_0") as (file, _, _):
            file.seek(file.tell() + first * each)
            content = file.read((last - first) * each)
        if len(content) != (last - first) * each:
            raise InputError(f"{self.path} ends before image {last}; get it again")
        return np.frombuffer(content, np.uint8).reshape(-1, *self._shape[1:])


class Pieces(Artifact):
    """Results for many images, as .npz files that all processes of a run make."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        count: int,
        *,
        late: Mapping[str, Any] = {},
        **fields: Any,
    ) -> None:
        """For ``count`` images; ``fields`` are those of ``Format``.

        ``late`` are further settings, which older folders lack.
        """
        fields = {"settings_name": "settings.json", "suffixes": (".npz",), **fields}
        form = Format(
            name="llamagen-evaluation", version=1, piece_name="piece", has_header=False, **fields
        )
        super().__init__(folder, form, {**settings, **late}, items=count, piece_size=PIECE)
        self._late = late
        self.rank, self.world_size = distributed.rank(), distributed.world_size()

    @classmethod
    def named(cls, root: Path, kind: str, settings: Settings, count: int) -> Self:
        """Results in a folder of their own in ``root``: other settings have another folder."""
        pieces = cls(root, settings, count, noun=kind)
        pieces.folder = root / f"{kind.replace(' ', '-')}-{pieces.identity}"
        return pieces

    def compute(self, make_piece: MakePiece, description: str) -> None:
        """Make the pieces that are not there yet; called in every process of a run.

        Each makes its share and returns once all are there. InputError if the folder was begun with
        other settings, or is in use.
        """
        is_shown = distributed.is_main()
        begun = self.begin(missing=self._late)
        with begun, self.progress_bar(description, "image", shown=is_shown) as bar:
            self.make(make_piece, bar.update)
        distributed.barrier()


def in_batches(images: ImageSet, size: int, measure: Measure) -> MakePiece:
    """Return what makes a piece of what ``measure`` finds in up to ``size`` images at once."""

    def make_piece(items: range, advance: Advance) -> dict[str, Any]:
        parts = []
        batches = images.tensor(items.start, items.stop).split(size)
        for start, batch in zip(items[::size], batches, strict=True):
            parts.append(measure(batch, range(start, start + len(batch))))
            advance(len(batch))
        return {".npz": {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}}

    return make_piece


class PiecedImages(ImageSet):
    """Images that are computed piece by piece, in a folder."""

    pieces: Pieces

    def __len__(self) -> int:
        return self.pieces.items

    def read(self, first: int, last: int) -> np.ndarray:
        """See ``ImageSet``."""
        return self.pieces.rows("images", first, last)


def as_arrays(images: Tensor, size: int | None = None) -> np.ndarray:
    """Return images (B, 3, H, W) in [-1, 1] as bytes (B, H, W, 3).

    With ``size`` they become squares of this side: bicubic, in float before the step to 8 bits, as
    in the published evaluation.
    """
    images = images.float()
    if size is not None and images.shape[-2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic")
    return images_to_uint8(images).movedim(1, -1).cpu().numpy()


def size_text(size: tuple[int, ...]) -> str:
    """Return height and width as "WIDTHxHEIGHT"."""
    return f"{size[1]}x{size[0]}"


def array_names(path: Path) -> list[str]:
    """Return the names of the arrays in an .npz file; InputError if it is damaged."""
    with _open_archive(path) as archive:
        return [entry.removesuffix(".npy") for entry in archive.namelist()]


def read_array(path: Path, name: str) -> np.ndarray:
    """Return an array of numbers in an .npz file; InputError if it is missing or damaged."""
    with _open_array(path, name) as (file, shape, dtype):
        return np.frombuffer(file.read(), dtype).reshape(shape)


def write_images(path: Path, images: ImageSet, labels: np.ndarray | None = None) -> None:
    """Write an .npz file that ADM's evaluator reads, a part at a time, or nothing if that fails."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *images.size, 3)}
    with storage.atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in images.parts():
                file.write(part.tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(labels, np.int64))


def _open_archive(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give an .npz file or a folder of images")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path} is no complete .npz file ({error}); get it again") from error


@contextlib.contextmanager
def _open_array(
    path: Path, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """An array's content, which is too large to read at once, with its shape and type."""
    form = np.lib.format
    with _open_archive(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            found = ", ".join(archive.namelist()).replace(".npy", "") or "nothing"
            raise InputError(f"{path} has no array {name} (but {found}); give a file of ADM's form")
        try:
            with archive.open(f"{name}.npy") as file:
                is_first = form.read_magic(file) == (1, 0)
                read = form.read_array_header_1_0 if is_first else form.read_array_header_2_0
                shape, fortran, dtype = read(file)
                if dtype.hasobject or (fortran and len(shape) > 1):
                    raise ValueError("its arrays are not plain rows of numbers")
                yield file, shape, dtype
        except InputError:
            raise
        except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}); get it again") from error


def _digest(*parts: object) -> str:
    return storage.short_digest([" ".join(map(str, parts)).encode("utf-8", "surrogateescape")])
