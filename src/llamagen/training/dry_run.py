"""What a recipe would do: its size, its memory, its data, and two steps to see that it runs.

Nothing is written but a temporary folder, and no image is encoded: the transformer's two steps
are taken on random codes.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image

import llamagen.checkpoints as checkpoints
from llamagen.checkpoints.names import find_public
from llamagen.config import (
    TOKENIZER_PRESETS,
    Grid,
    TextConfig,
    TokenizerConfig,
    TransformerConfig,
    preset,
)
from llamagen.data.captions import Caption, Captions
from llamagen.data.collection import ImageCollection
from llamagen.data.images import ImageFolder
from llamagen.data.order import DataOrder
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support import distributed
from llamagen.support.devices import find_device
from llamagen.support.errors import InputError
from llamagen.training.config import LoopConfig, TokenizerTraining, TransformerTraining
from llamagen.training.loop import try_steps
from llamagen.training.parallel import require_shares
from llamagen.training.recipes import preset_model
from llamagen.training.run_folder import open_run
from llamagen.training.sources import (
    Images,
    Shuffled,
    TokenizerImages,
    find_run_images,
    tokenizer_images,
)
from llamagen.training.task import Task
from llamagen.training.tokenizer_task import TokenizerTask
from llamagen.training.transformer_data import Codes
from llamagen.training.transformer_start import Start, find_start
from llamagen.training.transformer_task import TransformerTask

_STEPS = 2
_PUBLISHED_ENCODER = TextConfig()
_CAPTION_TOKENS = 24
"""Tokens of a caption that is made up."""
_GB = 1e9


def dry_run(recipe: TokenizerTraining | TransformerTraining) -> None:
    """Prints what ``recipe`` amounts to, then takes two steps where it is. All processes call it.

    Raises:
        FileNotFoundError: a folder does not exist.
        InputError: the recipe does not fit its data, its processes, or the memory here.
    """
    with distributed.process_group(recipe.loop.device), tempfile.TemporaryDirectory() as folder:
        complete = _checked(recipe)
        # Every process its own folder: they may not share a disk.
        small: Any = dataclasses.replace(
            complete, out=Path(folder), loop=dataclasses.replace(complete.loop, trackers=())
        )
        if isinstance(recipe, TokenizerTraining):
            data, make = _tokenizer(complete, small)
        else:
            data, make = _transformer(complete, small)
        # First without memory: the model may not fit.
        with torch.device("meta"):
            needed = _report(complete, data, make())
        _require_memory(needed, complete.loop)
        seconds = try_steps(make(), small.loop, Path(folder), steps=_STEPS)
        _say(_speed(seconds, complete.loop, find_device(complete.loop.device)))


def _checked(recipe: TokenizerTraining | TransformerTraining) -> Any:
    """The recipe with its precision decided."""
    require_shares(recipe.loop)
    if isinstance(recipe, TokenizerTraining):
        return open_run(recipe)
    return open_run(recipe)


class _Data(NamedTuple):
    """What a recipe would train on."""

    text: str
    images: int | None = None
    """How many, if there is an end to them."""


def _tokenizer(recipe: TokenizerTraining, small: Any) -> tuple[_Data, Callable[[], Task]]:
    if recipe.data is None:
        data, images = _Data("none named; two steps on noise"), _noise(small)
    elif recipe.source.streaming:
        images = tokenizer_images(small)
        data = _Data(f"streamed, {images.training.digest()}")
    else:
        found = find_run_images(recipe, labelled=False)
        data = _counted(found)
        few = found.training.thinned(_STEPS * recipe.loop.batch_size)
        images = _few_images(small, few)
    config = recipe.model
    if recipe.init is not None:
        config = _tokenizer_config(recipe.init)
    # Without LPIPS, which would be downloaded.
    return data, lambda: TokenizerTask(small, images, ImageTokenizer(config))


def _few_images(recipe: TokenizerTraining, images: ImageCollection) -> TokenizerImages:
    order = DataOrder(count=len(images), batch_size=recipe.loop.batch_size, seed=recipe.loop.seed)
    return TokenizerImages(Shuffled(images, order), images.subset([]), images)


def _transformer(recipe: TransformerTraining, small: Any) -> tuple[_Data, Callable[[], Task]]:
    tokenizer = TokenizerConfig()
    if recipe.tokenizer is not None:
        tokenizer = _tokenizer_config(recipe.tokenizer)
    names: tuple[str, ...] = ()
    if recipe.codes is not None:
        from llamagen.data.store import CodeStore

        store = CodeStore.open(recipe.codes)
        data, names = _Data(f"{len(store)} images with codes", len(store)), store.class_names
    elif recipe.data is not None:
        found = find_run_images(recipe, labelled=recipe.condition == "class")
        data, names = _counted(found), found.training.class_names
    else:
        data = _Data("none named")
    classes = names or tuple(map(str, range(recipe.num_classes or 1000)))
    grid = tokenizer.grid_of(*recipe.images.shape)
    small = _without_download(small)
    stand_in_text = small.text.text_encoder == _PUBLISHED_ENCODER.encoder
    stand_in_text = stand_in_text and small.text.text_features is None
    if stand_in_text:
        without = dataclasses.replace(small.text, text_encoder=None)
        small = dataclasses.replace(small, text=without)
    start = find_start(small, codebook_size=tokenizer.codebook_size, grid=grid, class_names=classes)
    if stand_in_text and small.condition == "text":
        start = _with_random_features(start)
    store_of_noise: Any = _RandomCodes(recipe.loop.batch_size, grid, tokenizer, len(classes))
    rows = np.arange(len(store_of_noise))
    codes = Codes(store_of_noise, rows, store_of_noise, rows[:0])
    stand_in = ImageTokenizer(_smallest(tokenizer))
    data = data._replace(text=f"{data.text}; two steps on random codes")
    return data, lambda: TransformerTask(start, stand_in, codes)


def _tokenizer_config(source: str) -> TokenizerConfig:
    """A tokenizer's architecture; that of a published one is known without its weights."""
    public = find_public(source)
    if public is not None:
        return preset(TOKENIZER_PRESETS, public.preset)
    return checkpoints.load_tokenizer(source, device="meta").config


