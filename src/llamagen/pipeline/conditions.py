"""What a pipeline is told to draw, as its transformer takes it.

Shapes: N images, L positions of the longest prompt, W width of a text feature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llamagen.generation.sequences import Blend
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels

if TYPE_CHECKING:
    from llamagen.text.encoder import TextEncoder

Prompts = str | int | Sequence[str | int]
"""Texts, or names or indices of classes; one or several."""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """One condition per image of a call."""

    condition: Tensor
    """Labels (N,), or text features (N, L, W), real ones last."""
    mask: Tensor | None
    """(N, L) bool, False where text features are padding."""
    described: list[dict[str, Any]]
    """Per image, what a picture's metadata say of it."""
    unconditional: Tensor | None = None
    """What guidance leads away from, if that is not the model's own "no condition"."""
    unconditional_mask: Tensor | None = None
    blend: Blend | None = None
    """What each is blended with."""

    def __len__(self) -> int:
        return self.condition.shape[0]

    def __getitem__(self, rows: slice) -> Conditions:
        """Those of some images."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        blend = self.blend
        if blend is not None:
            blend = Blend(blend.condition[rows], some(blend.mask), blend.share)
        return Conditions(
            self.condition[rows],
            some(self.mask),
            self.described[rows],
            some(self.unconditional),
            some(self.unconditional_mask),
            blend,
        )

    def arguments(self) -> dict[str, Any]:
        """What ``generate_codes`` is called with, beside the condition."""
        found: dict[str, Any] = {
            "condition_mask": self.mask,
            "unconditional": self.unconditional,
            "unconditional_mask": self.unconditional_mask,
        }
        # Not every engine can blend.
        return found if self.blend is None else {**found, "blend": self.blend}


def class_conditions(
    labels: Labels,
    wanted: Sequence[str | int],
    *,
    against: Sequence[str | int] | None = None,
    blend: Sequence[str | int] | None = None,
    share: float = 0.5,
    copies: int = 1,
) -> Conditions:
    """Labels of ``copies`` images of each class.

    Args:
        labels: the classes there are.
        wanted: classes by name or number.
        against: of each, the class that guidance leads away from.
        blend: of each, the class that it is blended with.
        share: how much that counts.
        copies: images of each.

    Raises:
        InputError: there is no such class.
    """

    def find(names: Sequence[str | int]) -> list[int]:
        return [labels.find(name) for name in names for _ in range(copies)]

    classes = find(wanted)
    described: list[dict[str, Any]] = [
        {"class": labels.name(index), "class_index": index} for index in classes
    ]
    others, mixed = None, None
    if against is not None:
        indices = find(against)
        others = torch.tensor(indices)
        for entry, index in zip(described, indices, strict=True):
            entry["negative_prompt"] = labels.name(index)
    if blend is not None:
        indices = find(blend)
        mixed = Blend(torch.tensor(indices), share=share)
        for entry, index in zip(described, indices, strict=True):
            entry |= {"blend": labels.name(index), "blend_share": share}
    return Conditions(torch.tensor(classes), None, described, others, blend=mixed)


def text_conditions(
    encoder: TextEncoder,
    wanted: Sequence[str],
    *,
    against: Sequence[str] | None = None,
    blend: Sequence[str] | None = None,
    share: float = 0.5,
    copies: int = 1,
) -> Conditions:
    """Features of ``copies`` images of each text.

    Args:
        encoder: reads the texts.
        wanted: texts.
        against: of each, the text that guidance leads away from.
        blend: of each, the text that it is blended with.
        share: how much that counts.
        copies: images of each.

    Raises:
        InputError: a text says nothing, or has control characters in it.
    """
    from llamagen.text.encoder import padded

    # Each text once, and whatever is wrong with one before the first is encoded.
    texts = [*wanted, *(against or ()), *(blend or ())]
    prepared = {text: encoder.require_text(text) for text in texts}
    encoder.token_ids(list(prepared.values()), warn=True)
    features = dict(zip(prepared, encoder.encode(list(prepared.values())), strict=True))
    length = max(map(len, features.values()))

    def rows(chosen: Sequence[str]) -> tuple[Tensor, Tensor]:
        return padded([features[text] for text in chosen for _ in range(copies)], length)

    described: list[dict[str, Any]] = [{"prompt": text} for text in wanted for _ in range(copies)]
    others: tuple[Tensor | None, Tensor | None] = (None, None)
    mixed = None
    if against is not None:
        others = rows(against)
        names = [text for text in against for _ in range(copies)]
        for entry, text in zip(described, names, strict=True):
            entry["negative_prompt"] = text
    if blend is not None:
        mixed = Blend(*rows(blend), share)
        names = [text for text in blend for _ in range(copies)]
        for entry, text in zip(described, names, strict=True):
            entry |= {"blend": text, "blend_share": share}
    return Conditions(*rows(wanted), described, *others, blend=mixed)


def embedded_conditions(embeds: Tensor, mask: Tensor | None, copies: int) -> Conditions:
    """Of ``copies`` images each, of text features (prompts, L, W) that somebody else has made."""
    if mask is not None:
        mask = mask.repeat_interleave(copies, dim=0)
    embeds = embeds.repeat_interleave(copies, dim=0)
    return Conditions(embeds, mask, [{} for _ in range(embeds.shape[0])])


def one_each(others: Prompts | None, prompts: int, what: str) -> list[str | int] | None:
    """One of ``others``, which are called ``what`` ("negative prompts"), per prompt.

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
