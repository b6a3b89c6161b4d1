"""Encode captions into a store of text features, once, for the transformer to learn from.

The same command again goes on where it stopped; under torchrun the processes share the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from llamagen.cli.options import DeviceOptions, require_at_least
from llamagen.config import TextConfig
from llamagen.data.columns import SourceConfig
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from llamagen.text.features import TextExtraction

_DEFAULT = TextConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DeviceOptions):
    """Options of ``llamagen extract-text``."""

    captions: tyro.conf.Positional[str]
    """Images with captions: a folder with a table (metadata.csv, metadata.jsonl), Parquet or tar
    files, a data set on the hub, hf:owner/name; or a store of their codes (extract-codes)."""
    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    text_encoder: str = _DEFAULT.encoder
    """Text encoder of the T5 family: hub repository or folder."""
    text_length: int = _DEFAULT.max_length
    """Tokens of a caption that are read."""
    clean_captions: bool = _DEFAULT.clean
    """Clean captions as those that the published models were trained with."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("text")
    """Folder of the store."""
    shard_size: int = 8192
    """Captions to a shard of the store."""
    tokens_at_once: int = 4096
    """Tokens that are encoded at once."""


def run(options: Options) -> None:
    """Extract, and report."""
    require_at_least(1, options, "shard_size", "tokens_at_once")
    if options.source.streaming:
        raise InputError("features are extracted from whole data sets; leave --streaming out")
    texts = list(_captions(options))

    import torch

    from llamagen.support.launch import Launch, own_device
    from llamagen.text.encoder import TextEncoder
    from llamagen.text.features import extract_text

    device, dtype = options.resolve()
    launch = Launch.current()
    config = TextConfig(
        encoder=options.text_encoder, max_length=options.text_length, clean=options.clean_captions
    )
    # float16 overflows in T5.
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    encoder = TextEncoder.from_pretrained(config, device=own_device(device, launch), dtype=dtype)
    done = extract_text(
        encoder,
        texts,
        options.out,
        shard_size=options.shard_size,
        tokens_at_once=options.tokens_at_once,
        rank=launch.rank,
        world_size=launch.world_size,
        progress=launch.rank == 0,
    )
    _report(done, options.out)


def _captions(options: Options) -> Iterator[str]:
    """Yield all captions of the source."""
    from llamagen.data.store import FORMAT, CodeStore

    if FORMAT.is_in(options.captions):
        store = CodeStore.open(options.captions)
        found = store.captions(range(len(store)))
    else:
        from llamagen.data.sources import open_images

        captions = open_images(options.captions, options.source, labelled=False).captions
        found = None if captions is None else list(captions)
    if found is None:
        raise InputError(
            f"the images in {options.captions} have no captions; add a metadata.csv with the "
            f"columns file_name and text, or name the column of captions with --caption-columns"
        )
    for each in found:
        for caption in each:
            yield caption.text


def _report(done: TextExtraction, out: Path) -> None:
    speed = f", {done.captions / done.seconds:.1f} captions/s" if done.captions else ""
    if done.store is None:
        print(f"{done.captions} captions done{speed}; other processes are still at work")
        return
    manifest = done.store.manifest
    mean = manifest.tokens / len(done.store)
    print(
        f"{len(done.store)} different captions of {mean:.1f} tokens each, up to "
        f"{manifest.longest}{speed}"
    )
    if manifest.empty:
        print(f"{manifest.empty} captions were empty once cleaned; they have no features")
    print(out)