def _without_download(recipe: TransformerTraining) -> TransformerTraining:
    """The recipe with random weights of the same size in the place of published ones."""
    public = None if recipe.init is None else find_public(recipe.init)
    if public is None or recipe.lora.lora_rank > 0:
        return recipe
    size = preset_model(TransformerTraining, public.preset)
    return dataclasses.replace(recipe, init=None, model=size)


def _with_random_features(start: Start) -> Start:
    """The start with features of no text, as wide as those of the published encoder."""
    features: Any = _RandomFeatures()
    width = TransformerConfig(condition="text").text_dim
    config = dataclasses.replace(start.config, text_dim=width)
    return dataclasses.replace(start, small_text=None, features=features, config=config)


class _RandomFeatures:
    """A store of text features that has one of every caption."""

    text = _PUBLISHED_ENCODER
    identity = "random"

    def features(self, captions: Sequence[str]) -> list[torch.Tensor]:
        width = TransformerConfig(condition="text").text_dim
        return [torch.randn(_CAPTION_TOKENS, width) for _ in captions]


def _smallest(config: TokenizerConfig) -> TokenizerConfig:
    """A tokenizer that is never asked for pictures, but has the right number of codes."""
    return TokenizerConfig(
        codebook_size=config.codebook_size, codebook_dim=1, base_channels=1, norm_groups=1,
        channel_multipliers=(1,), encoder_blocks=1, decoder_blocks=1, z_channels=1,
    )  # fmt: skip


