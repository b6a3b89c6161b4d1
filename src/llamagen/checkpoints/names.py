"""The published models: a name for each, and where its file is."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Literal

from llamagen.checkpoints.index import is_pipeline_folder
from llamagen.config import Grid, SamplingConfig, TextConfig

_FOLDER = Path(__file__).parent.parent / "assets" / "models"


def shipped_models() -> list[str]:
    """Their names."""
    if not _FOLDER.is_dir():
        return []
    return sorted(path.name for path in _FOLDER.iterdir() if is_pipeline_folder(path))


def find_shipped(name: str) -> Path | None:
    """The folder of the shipped model called ``name``, in any case; None if there is none."""
    wanted = name.lower()
    return _FOLDER / wanted if wanted in shipped_models() else None


Kind = Literal["image tokenizer", "transformer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicModel:
    """A file that the authors of LlamaGen published."""

    name: str
    """What it is called here."""
    repo: str
    """Repository on the hub."""
    file: str
    """File in the repository."""
    kind: Kind = "transformer"
    preset: str
    """Its architecture, in ``TOKENIZER_PRESETS`` or ``TRANSFORMER_PRESETS``."""
    condition: Literal["class", "text"] = "class"
    """What a transformer is conditioned on."""
    grid: Grid = (16, 16)
    """Rows and columns of codes that a transformer was trained on: its images' sides / 16."""
    tokenizer: str | None = None
    """Name of the image tokenizer whose codes a transformer draws."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """Settings that a transformer's published demo draws with."""
    text: TextConfig | None = None
    """What makes the features that a transformer is conditioned on, if it is on text."""


_MAIN = "FoundationVision/LlamaGen"
_TEXT = "peizesun/llamagen_t2i"
_CLASS_DEMO = SamplingConfig(guidance_scale=4.0, top_k=2000)
_TEXT_DEMO = SamplingConfig(guidance_scale=7.5, top_k=1000)


def _tokenizer(name: str, repo: str, file: str, preset: str) -> PublicModel:
    return PublicModel(name=name, repo=repo, file=file, kind="image tokenizer", preset=preset)


def _by_class(name: str, file: str, preset: str, side: int) -> PublicModel:
    return PublicModel(
        name=name,
        repo=_MAIN,
        file=file,
        preset=preset,
        grid=(side, side),
        tokenizer="vq-16",
        sampling=_CLASS_DEMO,
    )


def _by_text(name: str, file: str, preset: str, side: int) -> PublicModel:
    return PublicModel(
        name=name,
        repo=_TEXT,
        file=file,
        preset=preset,
        condition="text",
        grid=(side, side),
        tokenizer="vq-16-t2i",
        sampling=_TEXT_DEMO,
        text=TextConfig(),
    )


PUBLIC_MODELS: tuple[PublicModel, ...] = (
    _tokenizer("vq-16", _MAIN, "vq_ds16_c2i.pt", "VQ-16"),
    _tokenizer("vq-8", _MAIN, "vq_ds8_c2i.pt", "VQ-8"),
    _tokenizer("vq-16-t2i", _TEXT, "vq_ds16_t2i.pt", "VQ-16"),
    _by_class("c2i-B-256", "c2i_B_256.pt", "B", 16),
    _by_class("c2i-B-384", "c2i_B_384.pt", "B", 24),
    _by_class("c2i-L-256", "c2i_L_256.pt", "L", 16),
    _by_class("c2i-L-384", "c2i_L_384.pt", "L", 24),
    _by_class("c2i-XL-384", "c2i_XL_384.pt", "XL", 24),
    _by_class("c2i-XXL-384", "c2i_XXL_384.pt", "XXL", 24),
    _by_class("c2i-3B-384", "c2i_3B_384.pt", "3B", 24),
    _by_text("t2i-XL-256", "t2i_XL_stage1_256.pt", "XL", 16),
    _by_text("t2i-XL-512", "t2i_XL_stage2_512.pt", "XL", 32),
)
"""Every published model."""


def demo_sampling(condition: Literal["class", "text"]) -> SamplingConfig:
    """Settings of the published demos, by what the transformer is conditioned on."""
    return _CLASS_DEMO if condition == "class" else _TEXT_DEMO


def find_public(name: str) -> PublicModel | None:
    """The published model called ``name``, in any case; None if there is none."""
    for model in PUBLIC_MODELS:
        if model.name.lower() == name.lower():
            return model
    return None


def nearest_names(name: str) -> list[str]:
    """Up to three names of known models that ``name`` may be a misspelling of."""
    known = {
        known.lower(): known for known in [*shipped_models(), *(m.name for m in PUBLIC_MODELS)]
    }
    wanted = name.lower().replace("_", "-")
    return [known[near] for near in difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)]
