"""Recipes: everything that determines a training run, as plain data. Nothing here imports torch.

The command line's flags and the YAML files are a recipe's fields; each declares its range or its
choices once. Half of this file is the text of ``--help``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from llamagen.config import (
    SamplingConfig,
    SmallTextEncoderConfig,
    TokenizerConfig,
    TransformerArchitecture,
    TransformerConfig,
)
from llamagen.data.columns import SourceConfig
from llamagen.data.views import TEN_CROP_RANGES, ViewKind, check_crop_ranges
from llamagen.support.errors import InputError

Precision = Literal["auto", "float32", "bfloat16"]
AdversarialLoss = Literal["hinge", "vanilla", "non-saturating"]
DiscriminatorName = Literal["patchgan", "stylegan"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _checked(default: Any, valid: Callable[[Any], bool], expected: str) -> Any:
    """Return a field whose values must be ``valid``, or None."""
    return dataclasses.field(default=default, metadata={"valid": valid, "expected": expected})


def _at_least(minimum: int, default: int | None) -> Any:
    return _checked(default, lambda value: value >= minimum, f"at least {minimum}")


def _weight(default: float | None) -> Any:
    return _checked(default, lambda value: 0 <= value < math.inf, "a finite number of at least 0")


def _fraction(default: float) -> Any:
    return _checked(default, lambda value: 0 <= value < 1, "a number from 0 up to below 1")


@functools.cache
def _choices(cls: Any) -> dict[str, tuple[Any, ...]]:
    """Return the values of each field that is a ``Literal``, or a tuple of them."""
    return {
        name: typing.get_args(part)
        for name, hint in typing.get_type_hints(cls).items()
        for part in (hint, *typing.get_args(hint))
        if typing.get_origin(part) is Literal
    }


class _Checked:
    """Base of a recipe's dataclasses."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        choices = _choices(cls)
        for field in dataclasses.fields(cls):
            name, value, check = field.name, getattr(self, field.name), field.metadata
            if name in choices:
                known = f"expected one of {', '.join(choices[name])}"
                for each in value if isinstance(value, tuple) else (value,):
                    _require(each in choices[name], f"{name} is {each!r}, {known}")
            if value is not None and check:
                _require(check["valid"](value), f"{name} is {value}, expected {check['expected']}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig(_Checked):
    """The training loop, the same for both models."""

    steps: int = _at_least(1, 1000)
    """Steps of the optimiser, in all."""
    batch_size: int = _at_least(1, 64)
    """Images per step, over all processes."""
    gradient_accumulation: int = _at_least(1, 1)
    """Parts of a process's share of a batch, computed one after another; more need less memory."""
    lr: float = _checked(1e-4, lambda lr: 0 < lr < math.inf, "a finite number above 0")
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = _checked(
        (0.9, 0.95),
        lambda betas: all(0 <= b < 1 for b in betas),
        "two numbers from 0 up to below 1",
    )
    """Decay of Adam's two running means."""
    weight_decay: float = _weight(0.0)
    """Decoupled weight decay (AdamW), on tensors of two or more dimensions only."""
    warmup_steps: int = _at_least(0, 0)
    """Steps in which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling along a cosine until the end."""
    min_lr_ratio: float = _fraction(0.0)
    """Part of the learning rate that a cosine ends at."""
    clip_norm: float = _weight(1.0)
    """Maximum norm of all gradients together; 0 does not clip."""
    ema_decay: float = _fraction(0.0)
    """Decay of a running mean of the weights (EMA), then validated and exported; 0 is none."""
    precision: Precision = "auto"
    """Precision of matrix products and convolutions (autocast); the weights stay float32. Auto
    takes bfloat16 where the device is fast at it."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    seed: int = _checked(0, lambda seed: 0 <= seed < 2**63, "an integer from 0 to 2^63 - 1")
    """Seed of the first weights, the data's order, the augmentation and the dropout."""
    log_every: int = _at_least(1, 50)
    """Steps between two lines of metrics.jsonl."""
    validate_every: int = _at_least(0, 500)
    """Steps between two validations; 0 validates at the end only."""
    sample_every: int = _at_least(0, 500)
    """Steps between two sheets of samples; 0 makes one at the end only."""
    save_every: int = _at_least(0, 500)
    """Steps between two checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = _at_least(1, 2)
    """Number of latest checkpoints to keep."""
    keep_every: int = _at_least(0, 0)
    """Also keep the checkpoints of multiples of this many steps; 0 keeps the latest only."""
    export: bool = True
    """Write the model's folder at every checkpoint, not only at the end or by `llamagen export`."""
    resume: bool = True
    """Continue the run in the output folder, if there is one."""
    max_skipped_steps: int = _at_least(0, 10)
    """Maximum number of steps in a row whose gradients are not finite. Such a step changes nothing
    and is counted; one more in a row ends the run, its last checkpoint intact."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (torchrun) share the work: ddp replicates the model and splits the
    batch; fsdp shards weights, gradients and optimiser as well."""
    shard_processes: int | None = _at_least(1, None)
    """With fsdp: number of processes that share one copy of the model, as those of one machine
    (hybrid sharding). Default: all of them."""
    activation_checkpointing: Literal["none", "blocks"] = "none"
    """Activations of a transformer that the backward pass recomputes: none, or those inside all
    blocks, for a third more computation and far less memory."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile): slower to start, then faster on a GPU."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics and samples go besides the run's folder: tensorboard (files in it), wandb."""

    def __post_init__(self) -> None:
        _require(
            str(self.precision) != "float16",
            "precision float16 cannot be trained with: its gradients underflow; use bfloat16 or "
            "float32",
        )
        super().__post_init__()
        _require(
            self.min_lr_ratio == 0 or self.schedule == "cosine",
            f"min_lr_ratio is {self.min_lr_ratio}, but the schedule is constant; make it cosine",
        )
        _require(
            self.batch_size % self.gradient_accumulation == 0,
            f"gradient_accumulation {self.gradient_accumulation} does not divide "
            f"batch_size {self.batch_size}",
        )

    def part_size(self, processes: int) -> int:
        """Return how many images one of ``processes`` computes at a time."""
        return self.batch_size // (processes * self.gradient_accumulation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig(_Checked):
    """How images are read, the same for both models."""

    size: int = _at_least(1, 256)
    """Height of the images in pixels, and their width unless that is given."""
    width: int | None = _at_least(1, None)
    """Width of the images, if they are not square."""
    validation_fraction: float = _fraction(0.02)
    """Fraction of the images that is held out for validation, unless it has data of its own."""
    max_validation_images: int = _at_least(1, 1000)
    """Maximum number of held-out images of a validation."""
    workers: int = _at_least(0, 0)
    """Processes that read images; 0 reads them in the training process, with the same result."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.size, self.width or self.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationConfig(_Checked):
    """Augmentation of a training image each time it is read."""

    crop_scale: float = _checked(1.25, lambda s: 1 <= s < math.inf, "a finite number of at least 1")
    """The short side is resized to between 1 and this times the size before a random crop."""
    flip: bool = True
    """Mirror every other image; not for writing and the like."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig(_Checked):
    """Terms of the tokenizer's loss, each with its weight (paper section 3.1)."""

    reconstruction: Literal["l2", "l1"] = "l2"
    """Mean squared or absolute difference of pixels."""
    reconstruction_weight: float = _weight(1.0)
    """Weight of the reconstruction."""
    codebook_weight: float = _weight(1.0)
    """Weight of the term that moves codes to latents; 0 freezes the codebook."""
    commitment_weight: float = _weight(0.25)
    """Weight of the term that moves latents to codes (beta), within the codebook's weight."""
    entropy_weight: float = _weight(0.0)
    """Weight of the entropy of the assignment to codes, within the codebook's weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualConfig(_Checked):
    """The part of the tokenizer's loss that compares features instead of pixels (LPIPS)."""

    perceptual_weight: float = _weight(0.0)
    """Weight of LPIPS; 0 leaves it out and downloads nothing. Published: 1."""
    perceptual_weights: Path | None = None
    """Weights of the network: a folder with the two public files, or one file of both. Default:
    downloaded once (560 MB)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig(_Checked):
    """The adversarial term of the tokenizer's loss, and the training of the discriminator."""

    adversarial_weight: float = _weight(0.0)
    """Weight of the adversarial loss; 0 trains without a discriminator. Published: 0.5."""
    adversarial_start: int = _at_least(0, 20000)
    """Step at which the discriminator and the adversarial loss begin."""
    discriminator: DiscriminatorName = "patchgan"
    """patchgan judges overlapping patches, as published; stylegan, larger, the whole image."""
    adversarial_loss: AdversarialLoss = "hinge"
    """Loss of the discriminator, and the one that the tokenizer minimises against it."""
    adaptive_weight: bool = False
    """Scale the adversarial loss so that its gradient at the decoder's last layer is as large as
    that of the reconstruction."""
    discriminator_lr: float | None = _weight(None)
    """The discriminator's learning rate. Default: the model's for patchgan, as published; 0.002
    for stylegan, whose layers scale their weights down."""

    def lr(self, model_lr: float) -> float:
        """Return the discriminator's learning rate, given the model's."""
        if self.discriminator_lr is not None:
            return self.discriminator_lr
        return model_lr if self.discriminator == "patchgan" else 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTraining(_Checked):
    """A training run of an image tokenizer."""

    data: str | None = None
    """Images: a folder, searched through; Parquet or tar files, as a folder, file or pattern; or a
    data set on the hub, hf:owner/name."""
    validation_data: str | None = None
    """Images for validation. Default: a fraction of the data is held out."""
    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    out: Path = Path("runs/tokenizer")
    """Folder of the run: checkpoints, metrics, samples, and the model in "tokenizer"."""
    images: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    model: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    init: str | None = None
    """Tokenizer to start from; its architecture is used instead of `model`: folder, checkpoint
    file, hub repository or published name. Default: random weights."""
    trained: Literal["all", "decoder"] = "all"
    """Part that is trained: all, or the decoder only. Then every image keeps its codes of `init`,
    and transformers trained on them still fit."""
    codebook_init: Literal["random", "data"] = "random"
    """Initial codebook: random as published, or latents of the first images; unused with `init`."""
    revive_codes_every: int = _at_least(0, 0)
    """Every so many steps, move codes that none of the last 65,536 latents were assigned to onto
    latents of the last batch, once so many were seen; 0 is never."""
    loss: TokenizerLossConfig = dataclasses.field(default_factory=TokenizerLossConfig)
    perceptual: PerceptualConfig = dataclasses.field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(batch_size=128))

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.trained == "all" or self.revive_codes_every == 0,
            f"revive_codes_every is {self.revive_codes_every}, but with trained decoder the "
            f"codebook is frozen; set it to 0",
        )
        if self.init is None:
            self.model.grid_of(*self.images.shape)
        _require(
            self.loop.parallel == "ddp",
            "parallel is fsdp, but an image tokenizer is too small to be split; use ddp",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(_Checked):
    """Fine-tuning of a transformer through low-rank matrices beside its own (LoRA)."""

    lora_rank: int = _at_least(0, 0)
    """Rank of the matrices; 0 trains the whole model instead."""
    lora_alpha: float = _weight(16.0)
    """The matrices' product is multiplied by this over the rank."""
    lora_dropout: float = _fraction(0.0)
    """Dropout before the matrices, in training."""
    lora_targets: tuple[str, ...] = ("wqkv", "wo", "w1", "w2", "w3")
    """Layers of each block that get them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(len(self.lora_targets) > 0, "lora_targets is empty; name at least one layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTraining(_Checked):
    """How captions become the condition of a transformer."""

    text_encoder: str | None = None
    """Frozen text encoder of the T5 family: hub repository or folder. Default: that of the model
    to start from; without one, a small one that reads bytes is trained along."""
    text_features: Path | None = None
    """Store of text features (`llamagen extract-text`) to train on, instead of encoding captions
    each time; the encoder, its length and the cleaning are then the store's."""
    text_length: int = 120
    """Tokens (of the small one: bytes) of a caption that are read."""
    clean_captions: bool = True
    """Clean captions as those that the published models were trained with."""
    length_group: int = _at_least(1, 1)
    """Consecutive batches whose captions are sorted by length, against padding; 1 does not sort."""
    text_dim: int = 256
    """Of the small one: width of its features."""
    text_layers: int = 4
    """Of the small one: number of blocks."""
    text_heads: int = 4
    """Of the small one: attention heads; they divide its width."""
    text_dropout: float = 0.1
    """Of the small one: dropout everywhere."""
    code_set_weight: float = _weight(0.0)
    """Of the small one: weight of an auxiliary loss that predicts from its features alone which
    codes an image has. Without it small data sets are memorised from the previous codes, and
    captions matter little."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.small

    @property
    def small(self) -> SmallTextEncoderConfig:
        """The small encoder's architecture."""
        return SmallTextEncoderConfig(
            dim=self.text_dim,
            layers=self.text_layers,
            heads=self.text_heads,
            dropout=self.text_dropout,
            max_length=self.text_length,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerTraining(_Checked):
    """A training run of a transformer, conditioned on classes or on text."""

    condition: Literal["class", "text"] = "class"
    """Condition of the images: their class, or their caption."""
    data: str | None = None
    """Images with classes or captions: a folder with a subfolder for each class, or with a table
    (metadata.csv, metadata.jsonl); Parquet or tar files, as a folder, file or pattern; or a data
    set on the hub, hf:owner/name."""
    validation_data: str | None = None
    """The same for validation. Default: a fraction of the data is held out."""
    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    codes: Path | None = None
    """Store of codes (`llamagen extract-codes`) to train on, instead of images."""
    validation_codes: Path | None = None
    """The same for validation. Default: a fraction of the codes is held out."""
    init: str | None = None
    """Model to start from, with its architecture: pipeline folder, checkpoint file, hub repository
    or published name. If its classes have other names than the data's, their embeddings are new,
    except that of "no class". Default: random weights."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    tokenizer: str | None = None
    """Image tokenizer: folder, checkpoint file or published name. Default: that of `init`."""
    out: Path = Path("runs/transformer")
    """Folder of the run: checkpoints, metrics, samples, and the whole model in "pipeline"."""
    images: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    encode: Literal["once", "always"] = "once"
    """Encode all views of the images once, before training, or always: one random view each time an
    image is read, which needs no preparation and no disk, but more computation."""
    views: ViewKind = "ten-crop"
    """Views of an image that are encoded, of which each reading takes a random one: centre crop;
    that and its mirror image; the corners and the centre, five for each of the crop ranges; or
    those and their mirror images, the published twenty."""
    crop_ranges: tuple[float, ...] = TEN_CROP_RANGES
    """Sizes of the images that five or ten crops are cut from, relative to the size."""
    model: TransformerArchitecture = dataclasses.field(default_factory=TransformerArchitecture)
    num_classes: int | None = _at_least(1, None)
    """Classes of the model. Default: as many as the data has."""
    condition_dropout: float = _fraction(0.1)
    """Fraction of labels or captions that become "no class" or "no text", which guidance needs."""
    code_noise: float = _checked(0.0, lambda noise: 0 <= noise <= 1, "a number from 0 to 1")
    """Maximum fraction of an image's codes that are replaced by random ones in the input, not in
    the targets; each image has a random fraction up to it. Sampled images then depend more on the
    caption or class, and recover from wrong codes."""
    text: TextTraining = dataclasses.field(default_factory=TextTraining)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    sample_images: int = _at_least(1, 40)
    """Images on a sheet of samples."""
    loop: LoopConfig = dataclasses.field(
        default_factory=lambda: LoopConfig(batch_size=256, weight_decay=0.05)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.model, TransformerConfig):
            object.__setattr__(self, "model", self.model.architecture)
        _require(
            self.lora.lora_rank == 0 or self.init is not None,
            "lora_rank is given without a model to adapt; name one with init",
        )
        check_crop_ranges(self.crop_ranges)


Recipe = TokenizerTraining | TransformerTraining
RecipeT = TypeVar("RecipeT", TokenizerTraining, TransformerTraining)
