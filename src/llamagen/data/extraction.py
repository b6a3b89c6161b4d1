"""Writing a store of codes: from images by a tokenizer, or from the published layout.

The list of images is cut into slices of fixed length, and every slice becomes a shard. A shard
counts as done when its sidecar is there, which is written last; so whatever was done stays done
when a run is killed, and any number of processes can work on one store without talking to one
another. What the store shall hold is written down first (``plan.json``) and cannot change.

Longer than most files: the two sources, images and the published layout, share the engine.

Shapes: B images, V views of an image, n images of a shard, rows x columns codes.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import llamagen.storage as storage
from llamagen.config import config_to_dict
from llamagen.data.codes import tokenizer_fingerprint
from llamagen.data.collection import ImageCollection
from llamagen.data.crops import TEN_CROP_RANGES
from llamagen.data.loader import image_views
from llamagen.data.store import (
    MANIFEST_NAME,
    PLAN_NAME,
    SKIPPED_NAME,
    CodeStore,
    Manifest,
    Sidecar,
    StorePlan,
    StoreViews,
    check_shard,
    read_plan_file,
    read_sidecar,
    shard_path,
    sidecar_path,
    write_npy,
    write_plan_file,
)
from llamagen.data.views import Views
from llamagen.devices import find_device
from llamagen.errors import InputError
from llamagen.generation.memory import decoding_batch_size
from llamagen.labels import Labels
from llamagen.tokenizer import ImageTokenizer, uint8_to_images

SHARD_SIZE = 4096
"""Images to a shard; twenty views of 256 codes each are then 42 MB."""

_CPU_BATCH = 16
"""Larger batches gain nothing on a CPU."""

# Numbers of options in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_log = logging.getLogger(__name__)

Report = Callable[[int], object]
"""Is told how many more image files are done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """What a call has done."""

    store: CodeStore | None
    """The store; None if other processes have not finished their shards yet."""
    images: int
    """Image files that this call went through; those of shards that were there do not count."""
    seconds: float


