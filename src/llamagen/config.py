"""Configurations of the two models, the sampling settings, and the presets.

Frozen, keyword-only dataclasses that validate themselves, turn into JSON and come back. Nothing
here imports torch, so a command line can describe its options without paying for it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import dacite

from llamagen.support.errors import InputError, one_line
from llamagen.support.storage import read_json as read_json  # noqa: PLC0414  # offered here too
from llamagen.support.values import plain

ConfigT = TypeVar("ConfigT")

Grid = tuple[int, int]
"""Rows and columns of an image's codes."""


def config_from_dict(cls: type[ConfigT], values: Mapping[str, Any], source: str) -> ConfigT:
    """Build the dataclass ``cls`` from plain values, as read from JSON or YAML at ``source``.

    Raises InputError, which names the source, if a key is unknown or missing, a value has the wrong
    type, or the configuration refuses the combination.
    """
    types = dacite.Config(strict=True, type_hooks={Path: lambda path: Path(str(path))})
    try:
        return dacite.from_dict(cls, _with_tuples(values), types)
    except (dacite.DaciteError, InputError) as error:
        raise InputError(f"{source}: {one_line(error)}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: an object is where a list belongs; write [...]") from error


def _with_tuples(value: Any) -> Any:
    """Return plain values with tuples for lists: JSON has only these, configurations only those."""
    if isinstance(value, Mapping):
        return {name: _with_tuples(each) for name, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


def non_default_fields(config: Any, implemented: Collection[str]) -> list[str]:
    """Return the fields that are not at their defaults, except those ``implemented``.

    A backend that refuses a configuration with any never ignores a new field silently.
    """
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in implemented and getattr(config, field.name) != field.default
    ]


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as values that JSON can hold, without added fields at defaults."""

    def plain(value: Any) -> Any:
        return {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if not field.metadata.get("added") or getattr(value, field.name) != field.default
        }

    found: dict[str, Any] = json.loads(json.dumps(plain(config), default=plain))
    return found


def _added(default: Any) -> Any:
    """Return a field that came later: written off its default only, so old fingerprints stay."""
    return dataclasses.field(default=default, metadata={"added": True})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_positive(config: Any, *names: str) -> None:
    """Raise InputError if one of these fields is there and below 1."""
    for name in names:
        value = getattr(config, name)
        _require(value is None or value >= 1, f"{name} is {value}, expected at least 1")


def _require_fraction(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0.0 <= value < 1.0, f"{name} is {value}, expected a number from 0 up to below 1")


QUANTIZERS = {"vq": "VectorQuantizer"}
"""Quantisers of image tokenizers: the module in ``models.tokenizer.quantizers``, and its class."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of the image tokenizer (paper section 3.1; the defaults are VQ-16)."""

    quantizer: str = _added("vq")
    """Makes codes of latents: vq, the nearest vector of a trained codebook."""
    codebook_size: int = 16384
    """Number of codes."""
    codebook_dim: int = 8
    """Length of a codebook vector."""
    codebook_l2_norm: bool = True
    """Compare latents and codebook vectors after normalising both to length 1."""
    base_channels: int = 128
    """Channels after the first convolution; each level has this times its multiplier."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """One entry per resolution level, highest first; each further level halves the resolution."""
    encoder_blocks: int = 2
    """Residual blocks per level of the encoder."""
    decoder_blocks: int = 3
    """Residual blocks per level of the decoder."""
    z_channels: int = 256
    """Channels between the convolutional part and the projection to the codebook's dimension."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""
    dropout: float = 0.0
    """Dropout inside residual blocks, in training."""

    def __post_init__(self) -> None:
        require_positive(self, "codebook_size", "codebook_dim", "base_channels", "z_channels")
        require_positive(self, "encoder_blocks", "decoder_blocks", "norm_groups")
        _require_fraction(self, "dropout")
        if self.quantizer not in QUANTIZERS:
            known = ", ".join(QUANTIZERS)
            raise InputError(f"quantizer is {self.quantizer!r}, expected one of {known}")
        _require(len(self.channel_multipliers) >= 1, "channel_multipliers is empty")
        for multiplier in self.channel_multipliers:
            channels = self.base_channels * multiplier
            _require(
                multiplier >= 1 and channels % self.norm_groups == 0,
                f"base_channels {self.base_channels} times multiplier {multiplier} is {channels}, "
                f"expected a positive multiple of norm_groups {self.norm_groups}",
            )

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def grid_of(self, height: int, width: int) -> Grid:
        """Return the grid of codes of an image of ``height`` x ``width`` pixels.

        Raises InputError if a side is not a positive multiple of the downsampling.
        """
        factor = self.downsampling
        if min(height, width) < factor or height % factor or width % factor:
            raise InputError(
                f"an image of {width}x{height} pixels cannot be encoded: both sides must be "
                f"positive multiples of the tokenizer's downsampling {factor}; resize or crop it"
            )
        return height // factor, width // factor


