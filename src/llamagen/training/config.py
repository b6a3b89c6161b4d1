"""What a training run is made of: recipes, as plain data.

A recipe describes a run completely; the command line's flags and the YAML files are its fields.
Nothing here imports torch. Longer than most files: half of it is the text of ``--help``.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any, Literal

from llamagen.config import (
    Grid,
    SamplingConfig,
    SmallTextEncoderConfig,
    TokenizerConfig,
    TransformerConfig,
)
from llamagen.data.columns import SourceConfig
from llamagen.data.crops import TEN_CROP_RANGES
from llamagen.data.views import ViewKind, check_crop_ranges
from llamagen.support.errors import InputError

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Parallel = Literal["ddp", "fsdp"]
ActivationCheckpointing = Literal["none", "blocks"]
AdversarialLoss = Literal["hinge", "vanilla", "non-saturating"]
"""What a discriminator, or the model that it judges, minimises."""
DiscriminatorName = Literal["patchgan", "stylegan"]
"""Judges patches, as published, or whole images."""
TrainedPart = Literal["all", "decoder"]
"""What of an image tokenizer learns."""
Tracker = Literal["tensorboard", "wandb"]
ConditionKind = Literal["class", "text"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _require_at_least(config: object, smallest: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= smallest, f"{name} is {value}, expected at least {smallest}")


def _require_choice(config: object, name: str, choices: Any) -> None:
    value, known = getattr(config, name), typing.get_args(choices)
    _require(value in known, f"{name} is {value!r}, expected one of {', '.join(known)}")


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
    """Images per step, over all processes."""
    gradient_accumulation: int = 1
    """Parts that a process computes its share of a batch in, one after another; more parts need
    less memory."""
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
    keep_every: int = 0
    """Checkpoints of multiples of this many steps are kept for good; 0 keeps the latest only."""
    export: bool = True
    """Write the model's folder with every checkpoint; otherwise at the end only, and whenever
    `llamagen export` is asked to."""
    resume: bool = True
    """Go on with the run in the output folder, if there is one."""
    max_skipped_steps: int = 10
    """Steps in a row whose gradients may be infinite or not a number. Such a step changes nothing
    and is counted; with one more of them the run ends, its last checkpoint whole."""
    parallel: Parallel = "ddp"
    """What several processes (torchrun) share: ddp keeps the whole model in each and splits the
    batch only; fsdp splits weights, gradients and optimiser as well."""
    shard_processes: int | None = None
    """With fsdp: how many processes split one copy of the model between them, as those of one
    machine (hybrid sharding). Default: all of them."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What the forward pass of a transformer forgets and the backward pass computes again: none,
    or the inside of all blocks, for a third more computation and far less memory."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile): slower to start, then faster on a GPU."""
    trackers: tuple[Tracker, ...] = ()
    """Where metrics and samples go beside the run's folder: tensorboard (files in the run's
    folder), wandb."""

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "steps", "batch_size", "gradient_accumulation")
        _require_at_least(self, 1, "log_every", "keep_checkpoints")
        _require_at_least(self, 0, "validate_every", "sample_every", "save_every", "warmup_steps")
        _require_at_least(self, 0, "keep_every", "max_skipped_steps")
        if self.shard_processes is not None:
            _require_at_least(self, 1, "shard_processes")
        _require_choice(self, "parallel", Parallel)
        _require_choice(self, "activation_checkpointing", ActivationCheckpointing)
        for tracker in self.trackers:
            _require(
                tracker in typing.get_args(Tracker),
                f"trackers has {tracker!r}, expected {' or '.join(typing.get_args(Tracker))}",
            )
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

    def part_size(self, processes: int) -> int:
        """Images that one of ``processes`` computes at a time."""
        return self.batch_size // (processes * self.gradient_accumulation)


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
class PerceptualConfig:
    """The part of the tokenizer's loss that compares features instead of pixels (LPIPS)."""

    perceptual_weight: float = 0.0
    """Weight of LPIPS; 0 leaves it out and downloads nothing. Published: 1."""
    perceptual_weights: Path | None = None
    """Where the network's weights are: a folder with the two public files, or one file of both.
    Default: downloaded once (560 MB) and kept."""

    def __post_init__(self) -> None:
        _require_weight(self, "perceptual_weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The part of the tokenizer's loss that a discriminator decides, and its training."""

    adversarial_weight: float = 0.0
    """Weight of the discriminator's judgement; 0 trains without one. Published: 0.5."""
    adversarial_start: int = 20000
    """Steps before the discriminator begins to learn and to judge."""
    discriminator: DiscriminatorName = "patchgan"
    """patchgan judges overlapping patches; stylegan, larger, the whole image."""
    adversarial_loss: AdversarialLoss = "hinge"
    """What both sides minimise."""
    adaptive_weight: bool = False
    """Scale the judgement so that its gradient at the decoder's last layer is as large as that
    of the reconstruction."""
    discriminator_lr: float | None = None
    """The discriminator's learning rate. Default: the model's for patchgan, as published; 0.002
    for stylegan, whose layers scale their weights down."""

    def __post_init__(self) -> None:
        _require_weight(self, "adversarial_weight")
        _require_at_least(self, 0, "adversarial_start")
        _require_choice(self, "discriminator", DiscriminatorName)
        _require_choice(self, "adversarial_loss", AdversarialLoss)
        if self.discriminator_lr is not None:
            _require_weight(self, "discriminator_lr")

    def lr(self, model_lr: float) -> float:
        """The discriminator's learning rate, given the model's."""
        if self.discriminator_lr is not None:
            return self.discriminator_lr
        return model_lr if self.discriminator == "patchgan" else 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """A training run of an image tokenizer."""

    data: str | None = None
    """Images: a folder, searched through; Parquet or tar files, as a folder, file or pattern; or a
    data set on the hub, hf:owner/name."""
    validation_data: str | None = None
    """Images for validation. Default: a part of the data is held out."""
    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    out: Path = Path("runs/tokenizer")
    """Folder of the run: checkpoints, metrics, samples, and the model in "tokenizer"."""
    images: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    model: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    init: str | None = None
    """Tokenizer to start from, whose architecture is kept and `model` ignored: folder, checkpoint
    file, hub repository or published name. Default: random weights."""
    trained: TrainedPart = "all"
    """What learns: all, or the decoder alone. Then the codes of every image stay those of `init`,
    and transformers trained on them still fit."""
    codebook_init: Literal["random", "data"] = "random"
    """The first codebook: random as published, or latents of the first images. Without effect
    where `init` brings one."""
    revive_codes_every: int = 0
    """Steps after which codes that none of the last 65,536 latents took are put where latents of
    the last batch are; 0 never does."""
    loss: TokenizerLossConfig = dataclasses.field(default_factory=TokenizerLossConfig)
    perceptual: PerceptualConfig = dataclasses.field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(batch_size=128))

    def __post_init__(self) -> None:
        _require(
            self.codebook_init in ("random", "data"),
            f"codebook_init is {self.codebook_init!r}, expected 'random' or 'data'",
        )
        _require_at_least(self, 0, "revive_codes_every")
        _require_choice(self, "trained", TrainedPart)
        if self.trained == "decoder":
            _require(
                self.revive_codes_every == 0,
                f"revive_codes_every is {self.revive_codes_every}, but with trained decoder the "
                f"codebook stays as it is; set it to 0",
            )
        if self.init is None:
            self.model.grid_of(*self.images.shape)
        _require(
            self.loop.parallel == "ddp",
            "parallel is fsdp, but an image tokenizer is too small to be split; use ddp",
        )


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

    def config(self, *, codebook_size: int, grid: Grid, **condition: Any) -> TransformerConfig:
        """The architecture for codes, a grid, and what ``TransformerConfig`` has of a condition."""
        return TransformerConfig(
            codebook_size=codebook_size, grid=grid, **condition, **dataclasses.asdict(self)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Fine-tuning of a transformer through low-rank matrices beside its own (LoRA)."""

    lora_rank: int = 0
    """Rank of the matrices; 0 trains the whole model instead."""
    lora_alpha: float = 16.0
    """The matrices' product is multiplied by this over the rank."""
    lora_dropout: float = 0.0
    """Dropout in front of the matrices, in training."""
    lora_targets: tuple[str, ...] = ("wqkv", "wo", "w1", "w2", "w3")
    """Layers of each block that get them."""

    def __post_init__(self) -> None:
        _require_at_least(self, 0, "lora_rank")
        _require_weight(self, "lora_alpha")
        _require(
            0 <= self.lora_dropout < 1,
            f"lora_dropout is {self.lora_dropout}, expected a number from 0 up to below 1",
        )
        _require(len(self.lora_targets) > 0, "lora_targets is empty; name at least one layer")

    @property
    def scale(self) -> float:
        """What the product of the matrices is multiplied by."""
        return self.lora_alpha / self.lora_rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTraining:
    """What captions go through on their way to a text-conditional transformer."""

    text_encoder: str | None = None
    """Text encoder of the T5 family that stays as it is: hub repository or folder. Default: that
    of the model to start from; without one, a small one that reads bytes is trained along."""
    text_features: Path | None = None
    """Store of text features (`llamagen extract-text`) to train on, instead of encoding captions
    again each time; the encoder, its length and the cleaning are then the store's."""
    text_length: int = 120
    """Tokens (of the small one: bytes) of a caption that are read."""
    clean_captions: bool = True
    """Clean captions as those that the published models were trained with."""
    length_group: int = 1
    """Batches in a row whose captions are sorted by length before they are dealt out, so that
    little of a batch is padding; 1 leaves captions as they come."""
    text_dim: int = 256
    """Of the small one: width of its features."""
    text_layers: int = 4
    """Of the small one: number of blocks."""
    text_heads: int = 4
    """Of the small one: attention heads; they divide its width."""
    text_dropout: float = 0.1
    """Of the small one: dropout everywhere."""
    code_set_weight: float = 0.0
    """Of the small one: weight of a further loss, by which its features alone tell which codes an
    image has. Small sets are otherwise learnt by heart from the codes before, and captions count
    for little."""

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "length_group")
        _require_weight(self, "code_set_weight")
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
class TransformerTraining:
    """A training run of a transformer, conditioned on classes or on text."""

    condition: ConditionKind = "class"
    """What images are drawn of: their class, or their caption."""
    data: str | None = None
    """Images with classes or captions: a folder with a subfolder for each class, or with a table
    (metadata.csv, metadata.jsonl); Parquet or tar files, as a folder, file or pattern; or a data
    set on the hub, hf:owner/name."""
    validation_data: str | None = None
    """The same for validation. Default: a part of the data is held out."""
    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    codes: Path | None = None
    """Store of codes (`llamagen extract-codes`) to train on, instead of images."""
    validation_codes: Path | None = None
    """The same for validation. Default: a part of the codes is held out."""
    init: str | None = None
    """Model to start from, whose architecture is kept: pipeline folder, checkpoint file, hub
    repository or published name. If its classes have other names than the data's, they get a new
    table; "no class" stays. Default: random weights."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    tokenizer: str | None = None
    """Image tokenizer that makes the codes: folder, checkpoint file or published name. Default:
    that of the model to start from."""
    out: Path = Path("runs/transformer")
    """Folder of the run: checkpoints, metrics, samples, and the whole model in "pipeline"."""
    images: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    encode: Literal["once", "always"] = "once"
    """Encode all views of the images once, before the training, or the one that is drawn each time
    an image is read: nothing to wait for and no disk, but more computation."""
    views: ViewKind = "ten-crop"
    """Views of an image that are encoded, one drawn at random each time it is read: its centre
    crop; that and its mirror image; its corners and middle, five for each of the crop ranges; or
    those and their mirror images, the published twenty."""
    crop_ranges: tuple[float, ...] = TEN_CROP_RANGES
    """How many times the size are the images that five or ten crops are cut from."""
    model: TransformerSize = dataclasses.field(default_factory=TransformerSize)
    num_classes: int | None = None
    """Classes of the model. Default: as many as the data has."""
    condition_dropout: float = 0.1
    """Part of the labels or captions that become "no class" or "no text", which guidance needs."""
    code_noise: float = 0.0
    """Largest part of an image's codes that the model is shown random ones in the place of, while
    it predicts the true ones; how many is drawn for each image. What is drawn later then rests on
    the caption or class too, not only on the codes before."""
    text: TextTraining = dataclasses.field(default_factory=TextTraining)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    sample_images: int = 40
    """Images on a sheet of samples."""
    loop: LoopConfig = dataclasses.field(
        default_factory=lambda: LoopConfig(batch_size=256, weight_decay=0.05)
    )

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "sample_images")
        _require_choice(self, "condition", ConditionKind)
        _require(
            self.lora.lora_rank == 0 or self.init is not None,
            "lora_rank is given without a model to adapt; name one with init (--init)",
        )
        if self.num_classes is not None:
            _require_at_least(self, 1, "num_classes")
        _require(
            self.views in typing.get_args(ViewKind),
            f"views is {self.views!r}, expected one of {', '.join(typing.get_args(ViewKind))}",
        )
        check_crop_ranges(self.crop_ranges)
        _require(
            self.encode in ("once", "always"),
            f"encode is {self.encode!r}, expected 'once' or 'always'",
        )
        _require(
            0 <= self.code_noise <= 1,
            f"code_noise is {self.code_noise}, expected a number from 0 to 1",
        )
        _require(
            0 <= self.condition_dropout < 1,
            f"condition_dropout is {self.condition_dropout}, expected a number from 0 up to "
            f"below 1",
        )