def extract_store(
    tokenizer: ImageTokenizer,
    images: ImageCollection,
    views: Views,
    out: Path | str,
    *,
    captions: Sequence[str] | None = None,
    shard_size: int = SHARD_SIZE,
    batch_size: int | None = None,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> Extraction:
    """Encodes all views of all images that can be read; shards that are there are kept.

    Args:
        tokenizer: with its weights in float32, by which it is known.
        images: with or without labels.
        views: what is encoded of each image.
        out: folder of the store; new, empty, or begun with the same arguments.
        captions: one per image.
        shard_size: images to a shard.
        batch_size: views encoded at once; by default as many as fit into memory.
        workers: processes that read images for this one.
        dtype: precision to encode with.
        rank: this process makes every ``world_size``-th shard, from this one on.
        world_size: processes that work on the store.
        overwrite: delete a store of other images, views, or tokenizer first.
        progress: show a bar, if there is a terminal.

    Raises:
        InputError: the folder holds something else, the size does not fit the tokenizer, or no
            image can be read.
        OSError: the disk is full, or an image file cannot be reached.
    """
    job = _Job(tokenizer, images, views, Path(out), captions, workers, dtype)
    plan = job.plan(shard_size, batch_size, processes=world_size)
    plan = _begin(job.out, plan, batch_size, overwrite=overwrite, alone=world_size == 1)
    shards = range(rank, plan.shards, world_size)
    with _bar(job.out, plan, shards, shown=progress) as bar:
        start = time.perf_counter()
        count = _write_shards(plan, job.out, shards, job.shard_maker(plan), bar.update)
        seconds = time.perf_counter() - start
    return Extraction(store=_complete(job.out, plan), images=count, seconds=seconds)


def extract_in_processes(
    processes: int,
    tokenizer: ImageTokenizer,
    images: ImageCollection,
    views: Views,
    out: Path | str,
    *,
    captions: Sequence[str] | None = None,
    shard_size: int = SHARD_SIZE,
    batch_size: int | None = None,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    progress: bool = True,
) -> Extraction:
    """As ``extract_store``, by several processes that this one starts.

    On CUDA devices they take turns; on a CPU they share the threads.

    Raises:
        InputError: as ``extract_store``.
        ChildProcessError: a process died, as for want of memory; the others were ended.
        OSError: the disk is full, or an image file cannot be reached.
    """
    if processes < 1:
        raise InputError(f"the number of processes is {processes}, expected at least 1")
    cuda = tokenizer.device.type == "cuda"
    devices = torch.cuda.device_count() if cuda else 1
    job = _Job(tokenizer, images, views, Path(out), captions, workers, dtype)
    plan = job.plan(shard_size, batch_size, processes=math.ceil(processes / devices))
    plan = _begin(job.out, plan, batch_size, overwrite=overwrite, alone=True)
    targets = [f"cuda:{i % devices}" if cuda else tokenizer.device.type for i in range(processes)]
    # Through the memory of the CPU: a device's cannot be handed to every kind of process.
    job = dataclasses.replace(job, tokenizer=copy.deepcopy(tokenizer).cpu())
    threads = max(1, torch.get_num_threads() // processes)
    count = 0
    with _bar(job.out, plan, range(plan.shards), shown=progress) as bar:
        start = time.perf_counter()
        shares = [range(i, plan.shards, processes) for i in range(processes)]
        arguments = [
            (job, plan, share, target, threads)
            for share, target in zip(shares, targets, strict=True)
        ]
        with contextlib.closing(_run_children(arguments)) as reports:
            for done in reports:
                count += done
                bar.update(done)
        seconds = time.perf_counter() - start
    return Extraction(store=_complete(job.out, plan), images=count, seconds=seconds)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One extraction, as it is sent to the processes that share it."""

    tokenizer: ImageTokenizer
    images: ImageCollection
    views: Views
    out: Path
    captions: Sequence[str] | None
    workers: int
    dtype: torch.dtype

    def plan(self, shard_size: int, batch_size: int | None, *, processes: int) -> StorePlan:
        """What the store shall hold; ``processes`` share the memory."""
        if self.tokenizer.dtype != torch.float32:
            raise InputError(
                f"the tokenizer's weights are {self.tokenizer.dtype}, but it is known by those in "
                f"float32; load it so, and name the precision of encoding (dtype)"
            )
        if self.captions is not None and len(self.captions) != len(self.images):
            raise InputError(
                f"there are {len(self.captions)} captions for {len(self.images)} images; give one "
                f"for each"
            )
        config = self.tokenizer.config
        grid = config.grid_of(self.views.height, self.views.width)
        if batch_size is None:
            fitting = decoding_batch_size(
                config, grid, device=self.tokenizer.device, dtype=self.dtype
            )
            if self.tokenizer.device.type == "cpu":
                fitting = min(fitting, _CPU_BATCH)
            batch_size = max(1, fitting // processes)
        return StorePlan(
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            tokenizer_config=config,
            grid=grid,
            codebook_size=config.codebook_size,
            dtype=_code_dtype(config.codebook_size),
            precision=str(self.dtype).removeprefix("torch."),
            views=StoreViews(
                kind=self.views.kind,
                count=len(self.views),
                height=self.views.height,
                width=self.views.width,
                ranges=TEN_CROP_RANGES if self.views.kind.endswith("-crop") else (),
            ),
            source_digest=source_digest(self.images, self.captions),
            source_images=len(self.images),
            shard_size=shard_size,
            labelled=self.images.labels is not None,
            captioned=self.captions is not None,
            class_names=self.images.class_names,
            batch_size=batch_size,
        )

    def shard_maker(self, plan: StorePlan) -> _MakeShard:
        """Encodes the images of a shard."""
        encoder = self.tokenizer
        if encoder.dtype != self.dtype or encoder.training:
            encoder = copy.deepcopy(encoder).to(self.dtype).eval()

        def make(numbers: range, report: Report) -> _Shard:
            return _encode(encoder, self, plan, numbers, report)

        return make


@dataclasses.dataclass(frozen=True)
class _Shard:
    """The content of a shard."""

    codes: np.ndarray
    """(n, V, rows, columns)"""
    keys: list[str]
    labels: list[int] | None
    captions: list[str] | None
    skipped: list[tuple[str, str]]


_MakeShard = Callable[[range, Report], _Shard]


@torch.inference_mode()
def _encode(
    encoder: ImageTokenizer, job: _Job, plan: StorePlan, numbers: range, report: Report
) -> _Shard:
    images = job.images
    codes = np.empty((len(numbers), plan.views.count, *plan.grid), dtype=plan.dtype)
    read: list[int] = []
    skipped: list[tuple[str, str]] = []
    per_batch = max(1, plan.batch_size // plan.views.count)
    for batch in image_views(
        images, job.views, batch_size=per_batch, workers=job.workers, indices=numbers
    ):
        for error in batch.skipped:
            _log.warning("skipped: %s", error)
            skipped.append((error.key, error.reason))
        count = len(batch.indices)
        if count > 0:
            # An image may have more views than fit at once.
            parts = batch.pixels.flatten(0, 1).split(plan.batch_size)  # (<= batch, 3, H, W)
            grids = torch.cat([_codes(encoder, part) for part in parts])  # (B * V, rows, columns)
            start = len(read)
            codes[start : start + count] = grids.unflatten(0, (count, -1)).cpu().numpy()
            read += batch.indices.tolist()
        report(count + len(batch.skipped))
    return _Shard(
        codes[: len(read)],
        [images.key(i) for i in read],
        None if images.labels is None else [int(images.labels[i]) for i in read],
        None if job.captions is None else [job.captions[i] for i in read],
        skipped,
    )


def _codes(encoder: ImageTokenizer, pixels: Tensor) -> Tensor:
    return encoder.encode(uint8_to_images(pixels.to(encoder.device)))


def _code_dtype(codebook_size: int) -> str:
    return "uint16" if codebook_size <= 2**16 else "uint32"


def source_digest(images: ImageCollection, captions: Sequence[str] | None = None) -> str:
    """A short text that changes with the names, labels and captions of images."""
    whole = hashlib.sha256(images.digest().encode())
    whole.update(json.dumps([images.class_names, images.labels, captions]).encode())
    return whole.hexdigest()[:16]


def _begin(
    out: Path, plan: StorePlan, batch_size: int | None, *, overwrite: bool, alone: bool
) -> StorePlan:
    """Writes the plan, or finds the same one in the folder.

    Returns:
        The plan to follow: with the batch size of the first run unless another was asked for.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give --out a folder")
    storage.require_writable(out)
    path = out / PLAN_NAME
    # Hidden: what a killed process left behind.
    others = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")]
    if path.exists():
        _check_same(out, read_plan_file(StorePlan, path), plan, overwrite=overwrite, alone=alone)
    elif others:
        raise InputError(
            f"{out} is not empty and holds no store of codes (but {min(others)}); "
            f"give --out an empty folder"
        )
    if not path.exists():
        _write_first(path, plan)
    begun = read_plan_file(StorePlan, path)
    if begun.identity != plan.identity:
        raise InputError(f"another process has just begun another store in {out}; choose another")
    return begun if batch_size is None else dataclasses.replace(begun, batch_size=batch_size)


def _check_same(
    out: Path, begun: StorePlan, plan: StorePlan, *, overwrite: bool, alone: bool
) -> None:
    """Deletes a store of another plan if that was asked for, else refuses it."""
    if begun.identity == plan.identity:
        return
    found = f"the store in {out} was begun with {_difference(begun, plan)}"
    if not overwrite:
        raise InputError(f"{found}; restore that, give another --out, or --overwrite it")
    if not alone:
        raise InputError(
            f"{found}, and processes that start at the same time cannot overwrite it; "
            f"delete {out} first"
        )
    _delete(out)


def _write_first(path: Path, plan: StorePlan) -> None:
    """Writes the plan, unless another process was faster."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_plan_file(staging, plan)
    try:
        # Unlike a renaming, this fails if the file exists.
        os.link(staging, path)
    except FileExistsError:
        pass
    except OSError:
        # A file system without links.
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


_WORDS = {
    "tokenizer_fingerprint": "another image tokenizer",
    "source_digest": "other images, labels or captions",
    "views": "other views",
    "shard_size": "another shard size",
    "precision": "another precision",
}
"""Fields of a plan in words, the most telling first."""


def _difference(begun: StorePlan, plan: StorePlan) -> str:
    for field, words in _WORDS.items():
        before, now = getattr(begun, field), getattr(plan, field)
        if before != now:
            if isinstance(before, StoreViews):
                before, now = (
                    f"{views.kind}, {views.count} of {views.width}x{views.height}"
                    for views in (before, now)
                )
            return f"{words} ({before}, now {now})"
    return "other settings"


def _delete(out: Path) -> None:
    """Removes a store, and nothing else that may lie in its folder."""
    # The manifest first, the plan last: whatever is left by a kill is no complete store, but
    # still known as one.
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for pattern in ("shard-*.json", "shard-*.npy", ".shard-*.tmp", SKIPPED_NAME, PLAN_NAME):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def _bar(out: Path, plan: StorePlan, shards: Iterable[int], *, shown: bool) -> tqdm[NoReturn]:
    """A bar over the image files of some shards, which starts at those that are done."""
    sizes = {shard: len(plan.images_of(shard)) for shard in shards}
    return tqdm(
        total=sum(sizes.values()),
        initial=sum(size for shard, size in sizes.items() if _is_done(out, plan, shard)),
        desc="encoding",
        unit="image",
        # None: no bar where stderr is not a terminal.
        disable=None if shown else True,
    )


def _is_done(out: Path, plan: StorePlan, shard: int) -> bool:
    """Whether the shard is there and whole; a damaged one is made anew."""
    try:
        sidecar = read_sidecar(out, plan, shard)
        check_shard(out, plan, shard, images=len(sidecar.keys))
    except (InputError, FileNotFoundError):
        return False
    return True


def _write_shards(
    plan: StorePlan, out: Path, shards: Iterable[int], make: _MakeShard, report: Report
) -> int:
    """Makes the shards that are not done; returns how many image files that took."""
    count = 0
    for shard in shards:
        if _is_done(out, plan, shard):
            continue
        numbers = plan.images_of(shard)
        content = make(numbers, report)
        used = np.zeros(plan.codebook_size, dtype=bool)
        used[content.codes] = True
        sidecar = Sidecar(
            plan=plan.identity,
            keys=tuple(content.keys),
            labels=None if content.labels is None else tuple(content.labels),
            captions=None if content.captions is None else tuple(content.captions),
            skipped=tuple(content.skipped),
            used=np.packbits(used).tobytes().hex(),
        )
        with storage.atomic_file(shard_path(out, shard)) as temporary:
            write_npy(temporary, content.codes)
        storage.write_json(sidecar_path(out, shard), config_to_dict(sidecar))
        count += len(numbers)
    return count


def _complete(out: Path, plan: StorePlan) -> CodeStore | None:
    """Writes the manifest if all shards are there; several processes may do so at once.

    Raises:
        InputError: not one image could be read.
    """
    if not all(_is_done(out, plan, shard) for shard in range(plan.shards)):
        return None
    counts: list[int] = []
    skipped: list[tuple[str, str]] = []
    used = np.zeros(plan.codebook_size, dtype=bool)
    classes = 0
    for shard in range(plan.shards):
        sidecar = read_sidecar(out, plan, shard)
        counts.append(len(sidecar.keys))
        skipped += sidecar.skipped
        bits = np.frombuffer(bytes.fromhex(sidecar.used), dtype=np.uint8)
        used |= np.unpackbits(bits, count=plan.codebook_size).astype(bool)
        classes = max(classes, 1 + max(sidecar.labels or (-1,)))
    if sum(counts) == 0:
        file, reason = skipped[0]
        raise InputError(
            f"none of the {len(skipped)} files could be read: {file} ({reason}); repair them, "
            f"and give another --out"
        )
    if skipped:
        lines = [f"{file}\t{reason}\n" for file, reason in skipped]
        storage.write_text(out / SKIPPED_NAME, "".join(lines))
    names = plan.class_names or (Labels.numbered(classes).names if plan.labelled else ())
    manifest = Manifest(
        plan=read_plan_file(StorePlan, out / PLAN_NAME),
        images=sum(counts),
        skipped=len(skipped),
        shards=tuple(counts),
        class_names=names,
        codes_used=int(used.sum()),
        llamagen=importlib.metadata.version("llamagen"),
    )
    write_plan_file(out / MANIFEST_NAME, manifest)
    # Every shard is done, so these belong to nobody.
    for path in out.glob(".shard-*.tmp"):
        path.unlink(missing_ok=True)
    return CodeStore.open(out)


def _run_children(
    arguments: Sequence[tuple[_Job, StorePlan, range, str, int]],
) -> Generator[int, None, None]:
    """Runs ``_child`` in a process for each of ``arguments``; yields what they report.

    If one fails or dies, the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    children: dict[Connection, SpawnProcess] = {}
    try:
        for values in arguments:
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(theirs, *values))
            child.start()
            children[ours] = child
            # The child's copy is then the only one: when it dies, reading ends.
            theirs.close()
        running = set(children)
        while running:
            for connection in multiprocessing.connection.wait(list(running)):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except EOFError:
                    running.discard(connection)
                    _check_end(children[connection])
                    continue
                if isinstance(message, Exception):
                    raise message
                yield message
    finally:
        for child in children.values():
            child.terminate()
        for connection, child in children.items():
            child.join()
            connection.close()


def _check_end(child: SpawnProcess) -> None:
    child.join()
    if child.exitcode != 0:
        number = child.exitcode or 0
        cause = f"signal {signal.Signals(-number).name}" if number < 0 else f"status {number}"
        if number == -signal.SIGKILL:
            cause += ", most often for want of memory"
        raise ChildProcessError(
            f"a process of the extraction ended ({cause}); run the same command again, "
            f"it goes on where it stopped"
        )


def _child(
    connection: Connection, job: _Job, plan: StorePlan, shards: range, device: str, threads: int
) -> None:
    """Makes some shards; sends counts, or the exception that ended it."""
    # Ctrl-C reaches every process of the terminal; the parent ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        job.tokenizer.to(find_device(device))
        _write_shards(plan, job.out, shards, job.shard_maker(plan), connection.send)
    except (InputError, OSError) as error:
        connection.send(error)


def keep_freed_memory() -> None:
    """Lets this process keep the memory of tensors that are freed, for those that come next.

    glibc hands blocks of more than 32 MB back to the system at once, and gets the next one page
    by page: on a CPU, a fifth of the time that encoding takes. For a process that does little
    else; elsewhere than on glibc, nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _end_with_parent() -> None:
    """A process whose parent was killed would go on for hours, unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def import_published(
    tokenizer: ImageTokenizer,
    root: Path | str,
    out: Path | str,
    *,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    progress: bool = True,
) -> Extraction:
    """Makes a store of codes in the published layout (``export_published``).

    Damaged files are skipped as damaged images are; an interrupted import goes on.

    Args:
        tokenizer: the one that made the codes, with its weights in float32. Only that the codes
            lie within its codebook can be checked.
        root: folder with the two folders, or the one with codes.
        out: folder of the store.
        shard_size: images to a shard.
        overwrite: delete a store of something else first.
        progress: show a bar, if there is a terminal.

    Raises:
        FileNotFoundError: there are no such folders, or a label is missing.
        InputError: the files do not hold codes of this tokenizer, or ``out`` something else.
    """
    out = Path(out)
    source = _Published.find(Path(root), tokenizer.config.codebook_size)
    config = tokenizer.config
    rows, columns = source.grid
    plan = StorePlan(
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        tokenizer_config=config,
        grid=source.grid,
        codebook_size=config.codebook_size,
        dtype=_code_dtype(config.codebook_size),
        precision="unknown",
        views=StoreViews(
            kind="published",
            count=source.views,
            height=rows * config.downsampling,
            width=columns * config.downsampling,
        ),
        source_digest=source.digest(),
        source_images=len(source.numbers),
        shard_size=shard_size,
        labelled=source.labels is not None,
        captioned=False,
        class_names=(),
        batch_size=1,
    )
    plan = _begin(out, plan, None, overwrite=overwrite, alone=True)
    shards = range(plan.shards)
    with _bar(out, plan, shards, shown=progress) as bar:
        start = time.perf_counter()
        count = _write_shards(plan, out, shards, source.read, bar.update)
        seconds = time.perf_counter() - start
    return Extraction(store=_complete(out, plan), images=count, seconds=seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Published:
    """Two folders in the published layout."""

    codes: Path
    labels: Path | None
    numbers: tuple[int, ...]
    """Of the files, sorted."""
    views: int
    grid: tuple[int, int]
    codebook_size: int

    @classmethod
    def find(cls, root: Path, codebook_size: int) -> _Published:
        """Looks for the folders, and at the first file that is whole for the shape of the codes."""
        codes = _published_folder(root)
        labels = codes.with_name(codes.name.removesuffix("_codes") + "_labels")
        stems = {path.stem for path in codes.glob("*.npy")}
        strange = [stem for stem in stems if not stem.isdecimal()]
        if strange:
            raise InputError(
                f"{codes / min(strange)}.npy is not named by a number as the published codes are; "
                f"move it out of the folder"
            )
        numbers = tuple(sorted(map(int, stems)))
        for number in numbers:
            try:
                shape = _load_array(codes / f"{number}.npy").shape
            except _DamagedFileError:
                continue
            views, side = _published_shape(codes / f"{number}.npy", shape)
            return cls(
                codes=codes,
                labels=labels if labels.is_dir() else None,
                numbers=numbers,
                views=views,
                grid=(side, side),
                codebook_size=codebook_size,
            )
        raise InputError(
            f"none of the {len(numbers)} .npy files in {codes} can be read; give another folder"
        )

    def digest(self) -> str:
        """Changes if files are added or removed, or one of a sample has another content."""
        whole = hashlib.sha256(json.dumps([self.numbers, self.labels is not None]).encode())
        sample = self.numbers[:: max(1, len(self.numbers) // 16)]
        for number in sample:
            whole.update((self.codes / f"{number}.npy").read_bytes())
        return whole.hexdigest()[:16]

    def read(self, rows: range, report: Report) -> _Shard:
        """The content of the shard with these files."""
        codes, keys, labels, skipped = [], [], [], []
        for row in rows:
            path = self.codes / f"{self.numbers[row]}.npy"
            try:
                codes.append(self._read_codes(path))
            except _DamagedFileError as error:
                _log.warning("skipped: %s cannot be read (%s)", path, error)
                skipped.append((path.name, str(error)))
            else:
                keys.append(path.name)
                if self.labels is not None:
                    labels.append(_read_label(self.labels / path.name))
            report(1)
        stacked = np.stack(codes) if codes else np.empty((0, self.views, *self.grid))
        return _Shard(
            stacked.astype(_code_dtype(self.codebook_size)),
            keys,
            None if self.labels is None else labels,
            None,
            skipped,
        )

    def _read_codes(self, path: Path) -> np.ndarray:
        """The codes (V, rows, columns) in a file."""
        array = _load_array(path)
        views, side = _published_shape(path, array.shape)
        if (views, (side, side)) != (self.views, self.grid):
            raise InputError(
                f"{path} has {views} views of {side * side} codes, but the files before it have "
                f"{self.views} of {self.grid[0] * self.grid[1]}; keep only files of one extraction "
                f"in the folder"
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{path} holds {array.dtype}, expected integers; give another folder")
        if not (0 <= array.min() and array.max() < self.codebook_size):
            raise InputError(
                f"{path} has codes from {array.min()} to {array.max()}, but the tokenizer has "
                f"{self.codebook_size} (0 to {self.codebook_size - 1}); give --tokenizer the one "
                f"that made them"
            )
        return array.reshape(self.views, *self.grid)


def _published_folder(root: Path) -> Path:
    """The one folder of codes in or at ``root``."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; give the one with published codes")
    found = [root] if root.name.endswith("_codes") else sorted(root.glob("*_codes"))
    if not found:
        raise FileNotFoundError(
            f"there is no folder *_codes in {root}; give the folder above it, or the one itself"
        )
    if len(found) > 1:
        names = " and ".join(folder.name for folder in found)
        raise InputError(f"{root} has {names}; give one of them")
    return found[0]


def _published_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """Views, and codes along a side."""
    views = shape[1] if len(shape) == 3 else 1
    side = math.isqrt(shape[-1]) if shape else 0
    if len(shape) not in (2, 3) or shape[0] != 1 or min(views, side) < 1 or side**2 != shape[-1]:
        raise InputError(
            f"{path} has shape {shape}, expected (1, codes) or (1, views, codes) with a square "
            f"number of codes; give another folder"
        )
    return views, side


def _read_label(path: Path) -> int:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, but its codes do; restore it, or move the folder of labels "
            f"away"
        )
    try:
        label = _load_array(path)
    except _DamagedFileError as error:
        raise InputError(f"{path} is damaged ({error}); restore it") from error
    if label.size != 1 or not np.issubdtype(label.dtype, np.integer) or label.min() < 0:
        raise InputError(f"{path} holds {label.dtype} {label.shape}, expected one label from 0 on")
    return int(label.reshape(()))


class _DamagedFileError(Exception):
    """An .npy file that is not a whole array; the message is the reason."""


def _load_array(path: Path) -> np.ndarray:
    # Read here, so that a fault of the disk or network is not taken for a damaged file.
    content = path.read_bytes()
    try:
        array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split()) or "damaged"
        raise _DamagedFileError(reason) from error
    return array
