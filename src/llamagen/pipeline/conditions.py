"""Prompts and classes as the transformer takes them: one condition per prompt.

Shapes: C positions of a condition, W width of a text feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, tensor

from llamagen.config import SamplingConfig
from llamagen.generation.generate import without_padding
from llamagen.generation.request import GenerationRequest
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

if TYPE_CHECKING:
    from llamagen.text.encoder import TextEncoder

Prompts = str | int | Sequence[str | int]
"""Texts, or names or indices of classes; one or several."""


@dataclass(frozen=True, eq=False)
class Condition:
    """The condition that the images of one prompt share."""

    condition: Tensor
    """A label (), or text features (C, W) without padding."""
    negative: Tensor | None = None
    """The negative condition of guidance; None for the model's own "no condition"."""
    blend: Tensor | None = None
    """A second condition whose logits are mixed in."""
    blend_share: float = 0.5
    metadata: dict[str, Any] = field(default_factory=dict)
    """Its part of the images' metadata."""

    def request(
        self,
        *,
        seed: int,
        sampling: SamplingConfig,
        known_codes: Tensor | None = None,
        window: int | None = None,
    ) -> GenerationRequest:
        """Return the request for one image of this condition."""
        return GenerationRequest(
            condition=self.condition,
            seed=seed,
            sampling=sampling,
            negative=self.negative,
            blend=self.blend,
            blend_share=self.blend_share,
            known_codes=known_codes,
            window=window,
        )


Reader = Callable[[str | int], tuple[Tensor, dict[str, Any]]]
"""Returns the condition of a prompt, and its metadata, the prompt's name first."""


def class_reader(labels: Labels) -> Reader:
    """Return a reader of names and indices of classes, which raises InputError for others."""

    def read(name: str | int) -> tuple[Tensor, dict[str, Any]]:
        index = labels.find(name)
        return tensor(index), {"class": labels.name(index), "class_index": index}

    return read


def text_reader(encoder: TextEncoder, texts: Sequence[str | int]) -> Reader:
    """Return a reader of these texts.

    Raises:
        InputError: a text says nothing, or has control characters in it.
    """
    # Each text once, and whatever is wrong with one before the first is encoded.
    prepared = {text: encoder.require_text(text) for text in map(str, texts)}
    encoder.token_ids(list(prepared.values()), warn=True)
    features = dict(zip(prepared, encoder.encode(list(prepared.values())), strict=True))
    return lambda text: (features[str(text)], {"prompt": str(text)})


def read_conditions(
    read: Reader,
    prompts: Sequence[str | int],
    *,
    negative: Sequence[str | int] | None = None,
    blend: Sequence[str | int] | None = None,
    blend_share: float = 0.5,
) -> list[Condition]:
    """Return the conditions of prompts, each with its negative one and the one it is blended with.

    Raises:
        InputError: ``read`` refuses one of them.
    """
    found = []
    for number, prompt in enumerate(prompts):
        condition, metadata = read(prompt)
        own_negative, own_blend = None, None
        if negative is not None:
            own_negative, about = read(negative[number])
            metadata["negative_prompt"] = next(iter(about.values()))
        if blend is not None:
            own_blend, about = read(blend[number])
            metadata |= {"blend": next(iter(about.values())), "blend_share": blend_share}
        found.append(Condition(condition, own_negative, own_blend, blend_share, metadata))
    return found


def embedded_conditions(embeds: Tensor, mask: Tensor | None) -> list[Condition]:
    """Return the conditions of text features (prompts, L, W) that somebody else has made."""
    if embeds.ndim != 3:
        raise InputError(
            f"prompt_embeds have shape {tuple(embeds.shape)}, expected (prompts, length, width)"
        )
    return [Condition(features) for features in without_padding(embeds, mask)]


def one_each(others: Prompts | None, prompts: int, what: str) -> list[str | int] | None:
    """Return one of ``others``, which are called ``what`` ("negative prompts"), per prompt.

    Raises:
        InputError: there are several, but not as many as prompts.
    """
    if others is None:
        return None
    if isinstance(others, str | int):
        return [others] * prompts
    if len(others) != prompts:
        raise InputError(f"{len(others)} {what} for {prompts} prompts; give one, or one per prompt")
    return list(others)
