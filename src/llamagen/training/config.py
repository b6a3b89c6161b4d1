"""What a training run is made of: recipes, as plain data.

A recipe describes a run completely; the command line's flags and the YAML files are its fields.
Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Literal

from llamagen.config import Grid, SamplingConfig, TokenizerConfig, TransformerConfig
from llamagen.data.views import ViewKind
from llamagen.errors import InputError

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _require_at_least(config: object, smallest: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= smallest, f"{name} is {value}, expected at least {smallest}")


def _require_weight(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            math.isfinite(value) and value >= 0,
            f"{name} is {value}, expected a finite number of at least 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The training loop, the same for both models."""

    steps: int = 1000
    """Steps of the optimiser, in all."""
    batch_size: int = 64
    """Images per step."""
    gradient_accumulation: int = 1
    """Parts that a batch is computed in, one after another; more parts need less memory."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's two running means."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW), on tensors of two or more dimensions only."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: stays, or falls to 0 along a cosine until the end."""
    clip_norm: float = 1.0
    """Largest norm of all gradients together; 0 leaves them as they are."""
    ema_decay: float = 0.0
    """Decay of a running mean of the weights, which is then what is validated and exported; 0
    keeps none."""
    precision: Precision = "auto"
    """Precision of matrix products and convolutions (autocast); the weights stay float32. Auto
    takes bfloat16 where the device is fast at it."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    seed: int = 0
    """Seed of the first weights, the data's order, the augmentation and the dropout."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    validate_every: int = 500
    """Steps between two validations; 0 validates at the end only."""
    sample_every: int = 500
    """Steps between two sheets of samples; 0 draws one at the end only."""
    save_every: int = 500
    """Steps between two checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints are kept."""
    resume: bool = True
    """Go on with the run in the output folder, if there is one."""

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "steps", "batch_size", "gradient_accumulation")
        _require_at_least(self, 1, "log_every", "keep_checkpoints")
        _require_at_least(self, 0, "validate_every", "sample_every", "save_every", "warmup_steps")
        _require_weight(self, "weight_decay", "clip_norm")
        _require(
            self.batch_size % self.gradient_accumulation == 0,
            f"gradient_accumulation {self.gradient_accumulation} does not divide "
            f"batch_size {self.batch_size}",
        )
        _require(
            math.isfinite(self.lr) and self.lr > 0,
            f"lr is {self.lr}, expected a finite number above 0",
        )
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas are {self.betas}, expected two numbers from 0 up to below 1",
        )
        _require(
            self.schedule in ("constant", "cosine"),
            f"schedule is {self.schedule!r}, expected 'constant' or 'cosine'",
        )
        _require(
            0 <= self.ema_decay < 1,
            f"ema_decay is {self.ema_decay}, expected a number from 0 up to below 1",
        )
        _require(
            self.precision != "float16",
            "precision float16 cannot be trained with: its gradients underflow; use bfloat16 or "
            "float32",
        )
        _require(
            self.precision in ("auto", "float32", "bfloat16"),
            f"precision is {self.precision!r}, expected auto, float32 or bfloat16",
        )
        _require(
            0 <= self.seed < 2**63, f"seed is {self.seed}, expected an integer from 0 to 2^63 - 1"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How images are read, the same for both models."""

    size: int = 256
    """Height of the images in pixels, and their width unless that is given."""
    width: int | None = None
    """Width of the images, if they are not square."""
    validation_fraction: float = 0.02
    """Part of the images that is held out for validation, unless they have their own folder."""
    max_validation_images: int = 1000
    """Held-out images that a validation looks at."""
    workers: int = 0
    """Processes that read images; 0 reads them in the training process. Any number gives the
    same result."""

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "size", "max_validation_images")
        _require_at_least(self, 0, "workers")
        if self.width is not None:
            _require_at_least(self, 1, "width")
        _require(
            0 <= self.validation_fraction < 1,
            f"validation_fraction is {self.validation_fraction}, expected a number from 0 up to "
            f"below 1",
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.size, self.width or self.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """What happens to a training image each time it is read."""

    crop_scale: float = 1.25
    """The short side is resized to between 1 and this times the size before a random crop."""
    flip: bool = True
    """Mirror every other image; not for writing and the like."""

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.crop_scale) and self.crop_scale >= 1,
            f"crop_scale is {self.crop_scale}, expected a finite number of at least 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerLossConfig:
    """Terms of the tokenizer's loss, each with its weight (paper section 3.1)."""

    reconstruction: Literal["l2", "l1"] = "l2"
    """Mean squared or absolute difference of pixels."""
    reconstruction_weight: float = 1.0
    """Weight of the reconstruction."""
    codebook_weight: float = 1.0
    """Weight of the term that moves codes to latents; 0 leaves the codebook as it is."""
    commitment_weight: float = 0.25
    """Weight of the term that moves latents to codes (beta), within the codebook's weight."""
    entropy_weight: float = 0.0
    """Weight of the entropy of the assignment to codes, within the codebook's weight."""

    def __post_init__(self) -> None:
        _require(
            self.reconstruction in ("l2", "l1"),
            f"reconstruction is {self.reconstruction!r}, expected 'l2' or 'l1'",
        )
        _require_weight(self, "reconstruction_weight", "codebook_weight", "commitment_weight")
        _require_weight(self, "entropy_weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """A training run of an image tokenizer."""

    data: Path | None = None
    """Folder with images, searched through."""
    validation_data: Path | None = None
    """Folder with images for validation. Default: a part of the data is held out."""
    out: Path = Path("runs/tokenizer")
    """Folder of the run: checkpoints, metrics, samples, and the model in "tokenizer"."""
    images: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    model: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    codebook_init: Literal["random", "data"] = "random"
    """The first codebook: random as published, or latents of the first images."""
    loss: TokenizerLossConfig = dataclasses.field(default_factory=TokenizerLossConfig)
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(batch_size=128))

    def __post_init__(self) -> None:
        _require(
            self.codebook_init in ("random", "data"),
            f"codebook_init is {self.codebook_init!r}, expected 'random' or 'data'",
        )
        self.model.grid_of(*self.images.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """The transformer's own numbers; its codes, grid and classes are those of the data."""

    dim: int = 768
    """Width of the residual stream."""
    layers: int = 12
    """Number of blocks."""
    heads: int = 12
    """Query heads; dim / heads is the head dimension, a multiple of 4 for the 2-D RoPE."""
    kv_heads: int | None = None
    """Key and value heads (grouped-query attention); None means as many as query heads."""
    hidden_dim: int | None = None
    """Hidden size of the feed-forward layer; None means 8/3 dim rounded up to 256."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    token_dropout: float = 0.1
    """Dropout of the embeddings, in training."""
    attention_dropout: float = 0.0
    """Dropout of attention weights, in training."""
    residual_dropout: float = 0.1
    """Dropout of the attention's output, in training."""
    ffn_dropout: float = 0.1
    """Dropout of the feed-forward layer's output, in training."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, in training; earlier blocks get linearly less."""

    def __post_init__(self) -> None:
        # The architecture's own checks; the data's part of it is not known yet.
        self.config(codebook_size=1, grid=(1, 1), num_classes=1)

    def config(self, *, codebook_size: int, grid: Grid, num_classes: int) -> TransformerConfig:
        """The architecture for codes, a grid and a number of classes."""
        return TransformerConfig(
            codebook_size=codebook_size,
            grid=grid,
            num_classes=num_classes,
            **dataclasses.asdict(self),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerTraining:
    """A training run of a class-conditional transformer."""

    data: Path | None = None
    """Folder with one subfolder of images per class."""
    validation_data: Path | None = None
    """The same for validation. Default: a part of the data is held out."""
    tokenizer: str | None = None
    """Image tokenizer that makes the codes: folder, checkpoint file or published name."""
    out: Path = Path("runs/transformer")
    """Folder of the run: checkpoints, metrics, samples, and the whole model in "pipeline"."""
    images: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    views: ViewKind = "ten-crop"
    """Views of an image that are encoded, one drawn at random each time it is read: its centre
    crop; that and its mirror image; ten crops; or the published twenty, half of them mirrored."""
    model: TransformerSize = dataclasses.field(default_factory=TransformerSize)
    num_classes: int | None = None
    """Classes of the model. Default: as many as the data has."""
    class_dropout: float = 0.1
    """Part of the labels that become "no class", which guidance needs."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    sample_images: int = 40
    """Images on a sheet of samples."""
    loop: LoopConfig = dataclasses.field(
        default_factory=lambda: LoopConfig(batch_size=256, weight_decay=0.05)
    )

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "sample_images")
        if self.num_classes is not None:
            _require_at_least(self, 1, "num_classes")
        _require(
            self.views in typing.get_args(ViewKind),
            f"views is {self.views!r}, expected one of {', '.join(typing.get_args(ViewKind))}",
        )
        _require(
            0 <= self.class_dropout < 1,
            f"class_dropout is {self.class_dropout}, expected a number from 0 up to below 1",
        )
