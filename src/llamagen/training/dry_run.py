"""A recipe tried without writing anything: its size, its data, and two measured steps.

No image is encoded and nothing is downloaded: the transformer's steps are taken on random codes,
and random weights of the same size stand in for published ones.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import llamagen.checkpoints as checkpoints
from llamagen.checkpoints.names import find_public
from llamagen.config import TextConfig, TokenizerConfig, TransformerConfig
from llamagen.data.captions import Caption
from llamagen.data.images import ImageCollection, ImageFolder
from llamagen.data.live_codes import MemoryCodes
from llamagen.data.loader import DataOrder
from llamagen.data.store import CodeStore
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support import distributed
from llamagen.support.devices import find_device, free_memory
from llamagen.support.errors import InputError
from llamagen.training import data as run_data
from llamagen.training.config import LoopConfig, Recipe, TokenizerTraining, TransformerTraining
from llamagen.training.loop import time_steps
from llamagen.training.parallel import require_shares
from llamagen.training.run_folder import open_run
from llamagen.training.task import Task
from llamagen.training.tokenizer_task import TokenizerTask
from llamagen.training.transformer_start import Start, TextSide, find_start
from llamagen.training.transformer_task import TransformerTask

_STEPS = 2
_CAPTION_TOKENS = 24
_BYTES = 4
"""Of a weight, which is float32 in training."""
_GB = 1e9

_Data = tuple[str, int | None]
"""Description of the data, and its number of images, if that is known."""


def dry_run(recipe: Recipe) -> None:
    """Print what ``recipe`` amounts to, then take two of its steps. All processes call it.

    FileNotFoundError if a folder is missing; InputError if data, processes or memory do not fit it.
    """
    with distributed.process_group(recipe.loop.device), tempfile.TemporaryDirectory() as folder:
        require_shares(recipe.loop)
        recipe = open_run(recipe)  # type: ignore[type-var]  # it is of one kind or the other
        loop = dataclasses.replace(recipe.loop, trackers=())
        device = find_device(loop.device)
        # A folder for each process: they need not share a disk.
        recipe = dataclasses.replace(recipe, out=Path(folder), loop=loop)
        if isinstance(recipe, TokenizerTraining):
            data, make = _tokenizer(recipe)
        else:
            data, make = _transformer(recipe)
        # Without memory first: the model may not fit.
        with torch.device("meta"):
            _report(make(), data, loop, device)
        seconds = time_steps(make(), loop, Path(folder), steps=_STEPS)
        _say(
            f"{_STEPS} steps taken: {seconds:.2f} s a step ({loop.batch_size / seconds:.3g} "
            f"images/s), {seconds * loop.steps / 86400:.2g} days for all of them; "
            f"peak memory {_peak_memory(device) / _GB:.2f} GB"
        )


def _tokenizer(recipe: TokenizerTraining) -> tuple[_Data, Callable[[], Task]]:
    size, seed = recipe.loop.batch_size, recipe.loop.seed
    if recipe.source.streaming and recipe.data is not None:
        images = run_data.tokenizer_images(recipe)
        data: _Data = (f"streamed, {images.training.digest()}", None)
    else:
        few: ImageCollection
        if recipe.data is None:
            data, few = ("none named; two steps on noise", None), _noise(recipe)
        else:
            found = run_data.find_run_images(recipe, labelled=False)
            data, few = _counted(found), found.training.thinned(_STEPS * size)
        order = DataOrder(count=len(few), batch_size=size, seed=seed)
        images = run_data.TokenizerImages(run_data.Shuffled(few, order), few.subset([]), few)
    config = recipe.model if recipe.init is None else _tokenizer_config(recipe.init)
    # Without LPIPS, which would be downloaded.
    return data, lambda: TokenizerTask(recipe, images, ImageTokenizer(config))


def _transformer(recipe: TransformerTraining) -> tuple[_Data, Callable[[], Task]]:
    data, classes = _transformer_data(recipe)
    tokenizer = _tokenizer_config(recipe.tokenizer) if recipe.tokenizer else TokenizerConfig()
    grid, size = tokenizer.grid_of(*recipe.images.shape), tokenizer.codebook_size
    start = _start(recipe, codebook_size=size, grid=grid, class_names=classes)
    count = recipe.loop.batch_size
    codes = MemoryCodes(
        np.random.default_rng(0).integers(0, size, (count, 1, *grid)),
        labels=np.arange(count) % len(classes),
        texts=[(Caption("a caption of about usual length", 1.0),)] * count,
    )
    rows = np.arange(count)
    # It decodes nothing, so it need not be of the right size.
    stand_in = ImageTokenizer(
        TokenizerConfig(
            codebook_size=size, codebook_dim=1, base_channels=1, norm_groups=1, z_channels=1,
            channel_multipliers=(1,), encoder_blocks=1, decoder_blocks=1,
        )
    )  # fmt: skip
    return (
        (f"{data[0]}; two steps on random codes", data[1]),
        lambda: TransformerTask(start, stand_in, run_data.CodeSplits(codes, rows, codes, rows[:0])),
    )


def _transformer_data(recipe: TransformerTraining) -> tuple[_Data, tuple[str, ...]]:
    data: _Data = ("none named", None)
    names: tuple[str, ...] = ()
    if recipe.codes is not None:
        store = CodeStore.open(recipe.codes)
        data, names = (f"{len(store)} images with codes", len(store)), store.class_names
    elif recipe.data is not None:
        found = run_data.find_run_images(recipe, labelled=recipe.condition == "class")
        data, names = _counted(found), found.training.class_names
    return data, names or tuple(map(str, range(recipe.num_classes or 1000)))


def _start(recipe: TransformerTraining, **sizes: Any) -> Start:
    """Return the start of a transformer, with nothing in it that would be downloaded."""
    public = None if recipe.init is None else find_public(recipe.init)
    if public is not None and recipe.lora.lora_rank == 0:
        model: Any = public.config
        if recipe.model.order == "random":
            model = dataclasses.replace(model, order="random")
        recipe = dataclasses.replace(recipe, init=None, model=model)
    text = recipe.text
    if text.text_encoder != TextConfig().encoder or text.text_features is not None:
        return find_start(recipe, **sizes)
    text = dataclasses.replace(text, text_encoder=None)
    start = find_start(dataclasses.replace(recipe, text=text), **sizes)
    if recipe.condition == "class":
        return start
    width = TransformerConfig().text_dim
    random: Any = types.SimpleNamespace(
        width=width,
        identity="random",
        features=lambda captions: [torch.randn(_CAPTION_TOKENS, width) for _ in captions],
    )
    config = dataclasses.replace(start.config, text_dim=width)
    return dataclasses.replace(start, text=TextSide(features=random), config=config)


def _tokenizer_config(source: str) -> TokenizerConfig:
    """Return a tokenizer's architecture; that of a published one is known without its weights."""
    public = find_public(source)
    known = None if public is None else public.config
    if isinstance(known, TokenizerConfig):
        return known
    return checkpoints.load_tokenizer(source, device="meta").config


