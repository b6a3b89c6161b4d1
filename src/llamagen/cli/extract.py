"""``llamagen extract-codes`` and ``extract-text``: stores that the transformer learns from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llamagen.cli.options import DeviceOptions, require_at_least
from llamagen.config import TextConfig
from llamagen.data.columns import SourceConfig
from llamagen.data.views import TEN_CROP_RANGES, ViewKind
from llamagen.support.errors import InputError
from llamagen.support.launch import Launch, own_device

if TYPE_CHECKING:
    from llamagen.data.captions import Captions
    from llamagen.data.extraction import Extraction

_TEXT = TextConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes(DeviceOptions):
    """Encode images into a store of codes, once, for the transformer to learn from.

    The same command again goes on where it stopped.
    """

    images: tyro.conf.Positional[str | None] = None
    """Folder with images, with a subfolder for each class or a table (metadata.csv,
    metadata.jsonl) or neither; Parquet or tar files, as a folder, file or pattern; or a data set
    on the hub, hf:owner/name."""
    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    tokenizer: Annotated[str, tyro.conf.arg(aliases=["-t"])] = "vq-16"
    """Published name (vq-16, vq-8), folder, checkpoint file or hub repository."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("codes")
    """Folder of the store."""
    size: int = 256
    """Height of the images in pixels, and their width unless that is given."""
    width: int | None = None
    """Width of the images, if they are not square."""
    views: ViewKind = "ten-crop"
    """Views of each image: the centre; it and its mirror image; the corners and the
    middle (5 views for each of the crop ranges); or those and their mirror images (10 for each)."""
    crop_ranges: tuple[float, ...] = TEN_CROP_RANGES
    """How many times the size are the images that five or ten crops are cut from; as published,
    two of them: 20 views with ten crops."""
    shard_size: int = 4096
    """Images to a shard of the store."""
    batch_size: int | None = None
    """Views encoded at once. Default: as many as fit into memory."""
    processes: int = 1
    """Processes that encode; on several GPUs, one for each. Under torchrun, its own count."""
    compile: bool = False
    """Compile the encoder: half a minute at first, then faster on a GPU and, if small, on a CPU."""
    workers: int | None = None
    """Processes that read images, for each that encodes. Default: 0 on a CPU, else up to 8."""
    overwrite: bool = False
    """Delete a store of other images, views or tokenizer that is in the output folder."""
    export_published: Path | None = None
    """Write the store in the published layout too, one .npy per image, into this folder."""
    from_published: Path | None = None
    """Instead of encoding images, make the store of codes in the published layout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(DeviceOptions):
    """Encode captions into a store of text features, once, for the transformer to learn from.

    The same command again goes on where it stopped; under torchrun the processes share the work.
    """

    captions: tyro.conf.Positional[str]
    """Images with captions: a folder with a table (metadata.csv, metadata.jsonl), Parquet or tar
    files, a data set on the hub, hf:owner/name; or a store of their codes (extract-codes)."""
    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    text_encoder: str = _TEXT.encoder
    """Text encoder of the T5 family: hub repository or folder."""
    text_length: int = _TEXT.max_length
    """Tokens of a caption that are read."""
    clean_captions: bool = _TEXT.clean
    """Clean captions as those that the published models were trained with."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("text")
    """Folder of the store."""
    shard_size: int = 8192
    """Captions to a shard of the store."""
    tokens_at_once: int = 4096
    """Tokens that are encoded at once."""


def run(options: Codes | Text) -> None:
    """Extract or import, export if asked to, and report."""
    if isinstance(options, Text):
        _extract_text(options)
        return
    _check(options)
    if options.images is not None or options.from_published is not None:
        _report_codes(_extract_codes(options), options.out)
    if options.export_published is not None:
        from llamagen.data.published_codes import export_published
        from llamagen.data.store import CodeStore

        count = export_published(CodeStore.open(options.out), options.export_published)
        print(f"{count} images exported in the published layout")
        print(options.export_published)


def _check(options: Codes) -> None:
    if options.images is not None and options.from_published is not None:
        raise InputError("give either a folder of images or --from-published, not both")
    if options.images is None and options.from_published is None and not options.export_published:
        raise InputError("no images were named; give a folder, files, or hf:owner/name")
    if options.source.streaming:
        raise InputError("codes are extracted from whole data sets; leave --streaming out")
    require_at_least(1, options, "size", "width", "shard_size", "batch_size", "processes")
    require_at_least(0, options, "workers")
    if Launch.current().world_size > 1:
        if options.processes > 1:
            raise InputError("torchrun starts the processes already; leave --processes out")
        if options.from_published is not None or options.export_published is not None:
            flags = "--from-published and --export-published"
            raise InputError(f"{flags} need one process; run them without torchrun")


