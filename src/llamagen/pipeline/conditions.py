"""Prompts and classes as the transformer takes them: one condition per prompt.

Shapes: C positions of a condition, W width of a text feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, tensor

from llamagen.generation.generate import without_padding
from llamagen.generation.request import GenerationRequest
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from llamagen.support.values import plain

if TYPE_CHECKING:
    from llamagen.text.encoder import TextEncoder

Prompts = str | int | Sequence[str | int]
"""Texts, or names or indices of classes; one or several."""


@dataclass(frozen=True, eq=False)
class Condition:
    """The condition that the images of one prompt share; see ``GenerationRequest``."""

    condition: Tensor
    """A label (), or text features (C, W) without padding."""
    negative: Tensor | None = None
    blend: Tensor | None = None
    blend_share: float = 0.5
    metadata: dict[str, Any] = field(default_factory=dict)
    """Its part of the images' metadata."""

    def request(self, **others: Any) -> GenerationRequest:
        """Return the request for one image of this condition; ``others`` are its other fields."""
        return GenerationRequest(
            condition=self.condition,
            negative=self.negative,
            blend=self.blend,
            blend_share=self.blend_share,
            **others,
        )


def read_prompts(
    reader: Labels | TextEncoder,
    prompts: Sequence[str | int],
    negative: Prompts | None,
    blend: Prompts | None,
    blend_share: float,
) -> list[Condition]:
    """Return the conditions of prompts, each with its negative one and the one it is blended with.

    Raises:
        InputError: there are not as many others as prompts, or one says nothing, has control
            characters in it, or names no class.
    """
    negatives = _one_each(negative, len(prompts), "negative prompts")
    blends = _one_each(blend, len(prompts), "prompts to blend with")
    texts = [text for text in (*prompts, *negatives, *blends) if text is not None]
    conditions: dict[str | int | None, Tensor]
    about: dict[str | int, dict[str, Any]]
    if isinstance(reader, Labels):
        found = {text: reader.find(text) for text in texts}
        conditions = {text: tensor(at) for text, at in found.items()}
        about = {text: {"class": reader.name(at), "class_index": at} for text, at in found.items()}
    else:
        # Each text once, and whatever is wrong with one before the first is encoded.
        prepared = {text: reader.require_text(str(text)) for text in texts}
        reader.token_ids(list(prepared.values()), warn=True)
        conditions = dict(zip(prepared, reader.encode(list(prepared.values())), strict=True))
        about = {text: {"prompt": str(text)} for text in prepared}
    names = {text: next(iter(values.values())) for text, values in about.items()}
    made = []
    for prompt, against, second in zip(prompts, negatives, blends, strict=True):
        metadata = dict(about[prompt])
        if against is not None:
            metadata["negative_prompt"] = names[against]
        if second is not None:
            metadata |= {"blend": names[second], "blend_share": blend_share}
        others = conditions.get(against), conditions.get(second)
        made.append(Condition(conditions[prompt], *others, blend_share, metadata))
    return made


def listed(prompts: Prompts, count: int = 1) -> list[str | int]:
    """Return prompts as a list, a single one ``count`` times.

    InputError if one is neither a text nor an integer.
    """
    given: Any = plain(prompts)
    is_single = isinstance(given, str | bytes) or not isinstance(given, Iterable)
    each = [given] * count if is_single else [plain(prompt) for prompt in given]
    for prompt in each:
        if not isinstance(prompt, str | int) or isinstance(prompt, bool):
            raise InputError(
                f"a prompt is {prompt!r}, expected a text, or the name or index of a class"
            )
    return each


def _one_each(others: Prompts | None, prompts: int, what: str) -> Sequence[str | int | None]:
    """Return one of ``others``, which are called ``what``, for each prompt."""
    if others is None:
        return [None] * prompts
    each = listed(others, prompts)
    if len(each) != prompts:
        raise InputError(f"{len(each)} {what} for {prompts} prompts; give one, or one per prompt")
    return each


def embedded_conditions(embeds: Tensor, mask: Tensor | None) -> list[Condition]:
    """Return the conditions of text features (prompts, L, W) that somebody else has made."""
    if embeds.ndim != 3:
        raise InputError(
            f"prompt_embeds have shape {tuple(embeds.shape)}, expected (prompts, length, width)"
        )
    return [Condition(features) for features in without_padding(embeds, mask)]