@dataclasses.dataclass
class _RandomCodes:
    """A store of codes of no images."""

    count: int
    grid: Grid
    tokenizer: TokenizerConfig
    num_classes: int
    folder: Path = Path("random")
    identity: str = "random"
    views: int = 1
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.count) % self.num_classes

    def rows(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(0)
        shape = (len(indices), *self.grid)
        return random.integers(0, self.tokenizer.codebook_size, shape) + 0 * int(np.max(views))

    def readable(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def captions(self, indices: np.ndarray) -> list[Captions]:
        return [(Caption("a caption of about usual length", 1.0),) for _ in indices]

    def skipped(self) -> list[tuple[str, str]]:
        return []


def _noise(recipe: TokenizerTraining) -> TokenizerImages:
    """A folder of a few random images."""
    folder = recipe.out / "noise"
    folder.mkdir()
    height, width = recipe.images.shape
    random = np.random.default_rng(0)
    for number in range(2):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return _few_images(recipe, ImageFolder.scan_unlabelled(folder))


def _counted(images: Images) -> _Data:
    count = len(images.training)
    return _Data(f"{count} images, and {len(images.validation)} for validation", count)


def _report(recipe: TokenizerTraining | TransformerTraining, data: _Data, task: Task) -> float:
    """Prints everything but the steps; returns the bytes that a process needs for what it keeps."""
    loop, processes = recipe.loop, distributed.world_size()
    kept, parts = _kept_bytes(task, loop, processes)
    epochs = ""
    if data.images is not None:
        epochs = f", {loop.steps * loop.batch_size / data.images:.1f} times through the data"
    lines = [
        ("parameters", f"{_count(task.model):,} ({_count(task.model, trained=True):,} trained)"),
        ("data", data.text),
        ("steps", f"{loop.steps:,} of {loop.batch_size} images{epochs}"),
        ("processes", f"{processes}, each {loop.part_size(processes)} images at a time"),
        ("precision", loop.precision),
        ("memory per process", ", ".join(f"{name} {size / _GB:.2f} GB" for name, size in parts)),
    ]
    if task.adversary is not None:
        lines.insert(1, ("discriminator", f"{_count(task.adversary):,} parameters"))
    flops = task.flops_per_image()
    if flops is not None:
        lines.append(("computation", f"{flops * loop.batch_size / 1e12:.3g} TFLOP a step"))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        _say(f"{name:<{width}}  {text}")
    return kept


def _kept_bytes(
    task: Task, loop: LoopConfig, processes: int
) -> tuple[float, list[tuple[str, float]]]:
    """Of what a process holds between steps, all in float32; activations come on top."""
    models = [task.model, *([task.adversary] if task.adversary is not None else [])]
    shards = 1
    if loop.parallel == "fsdp":
        shards = loop.shard_processes or processes
    weights = sum(4.0 * _count(model) for model in models) / shards
    trained = sum(4.0 * _count(model, trained=True) for model in models) / shards
    parts = [("weights", weights), ("gradients", trained), ("optimiser", 2 * trained)]
    if loop.ema_decay > 0:
        parts.append(("running mean", 4.0 * _count(task.model, trained=True) / shards))
    if isinstance(task, TransformerTask):
        config = task.start.config
        parts.append(("activations (about)", _activation_bytes(config, loop, processes)))
    return sum(size for _, size in parts), parts


def _activation_bytes(config: TransformerConfig, loop: LoopConfig, processes: int) -> float:
    """What the backward pass needs of a part of a batch: counted by tensors, not measured."""
    rows = loop.part_size(processes) * (config.condition_length + config.num_codes - 1)
    size = 2 if loop.precision == "bfloat16" else 4
    # Per position and block: the shortcuts and norms in float32, then q, k, v, the attention's
    # output, two dropout masks, and the feed-forward layer's three wide tensors.
    block = config.dim * (4 * 4 + size * 5 + 2) + config.ffn_dim * size * 4
    kept = 4 * config.dim if loop.activation_checkpointing == "blocks" else block
    return float(rows * (config.layers * kept + block))


def _require_memory(needed: float, loop: LoopConfig) -> None:
    device = find_device(loop.device)
    if device.type == "cuda":
        there = float(torch.cuda.mem_get_info(device)[0])
    else:
        there = float(psutil.virtual_memory().available)
    if needed > there:
        raise InputError(
            f"the run needs about {needed / _GB:.1f} GB on {device}, which has "
            f"{there / _GB:.1f} GB free; more processes with parallel fsdp, a smaller batch_size "
            f"a process, or activation_checkpointing blocks need less"
        )


def _speed(seconds: list[float], loop: LoopConfig, device: torch.device) -> str:
    """What the steps took; the first one prepares and says little."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        # Kilobytes, but bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    last = seconds[-1]
    days = last * loop.steps / 86400
    return (
        f"{len(seconds)} steps taken: {last:.2f} s a step ({loop.batch_size / last:.3g} images/s), "
        f"{days:.2g} days for all of them; peak memory {peak / _GB:.2f} GB"
    )


def _count(model: torch.nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)
