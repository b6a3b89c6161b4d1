"""Making of stores of codes: encoding of images, in one process or several.

Shapes: B images, V views of an image, n images of a shard, rows x columns codes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llamagen.support.storage as storage
from llamagen.backends.cpu.convolution import accelerate
from llamagen.config import TokenizerConfig, config_from_dict, config_to_dict
from llamagen.data.captions import Captions, write_captions
from llamagen.data.images import ImageCollection
from llamagen.data.loader import image_views
from llamagen.data.store import (
    SHARD_SIZE,
    SKIPPED_NAME,
    CodeStore,
    StorePlan,
    StoreViews,
    shard_infos,
    store_artifact,
)
from llamagen.data.views import Views
from llamagen.generation.memory import decoding_batch_size
from llamagen.models.tokenizer import ImageTokenizer, uint8_to_images
from llamagen.support import distributed
from llamagen.support.artifact import Advance, Artifact, MakePiece
from llamagen.support.devices import dtype_name, find_device, keep_freed_memory
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

_CPU_BATCH = 16
"""Larger batches gain nothing on a CPU."""
_MISSING = {"tokenizer_config": config_to_dict(TokenizerConfig())}
"""Settings that older stores lack."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """Result of ``make_store``."""

    store: CodeStore | None
    """None if other processes have not finished their shards."""
    images: int
    """Number of image files that this call processed."""
    seconds: float


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
    processes: int = 1,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> Extraction:
    """Encode all views of all readable images into a store; existing shards are kept.

    Args:
        tokenizer: with weights in float32, of which its fingerprint is made.
        images: with or without labels.
        views: those of each image.
        out: folder of the store; new, empty, or begun with the same arguments.
        shard_size: images of a shard.
        batch_size: views encoded at once; by default as many as fit into memory.
        workers: processes that read images, for each process that encodes.
        dtype: precision to encode with.
        compiled: use torch.compile: half a minute, then small tokenizers are faster on a GPU.
        processes: number to start for encoding; they get CUDA devices in turn, or share threads.
        rank: number of this process, which makes every ``world_size``-th shard.
        world_size: processes that work on the store and were not started here.
        overwrite: delete a store of other images, views or tokenizer first.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: the folder holds something else, the size does not fit, or no image is readable.
        ChildProcessError: a process died, for example out of memory; the others were ended.
        OSError: the disk is full, or an image file cannot be reached.
    """
    if processes < 1:
        raise InputError(f"the number of processes is {processes}, expected at least 1")
    devices = torch.cuda.device_count() if tokenizer.device.type == "cuda" else 1
    sharing = math.ceil(max(processes, world_size) / devices)
    job = _Job(tokenizer, images, views, batch_size, workers, dtype, compiled)
    with distributed.main_first():
        plan = job.plan(shard_size, processes=sharing)
    artifact = store_artifact(out, config_to_dict(plan), rank, world_size)

    def make(advance: Advance) -> int:
        if processes > 1:
            return _make_in_processes(processes, job, artifact, advance)
        return artifact.make(job.shard_maker(artifact), advance)

    return make_store(artifact, make, "encoding", overwrite=overwrite, progress=progress)


def make_store(
    artifact: Artifact,
    make: Callable[[Advance], int],
    description: str,
    *,
    overwrite: bool,
    progress: bool,
) -> Extraction:
    """Make a store; ``make`` makes its missing shards and returns their number of images."""
    # Older stores do not say what the content was.
    missing = {**_MISSING, "content_digest": artifact.settings["content_digest"]}
    with (
        artifact.begin(overwrite=overwrite, missing=missing),
        artifact.progress_bar(description, "image", shown=progress) as bar,
    ):
        start = time.perf_counter()
        count = make(bar.update)
        seconds = time.perf_counter() - start
        return Extraction(store=_finished(artifact), images=count, seconds=seconds)


def _finished(artifact: Artifact) -> CodeStore | None:
    """Write the manifest, and return the store; None if shards of other processes are missing.

    InputError if no image is readable.
    """
    if not artifact.is_done():
        return None
    plan = config_from_dict(StorePlan, artifact.settings, str(artifact.folder))
    counts: list[int] = []
    skipped: list[tuple[str, str]] = []
    used = np.zeros(math.ceil(plan.codebook_size / 8), dtype=np.uint8)
    classes = 0
    for info in shard_infos(artifact):
        counts.append(len(info.keys))
        skipped += info.skipped
        used |= np.frombuffer(bytes.fromhex(info.used), dtype=np.uint8)
        classes = max(classes, 1 + max(info.labels or (-1,)))
    if sum(counts) == 0:
        file, reason = skipped[0]
        raise InputError(
            f"none of the {len(skipped)} files could be read: {file} ({reason}); repair them, "
            f"and choose another folder (`out`)"
        )
    if skipped:
        lines = (f"{file}\t{reason}\n" for file, reason in skipped)
        storage.write_text(artifact.folder / SKIPPED_NAME, "".join(lines))
    if plan.captioned:
        # Outside the shards: training reads captions of images in any order.
        captions = (each for info in shard_infos(artifact) for each in info.captions or ())
        write_captions(artifact.folder, captions)
    numbered = Labels.numbered(classes).names if plan.labelled else ()
    artifact.finish(
        {
            "images": sum(counts),
            "skipped": len(skipped),
            "shards": counts,
            "class_names": plan.class_names or numbered,
            "codes_used": int(np.unpackbits(used).sum()),
            "llamagen": importlib.metadata.version("llamagen"),
        }
    )
    return CodeStore.open(artifact.folder)


def shard_content(
    plan: StorePlan,
    codes: np.ndarray,
    *,
    keys: Sequence[str],
    labels: Sequence[int] | None,
    captions: Sequence[Captions] | None,
    skipped: Sequence[tuple[str, str]],
) -> Mapping[str, Any]:
    """Return the content of a shard's files (see ``ShardInfo``).

    ``codes`` are (n, V, rows, columns), of which only the first ``len(keys)`` images are there.
    """
    codes = codes[: len(keys)]
    used = np.zeros(plan.codebook_size, dtype=bool)
    used[codes] = True
    info = {
        "keys": keys,
        "labels": labels,
        "captions": captions,
        "skipped": skipped,
        "used": np.packbits(used).tobytes().hex(),
    }
    return {".npy": codes, ".json": info}


@dataclasses.dataclass(frozen=True)
class _Job:
    """An extraction, to be sent to the processes that share it."""

    tokenizer: ImageTokenizer
    images: ImageCollection
    views: Views
    batch_size: int | None
    """None for as many as fit into memory, or that of a store already begun."""
    workers: int
    dtype: torch.dtype
    compiled: bool

    def plan(self, shard_size: int, *, processes: int) -> StorePlan:
        """Return the settings of the store; ``processes`` share the memory."""
        tokenizer, images, views = self.tokenizer, self.images, self.views
        if tokenizer.dtype != torch.float32:
            raise InputError(
                f"the tokenizer's weights are {tokenizer.dtype}, expected float32; load it "
                f"so, and give the precision to encode with as `dtype`"
            )
        config, device, batch_size = tokenizer.config, tokenizer.device, self.batch_size
        grid = config.grid_of(views.height, views.width)
        if batch_size is None:
            fitting = decoding_batch_size(config, grid, device=device, dtype=self.dtype)
            fitting = min(fitting, _CPU_BATCH) if device.type == "cpu" else fitting
            batch_size = max(1, fitting // processes)
        return StorePlan.of(
            tokenizer,
            grid=grid,
            precision=dtype_name(self.dtype),
            views=StoreViews(
                kind=views.kind,
                count=len(views),
                height=views.height,
                width=views.width,
                ranges=views.crop_ranges if views.kind.endswith("-crop") else (),
            ),
            source_digest=storage.short_digest([images.digest().encode(), images.annotations()]),
            content_digest=images.content_digest(),
            source_images=len(images),
            shard_size=shard_size,
            labelled=images.labels is not None,
            captioned=images.captions is not None,
            class_names=images.class_names,
            batch_size=batch_size,
        )

    def shard_maker(self, artifact: Artifact) -> MakePiece:
        """Return the function that encodes the images of a shard."""
        encoder = accelerate(self.tokenizer)
        if encoder.dtype != self.dtype or encoder.training:
            encoder = copy.deepcopy(encoder).to(self.dtype).eval()
        if self.compiled:
            encoder = encoder if encoder is not self.tokenizer else copy.deepcopy(encoder)
            encoder.encoder.compile()
        plan = config_from_dict(StorePlan, artifact.settings, str(artifact.folder))
        return functools.partial(_encode, encoder, self, plan)


@torch.inference_mode()
def _encode(
    encoder: ImageTokenizer, job: _Job, plan: StorePlan, items: range, advance: Advance
) -> Mapping[str, Any]:
    images, size = job.images, job.batch_size or plan.batch_size
    codes = np.empty((len(items), plan.views.count, *plan.grid), dtype=plan.dtype)
    read: list[int] = []
    skipped: list[tuple[str, str]] = []
    at_once = max(1, size // plan.views.count)
    for batch in image_views(
        images, job.views, batch_size=at_once, workers=job.workers, indices=items
    ):
        for error in batch.skipped:
            _log.warning("skipped: %s", error)
            skipped.append((error.key, error.reason))
        count = len(batch.indices)
        if count > 0:
            # An image may have more views than fit at once.
            parts = batch.pixels.flatten(0, 1).split(size)  # (<= batch, 3, H, W)
            grids = [encoder.encode(uint8_to_images(part.to(encoder.device))) for part in parts]
            start = len(read)
            codes[start : start + count] = (
                torch.cat(grids).unflatten(0, (count, -1)).cpu().numpy()  # (B, V, rows, columns)
            )
            read += batch.indices.tolist()
        advance(count + len(batch.skipped))
    return shard_content(
        plan,
        codes,
        keys=[images.key(i) for i in read],
        labels=None if images.labels is None else [int(images.labels[i]) for i in read],
        captions=None if images.captions is None else [images.captions[i] for i in read],
        skipped=skipped,
    )


def _make_in_processes(processes: int, job: _Job, artifact: Artifact, advance: Advance) -> int:
    device = job.tokenizer.device.type
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    # In the CPU's memory: that of a device cannot be sent to every kind of process.
    job = dataclasses.replace(job, tokenizer=copy.deepcopy(job.tokenizer).cpu())
    threads = max(1, torch.get_num_threads() // processes)
    arguments = []
    for rank in range(processes):
        share = dataclasses.replace(artifact, rank=rank, world_size=processes)
        target = f"cuda:{rank % gpus}" if gpus else device
        arguments.append((job, share, target, threads))
    count = 0
    with contextlib.closing(run_children(_child, arguments)) as reports:
        for done in reports:
            count += done
            advance(done)
    return count


def _child(
    connection: Connection, job: _Job, artifact: Artifact, device: str, threads: int
) -> None:
    """Make some shards; send the numbers of images done, or an exception."""
    # Ctrl-C reaches every process of the terminal; the parent ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        job.tokenizer.to(find_device(device))
        artifact.make(job.shard_maker(artifact), connection.send)
    except (InputError, OSError) as error:
        connection.send(error)


def run_children(
    target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]
) -> Generator[int, None, None]:
    """Run ``target`` in a process for each of ``arguments``; yield the integers that they send.

    Its first argument is a connection, through which it sends integers or an exception. If one
    process fails or dies, the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    children: dict[Connection, SpawnProcess] = {}
    try:
        for values in arguments:
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=target, args=(theirs, *values))
            child.start()
            children[ours] = child
            # With the child's copy as the only one, reading ends when the child dies.
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
    if number := child.exitcode:
        cause = f"signal {signal.Signals(-number).name}" if number < 0 else f"status {number}"
        if number == -signal.SIGKILL:
            cause += ", probably out of memory"
        raise ChildProcessError(
            f"a process of the extraction ended ({cause}); run the same command again, "
            f"it goes on where it stopped"
        )


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