def _extract_codes(options: Codes) -> Extraction:
    """Encode the images, or import codes in the published layout."""
    from llamagen.data.sources import open_images
    from llamagen.data.views import Views

    height, width = options.size, options.width or options.size
    views = Views(height=height, width=width, kind=options.views, crop_ranges=options.crop_ranges)
    images = None if options.images is None else open_images(options.images, options.source)

    import torch

    from llamagen.checkpoints import load_tokenizer
    from llamagen.data.extraction import extract_store
    from llamagen.data.published_codes import import_published
    from llamagen.support.devices import keep_freed_memory

    device, dtype = options.resolve()
    launch = Launch.current()
    device = own_device(device, launch)
    # float32 whatever it encodes with: a tokenizer is known by these weights.
    tokenizer = load_tokenizer(options.tokenizer, device=device, dtype=torch.float32)
    store: dict[str, Any] = {"shard_size": options.shard_size, "overwrite": options.overwrite}
    if images is None:
        assert options.from_published is not None
        return import_published(tokenizer, options.from_published, options.out, **store)
    workers = options.workers
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    keep_freed_memory()
    return extract_store(
        tokenizer,
        images,
        views,
        options.out,
        batch_size=options.batch_size,
        workers=workers,
        dtype=dtype,
        compiled=options.compile,
        processes=options.processes,
        rank=launch.rank,
        world_size=launch.world_size,
        progress=launch.rank == 0,
        **store,
    )


def _report_codes(done: Extraction, out: Path) -> None:
    speed = f", {done.images / done.seconds:.1f} images/s" if done.images else ""
    if done.store is None:
        print(f"{done.images} images done{speed}; other processes are still at work")
        return
    manifest = done.store.manifest
    plan = manifest.plan
    print(
        f"{manifest.images} images x {plan.views.count} views of {plan.grid[0]}x{plan.grid[1]} "
        f"codes in {len(manifest.shards)} shards{speed}; {manifest.codes_used} of "
        f"{plan.codebook_size} codes used ({done.store.codebook_usage:.1%})"
    )
    if manifest.skipped:
        print(f"{manifest.skipped} files could not be read; see {out / 'skipped.txt'}")
    print(out)


def _extract_text(options: Text) -> None:
    require_at_least(1, options, "shard_size", "tokens_at_once")
    if options.source.streaming:
        raise InputError("features are extracted from whole data sets; leave --streaming out")
    captions = _captions(options)

    import torch

    from llamagen.text.encoder import TextEncoder
    from llamagen.text.features import extract_text

    device, dtype = options.resolve()
    launch = Launch.current()
    config = TextConfig(
        encoder=options.text_encoder, max_length=options.text_length, clean=options.clean_captions
    )
    # float16 overflows in T5.
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    done = extract_text(
        TextEncoder.from_pretrained(config, device=own_device(device, launch), dtype=dtype),
        captions,
        options.out,
        shard_size=options.shard_size,
        tokens_at_once=options.tokens_at_once,
        rank=launch.rank,
        world_size=launch.world_size,
        progress=launch.rank == 0,
    )
    speed = f", {done.captions / done.seconds:.1f} captions/s" if done.captions else ""
    if done.store is None:
        print(f"{done.captions} captions done{speed}; other processes are still at work")
        return
    manifest, count = done.store.manifest, len(done.store)
    print(
        f"{count} different captions of {manifest.tokens / count:.1f} tokens each, up to "
        f"{manifest.longest}{speed}"
    )
    if manifest.empty:
        print(f"{manifest.empty} captions were empty once cleaned; they have no features")
    print(options.out)


def _captions(options: Text) -> list[str]:
    """Return all captions of the source."""
    from llamagen.data.sources import open_images
    from llamagen.data.store import FORMAT, CodeStore

    found: Sequence[Captions] | None
    if FORMAT.is_in(options.captions):
        store = CodeStore.open(options.captions)
        found = store.captions(range(len(store)))
    else:
        found = open_images(options.captions, options.source, labelled=False).captions
    if found is None:
        raise InputError(
            f"the images in {options.captions} have no captions; add a metadata.csv with the "
            f"columns file_name and text, or name the column of captions with --caption-columns"
        )
    return [caption.text for each in found for caption in each]