def _noise(recipe: TokenizerTraining) -> ImageFolder:
    """Return a folder of one random image."""
    folder = recipe.out / "noise"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (*recipe.images.shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0.png")
    return ImageFolder.scan(folder, labelled=False)


def _counted(images: run_data.Images) -> _Data:
    count = len(images.training)
    return f"{count} images, and {len(images.validation)} for validation", count


def _report(task: Task, data: _Data, loop: LoopConfig, device: torch.device) -> None:
    """Print everything but the steps; raise InputError if the model alone exceeds the memory."""
    processes = distributed.world_size()
    models = [model for model in (task.model, task.adversary) if model is not None]
    trained = [_weights(model, trained=True) for model in models]
    mean = trained[0] if loop.ema_decay > 0 else 0
    checkpoint = _BYTES * (sum(map(_weights, models)) + 2 * sum(trained) + mean)
    shards = (loop.shard_processes or processes) if loop.parallel == "fsdp" else 1
    needed = (checkpoint + _BYTES * sum(trained)) / shards
    description, count = data
    images = loop.steps * loop.batch_size
    epochs = "" if count is None else f", {images / count:.1f} times through the data"
    lines = {"parameters": f"{_weights(task.model):,} ({trained[0]:,} trained)"}
    if task.adversary is not None:
        lines["discriminator"] = f"{_weights(task.adversary):,} parameters"
    lines |= {
        "data": description,
        "steps": f"{loop.steps:,} of {loop.batch_size} images{epochs}",
        "processes": f"{processes}, each {loop.part_size(processes)} images at a time",
        "precision": loop.precision,
        "checkpoint": f"{checkpoint / _GB:.2f} GB on disk, {loop.keep_checkpoints} kept",
        "memory per process": f"{needed / _GB:.2f} GB and activations",
    }
    if task.flops_per_image is not None:
        tera = task.flops_per_image * loop.batch_size / 1e12
        lines["computation"] = f"{tera:.3g} TFLOP a step"
    width = max(map(len, lines))
    for name, text in lines.items():
        _say(f"{name:<{width}}  {text}")
    if needed > (free := free_memory(device)):
        raise InputError(
            f"the run needs at least {needed / _GB:.1f} GB on {device}, which has "
            f"{free / _GB:.1f} GB free; shard it over more processes with `parallel` fsdp"
        )


def _weights(model: torch.nn.Module, *, trained: bool = False) -> int:
    """Return the number of a model's weights, or of those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)