def swiglu_hidden_dim(dim: int, *, multiplier: float | None = None, multiple_of: int = 256) -> int:
    """Return the SwiGLU layer's hidden size: 8/3 of ``dim`` (times ``multiplier``), rounded up."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


Order = Literal["raster", "random"]
Quantization = Literal["int8"]
KVCacheDType = Literal["auto", "int8"]
"""Precision of what is kept of earlier codes; auto is that of the weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerArchitecture:
    """The fields of ``TransformerConfig`` that do not depend on the data: what a recipe chooses."""

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
    qk_norm: bool = _added(False)
    """RMSNorm of each head's queries and keys, before the rotary embedding."""
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
    order: Order = _added("raster")  # noqa: RUF009  # a field
    """Order in which codes are predicted: raster, one by one; or random, any order and several at a
    time (RandAR, 2412.01827)."""

    def __post_init__(self) -> None:
        require_positive(self, "dim", "layers", "heads", "hidden_dim")
        if str(self.order) not in ("raster", "random"):
            raise InputError(f"order is {self.order!r}, expected 'raster' or 'random'")
        _require(
            self.dim % self.heads == 0 and (self.dim // self.heads) % 4 == 0,
            f"dim {self.dim} over {self.heads} heads must give a head dimension that is a "
            f"multiple of 4 (2-D RoPE rotates pairs by row and by column)",
        )
        if self.num_kv_heads < 1 or self.heads % self.num_kv_heads:
            raise InputError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        for name in ("rope_base", "norm_eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"{name} is {value}, expected a positive number")
        _require_fraction(self, "token_dropout", "attention_dropout", "residual_dropout")
        _require_fraction(self, "ffn_dropout", "drop_path")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, whether given or not."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden size of the feed-forward layer, whether given or not."""
        return swiglu_hidden_dim(self.dim) if self.hidden_dim is None else self.hidden_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(TransformerArchitecture):
    """Architecture of the autoregressive model (paper section 3.2; the defaults are c2i B, 256)."""

    codebook_size: int = 16384
    """Number of codes, as in the image tokenizer."""
    grid: Grid = (16, 16)
    """Rows and columns of codes that the model was trained on."""
    condition: Literal["class", "text"] = "class"
    """Kind of condition: a class label or text features."""
    num_classes: int = 1000
    """Number of classes, without "no class" (condition "class")."""
    text_length: int = 120
    """Number of text features in front of the codes (condition "text")."""
    text_dim: int = 2048
    """Length of a text feature (condition "text")."""
    quantization: str | None = None
    """Integers in the place of the matrices' weights: "int8", or None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "codebook_size", "num_classes", "text_length", "text_dim")
        if min(self.grid) < 1:
            raise InputError(f"grid is {self.grid}, expected two positive numbers (rows, columns)")
        if str(self.condition) not in ("class", "text"):
            raise InputError(f"condition is {self.condition!r}, expected 'class' or 'text'")
        if self.quantization == "int4":
            raise InputError(
                "quantization int4 is no longer supported; convert the original again, with int8"
            )
        if self.quantization not in (None, "int8"):
            raise InputError(f"quantization is {self.quantization!r}, expected 'int8' or none")

    @property
    def architecture(self) -> TransformerArchitecture:
        """The part that does not depend on the data."""
        fields = dataclasses.fields(TransformerArchitecture)
        return TransformerArchitecture(**{each.name: getattr(self, each.name) for each in fields})

    @property
    def condition_length(self) -> int:
        """Positions that the condition takes in front of the codes."""
        return 1 if self.condition == "class" else self.text_length

    @property
    def num_codes(self) -> int:
        """Codes per image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens_per_code(self) -> int:
        """Positions that each code takes: with its query, in random order, two."""
        return 2 if self.order == "random" else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Encoding of prompts as text features (paper section 3.2)."""

    encoder: str = "google/flan-t5-xl"
    """An encoder of the T5 family: hub repository or folder; empty for the pipeline's own one."""
    max_length: int = 120
    """Tokens of a caption that are read."""
    clean: bool = True
    """Clean captions as those that the published models were trained with."""

    def __post_init__(self) -> None:
        require_positive(self, "max_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallTextEncoderConfig:
    """Architecture of a text encoder of one's own: T5's, over bytes."""

    dim: int = 256
    """Width of its features."""
    layers: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads; they divide dim."""
    hidden_dim: int | None = None
    """Hidden size of the gated feed-forward layer; None means twice dim."""
    dropout: float = 0.1
    """Dropout everywhere, in training."""
    max_length: int = 120
    """Bytes of a caption that are read, with one for its end."""

    def __post_init__(self) -> None:
        require_positive(self, "dim", "layers", "heads", "hidden_dim", "max_length")
        _require_fraction(self, "dropout")
        if self.dim % self.heads:
            raise InputError(f"heads {self.heads} must divide the text's dim {self.dim}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Declaration of one sampling setting, from which whatever users meet derives.

    That is the command line, HTTP schema, web page, image metadata, evaluation settings and vLLM's
    extra arguments, so a new setting is one row in ``SamplingConfig``.
    """

    help: str
    """One or two sentences for users: of flags, of the HTTP API and on the page."""
    minimum: float | None = None
    exclusive_minimum: bool = False
    """Whether ``minimum`` itself is too small."""
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    """The values of a setting that is a word."""
    name: str = ""
    """The field's name: also the flag, the JSON field and the metadata key."""
    default: float | int | str | None = None
    optional: bool = False
    """Whether None is a value: where it is the default."""
    random_order: bool = False
    """Whether only models of random order have it."""

    @property
    def type(self) -> type[float] | type[int] | type[str]:
        """Python type of its values, None aside."""
        return str if self.choices else float if isinstance(self.default, float) else int

    @property
    def annotation(self) -> Any:
        """Type of its values in a schema, None aside: float, int or a Literal of its choices."""
        return Literal.__getitem__(self.choices) if self.choices else self.type

    def parse(self, value: Any) -> Any:
        """Return ``value`` as a plain number or word; raise InputError if it does not fit."""
        value = plain(value)
        if value is None and self.optional:
            return None
        if self.choices:
            fits = value in self.choices
        else:
            is_number = isinstance(value, numbers.Integral if self.type is int else numbers.Real)
            fits = is_number and not isinstance(value, bool) and abs(value) < math.inf
            if fits and self.minimum is not None:
                fits = value > self.minimum if self.exclusive_minimum else value >= self.minimum
            fits = fits and (self.maximum is None or value <= self.maximum)
        _require(fits, f"{self.name} is {value!r}, expected {self.described_range}")
        return self.type(value)

    @property
    def described_range(self) -> str:
        """The values it can have, as messages say it."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kind = "a finite number" if self.type is float else "an integer"
        if self.minimum is None:
            return kind
        lower = "above" if self.exclusive_minimum else "of at least"
        upper = "" if self.maximum is None else f" and at most {self.maximum:.10g}"
        none = ", or none" if self.optional else ""
        return f"{kind} {lower} {self.minimum:g}{upper}{none}"


def _setting(default: Any, help: str, **declared: Any) -> Any:  # noqa: A002
    setting = Setting(help=help, default=default, optional=default is None, **declared)
    return dataclasses.field(default=default, metadata={"setting": setting})


MAX_INTEGER = 2**31 - 1
_COUNT = {"minimum": 0, "maximum": MAX_INTEGER}
_SCALE = {"minimum": 0, "maximum": 1000}
_SHARE = {"minimum": 0, "maximum": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of sampling codes from the transformer's logits (paper sections 3.3 and 4.2).

    The order is fixed: guidance, temperature, top-k, top-p, min-p, draw.
    """

    guidance_scale: float = _setting(
        4.0,
        "How closely images follow the prompt or class (classifier-free guidance); 1 is none.",
        **_SCALE,
    )
    guidance_schedule: str = _setting(
        "constant",
        "How the scale changes over an image's codes: constant, linear from guidance_start to "
        "guidance_scale (RandAR), or power-cosine from 1 to guidance_scale (RAR).",
        choices=("constant", "linear", "power-cosine"),
    )
    guidance_start: float = _setting(1.0, "Scale of the first code in a linear schedule.", **_SCALE)
    guidance_power: float = _setting(
        2.75, "Exponent of a power-cosine schedule; 0 is a constant scale.", **_SCALE
    )
    guidance_stop: int | None = _setting(
        None, "Index of the first code sampled without guidance; none guides every code.", **_COUNT
    )
    temperature: float = _setting(
        1.0,
        "Below 1 for less variety, above 1 for more; 0 always takes the most likely code.",
        **_SCALE,
    )
    top_k: int = _setting(
        0, "Sample from the k most likely codes, and ties with the k-th; 0 is all.", **_COUNT
    )
    top_p: float = _setting(
        1.0,
        "Sample from the most likely codes that together reach probability p; 1 is all.",
        **_SHARE,
        exclusive_minimum=True,
    )
    min_p: float = _setting(
        0.0,
        "Keep only codes at least this many times as likely as the most likely one; 0 keeps all.",
        **_SHARE,
    )
    steps: int | None = _setting(
        None,
        "Passes in which a model of random order draws an image; none takes 88 for 256 codes.",
        minimum=1,
        maximum=MAX_INTEGER,
        random_order=True,
    )
    generation_order: str = _setting(
        "random",
        "Codes that a model of random order draws in one pass: random ones, or local ones, near to "
        "what is drawn and far from each other (LPD).",
        choices=("random", "local"),
        random_order=True,
    )

    def __post_init__(self) -> None:
        for setting in sampling_settings():
            object.__setattr__(self, setting.name, setting.parse(getattr(self, setting.name)))

    @property
    def guided(self) -> bool:
        """Whether any code needs the unconditional sequence."""
        starts_guided = self.guidance_schedule == "linear" and self.guidance_start != 1.0
        return (self.guidance_scale != 1.0 or starts_guided) and self.guidance_stop != 0

    def replace(self, **values: Any) -> SamplingConfig:
        """Return a copy with other values; those that are None are left as they are.

        Raises InputError if there is no such setting, or a value lies outside its range.
        """
        known = [setting.name for setting in sampling_settings()]
        for name in values:
            _require(name in known, f"there is no setting {name!r}; choose from {', '.join(known)}")
        given = {name: value for name, value in values.items() if value is not None}
        return dataclasses.replace(self, **given)


def default_sampling(model: TransformerConfig) -> SamplingConfig:
    """Return the settings for a model that came with none."""
    return SamplingConfig(guidance_schedule="linear" if model.order == "random" else "constant")


@functools.cache
def sampling_settings() -> tuple[Setting, ...]:
    """Return the declarations of all fields of ``SamplingConfig``, in their order."""
    return tuple(
        dataclasses.replace(each.metadata["setting"], name=each.name)
        for each in dataclasses.fields(SamplingConfig)
    )


# For Python's help() and the training commands' --help.
SamplingConfig.__doc__ = f"{SamplingConfig.__doc__}\n    Attributes:\n" + "\n".join(
    f"        {setting.name}: {setting.help}" for setting in sampling_settings()
)


TOKENIZER_PRESETS: dict[str, TokenizerConfig] = {
    "VQ-16": TokenizerConfig(),  # 71,883,403 parameters
    "VQ-8": TokenizerConfig(channel_multipliers=(1, 2, 2, 4)),  # 70,109,835
}

TRANSFORMER_PRESETS: dict[str, TransformerConfig] = {  # parameters with 1000 classes
    "B": TransformerConfig(dim=768, layers=12, heads=12),  # 110,888,448
    "L": TransformerConfig(dim=1024, layers=24, heads=16),  # 342,910,976
    "XL": TransformerConfig(dim=1280, layers=36, heads=20),  # 774,699,520 (text 777,678,080)
    "XXL": TransformerConfig(dim=1536, layers=48, heads=24),  # 1,410,972,672
    "XXXL": TransformerConfig(dim=2560, layers=48, heads=40),  # 3,893,027,840
    "1B": TransformerConfig(dim=2048, layers=22, heads=32),  # 1,199,616,000
    "3B": TransformerConfig(dim=3200, layers=24, heads=32),  # 3,096,659,200
    "7B": TransformerConfig(dim=4096, layers=32, heads=32),  # 6,614,589,440
}


def preset(presets: Mapping[str, ConfigT], name: str) -> ConfigT:
    """Return the preset of a name, ignoring case; raise InputError with all names if none fits."""
    for known, config in presets.items():
        if known.lower() == name.lower():
            return config
    raise InputError(f"there is no preset {name!r}; choose one of {', '.join(presets)}")
