"""Encoding images into a store of codes, in one process or several.

Shapes: B images, V views of an image, n images of a shard, rows x columns codes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import math
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamagen.backends.cpu.convolution import accelerate
from llamagen.data.collection import ImageCollection
from llamagen.data.loader import image_views
from llamagen.data.processes import become_child, run_children
from llamagen.data.store import (
    StorePlan,
    StoreViews,
)
from llamagen.data.store_writer import (
    SHARD_SIZE,
    Extraction,
    MakeShard,
    Report,
    Shard,
    begin,
    code_dtype,
    complete,
    progress_bar,
    write_shards,
)
from llamagen.data.views import Views
from llamagen.generation.memory import decoding_batch_size
from llamagen.models.tokenizer import ImageTokenizer, uint8_to_images
from llamagen.support.devices import find_device
from llamagen.support.errors import InputError

_CPU_BATCH = 16
"""Larger batches gain nothing on a CPU."""

_log = logging.getLogger(__name__)


def extract_store(
    tokenizer: ImageTokenizer,
    images: ImageCollection,
    views: Views,
    out: Path | str,
    *,
    shard_size: int = SHARD_SIZE,
    batch_size: int | None = None,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
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
        shard_size: images to a shard.
        batch_size: views encoded at once; by default as many as fit into memory.
        workers: processes that read images for this one.
        dtype: precision to encode with.
        compiled: let torch.compile fuse what it can: half a minute to begin with, then faster for
            small tokenizers and on a GPU.
        rank: this process makes every ``world_size``-th shard, from this one on.
        world_size: processes that work on the store.
        overwrite: delete a store of other images, views, or tokenizer first.
        progress: show a bar, if there is a terminal.

    Raises:
        InputError: the folder holds something else, the size does not fit the tokenizer, or no
            image can be read.
        OSError: the disk is full, or an image file cannot be reached.
    """
    job = _Job(tokenizer, images, views, Path(out), workers, dtype, compiled)
    plan = job.plan(shard_size, batch_size, processes=world_size)
    plan = begin(job.out, plan, batch_size, overwrite=overwrite, alone=world_size == 1)
    shards = range(rank, plan.shards, world_size)
    with progress_bar(job.out, plan, shards, shown=progress) as bar:
        start = time.perf_counter()
        count = write_shards(plan, job.out, shards, job.shard_maker(plan), bar.update)
        seconds = time.perf_counter() - start
    return Extraction(store=complete(job.out, plan), images=count, seconds=seconds)


def extract_in_processes(
    processes: int,
    tokenizer: ImageTokenizer,
    images: ImageCollection,
    views: Views,
    out: Path | str,
    *,
    shard_size: int = SHARD_SIZE,
    batch_size: int | None = None,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
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
    job = _Job(tokenizer, images, views, Path(out), workers, dtype, compiled)
    plan = job.plan(shard_size, batch_size, processes=math.ceil(processes / devices))
    plan = begin(job.out, plan, batch_size, overwrite=overwrite, alone=True)
    targets = [f"cuda:{i % devices}" if cuda else tokenizer.device.type for i in range(processes)]
    # Through the memory of the CPU: a device's cannot be handed to every kind of process.
    job = dataclasses.replace(job, tokenizer=copy.deepcopy(tokenizer).cpu())
    threads = max(1, torch.get_num_threads() // processes)
    count = 0
    with progress_bar(job.out, plan, range(plan.shards), shown=progress) as bar:
        start = time.perf_counter()
        shares = [range(i, plan.shards, processes) for i in range(processes)]
        arguments = [
            (job, plan, share, target, threads)
            for share, target in zip(shares, targets, strict=True)
        ]
        with contextlib.closing(run_children(_child, arguments)) as reports:
            for done in reports:
                count += done
                bar.update(done)
        seconds = time.perf_counter() - start
    return Extraction(store=complete(job.out, plan), images=count, seconds=seconds)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One extraction, as it is sent to the processes that share it."""

    tokenizer: ImageTokenizer
    images: ImageCollection
    views: Views
    out: Path
    workers: int
    dtype: torch.dtype
    compiled: bool

    def plan(self, shard_size: int, batch_size: int | None, *, processes: int) -> StorePlan:
        """What the store shall hold; ``processes`` share the memory."""
        if self.tokenizer.dtype != torch.float32:
            raise InputError(
                f"the tokenizer's weights are {self.tokenizer.dtype}, but it is known by those in "
                f"float32; load it so, and name the precision of encoding (dtype)"
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
            tokenizer_fingerprint=self.tokenizer.fingerprint(),
            tokenizer_config=config,
            grid=grid,
            codebook_size=config.codebook_size,
            dtype=code_dtype(config.codebook_size),
            precision=str(self.dtype).removeprefix("torch."),
            views=StoreViews(
                kind=self.views.kind,
                count=len(self.views),
                height=self.views.height,
                width=self.views.width,
                ranges=self.views.crop_ranges if self.views.kind.endswith("-crop") else (),
            ),
            source_digest=source_digest(self.images),
            source_images=len(self.images),
            shard_size=shard_size,
            labelled=self.images.labels is not None,
            captioned=self.images.captions is not None,
            class_names=self.images.class_names,
            batch_size=batch_size,
        )

    def shard_maker(self, plan: StorePlan) -> MakeShard:
        """Encodes the images of a shard."""
        encoder = accelerate(self.tokenizer)
        if encoder.dtype != self.dtype or encoder.training:
            encoder = copy.deepcopy(encoder).to(self.dtype).eval()
        if self.compiled:
            encoder = encoder if encoder is not self.tokenizer else copy.deepcopy(encoder)
            encoder.encoder.compile()

        def make(numbers: range, report: Report) -> Shard:
            return _encode(encoder, self, plan, numbers, report)

        return make


@torch.inference_mode()
def _encode(
    encoder: ImageTokenizer, job: _Job, plan: StorePlan, numbers: range, report: Report
) -> Shard:
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
    return Shard(
        codes[: len(read)],
        [images.key(i) for i in read],
        None if images.labels is None else [int(images.labels[i]) for i in read],
        None if images.captions is None else [images.captions[i] for i in read],
        skipped,
    )


def _codes(encoder: ImageTokenizer, pixels: Tensor) -> Tensor:
    return encoder.encode(uint8_to_images(pixels.to(encoder.device)))


def source_digest(images: ImageCollection) -> str:
    """A short text that changes with the names, labels and captions of images."""
    whole = hashlib.sha256(images.digest().encode())
    whole.update(json.dumps([images.class_names, images.labels, images.captions]).encode())
    return whole.hexdigest()[:16]


def _child(
    connection: Connection, job: _Job, plan: StorePlan, shards: range, device: str, threads: int
) -> None:
    """Makes some shards; sends counts, or the exception that ended it."""
    become_child(threads)
    try:
        job.tokenizer.to(find_device(device))
        write_shards(plan, job.out, shards, job.shard_maker(plan), connection.send)
    except (InputError, OSError) as error:
        connection.send(error)
