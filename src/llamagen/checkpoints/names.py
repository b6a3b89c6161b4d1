"""Published models and their files."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from llamagen.config import (
    TOKENIZER_PRESETS,
    TRANSFORMER_PRESETS,
    Grid,
    Order,
    SamplingConfig,
    TextConfig,
    TokenizerConfig,
    TransformerConfig,
    default_sampling,
)

Kind = Literal["image tokenizer", "transformer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicModel:
    """A file that the authors of LlamaGen, or of a model built on it, published."""

    name: str
    repo: str
    file: str
    kind: Kind = "transformer"
    preset: str
    """Architecture, in ``TOKENIZER_PRESETS`` or ``TRANSFORMER_PRESETS``."""
    condition: Literal["class", "text"] = "class"
    grid: Grid = (16, 16)
    """Rows and columns of codes that a transformer was trained on: its images' sides / 16."""
    order: Order = "raster"
    """Order in which a transformer predicts codes."""
    tokenizer: str | None = None
    """Name of a transformer's image tokenizer."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """Settings of a transformer's published demo."""
    text: TextConfig | None = None

    @property
    def config(self) -> TokenizerConfig | TransformerConfig:
        """The model's configuration."""
        if self.kind == "image tokenizer":
            return TOKENIZER_PRESETS[self.preset]
        config = TRANSFORMER_PRESETS[self.preset]
        return dataclasses.replace(
            config, condition=self.condition, grid=self.grid, order=self.order
        )


_CLASS_DEMO = SamplingConfig(guidance_scale=4.0, top_k=2000)
_TEXT_DEMO = SamplingConfig(guidance_scale=7.5, top_k=1000)

_C2I: dict[str, Any] = {
    "repo": "FoundationVision/LlamaGen",
    "tokenizer": "vq-16",
    "sampling": _CLASS_DEMO,
}
_T2I: dict[str, Any] = {
    "repo": "peizesun/llamagen_t2i",
    "tokenizer": "vq-16-t2i",
    "sampling": _TEXT_DEMO,
    "condition": "text",
    "text": TextConfig(),
}


def _randar(name: str, size: str, preset: str, scale: float) -> PublicModel:
    """A model of RandAR (2412.01827); ``scale`` is its best, at the end of a linear schedule."""
    file = f"randar_{size}_llamagen_360k_bs_1024_lr_0.0004.safetensors"
    sampling = SamplingConfig(guidance_scale=scale, guidance_schedule="linear", steps=88)
    own: dict[str, Any] = {"repo": "ziqipang/RandAR", "tokenizer": "vq-16", "order": "random"}
    return PublicModel(name=name, file=file, preset=preset, sampling=sampling, **own)


def _vq(name: str, repo: str, file: str, preset: str) -> PublicModel:
    return PublicModel(name=name, repo=repo, file=file, kind="image tokenizer", preset=preset)


def _ar(family: dict[str, Any], name: str, file: str, preset: str, side: int) -> PublicModel:
    return PublicModel(name=name, file=file, preset=preset, grid=(side, side), **family)


PUBLIC_MODELS: tuple[PublicModel, ...] = (
    _vq("vq-16", _C2I["repo"], "vq_ds16_c2i.pt", "VQ-16"),
    _vq("vq-8", _C2I["repo"], "vq_ds8_c2i.pt", "VQ-8"),
    _vq("vq-16-t2i", _T2I["repo"], "vq_ds16_t2i.pt", "VQ-16"),
    _ar(_C2I, "c2i-B-256", "c2i_B_256.pt", "B", 16),
    _ar(_C2I, "c2i-B-384", "c2i_B_384.pt", "B", 24),
    _ar(_C2I, "c2i-L-256", "c2i_L_256.pt", "L", 16),
    _ar(_C2I, "c2i-L-384", "c2i_L_384.pt", "L", 24),
    _ar(_C2I, "c2i-XL-384", "c2i_XL_384.pt", "XL", 24),
    _ar(_C2I, "c2i-XXL-384", "c2i_XXL_384.pt", "XXL", 24),
    _ar(_C2I, "c2i-3B-384", "c2i_3B_384.pt", "3B", 24),
    _randar("randar-L-256", "0.3b", "L", 3.4),
    _randar("randar-XL-256", "0.7b", "XL", 4.0),
    _ar(_T2I, "t2i-XL-256", "t2i_XL_stage1_256.pt", "XL", 16),
    _ar(_T2I, "t2i-XL-512", "t2i_XL_stage2_512.pt", "XL", 32),
)


def demo_sampling(config: TransformerConfig) -> SamplingConfig:
    """Return the settings of the published demos with models of this kind."""
    if config.order == "random":
        return default_sampling(config)
    return _CLASS_DEMO if config.condition == "class" else _TEXT_DEMO


def find_public(name: str) -> PublicModel | None:
    """Return the published model of a name, in any case."""
    return next((model for model in PUBLIC_MODELS if model.name.lower() == name.lower()), None)
