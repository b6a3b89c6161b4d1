"""What a pipeline is told to draw, as its transformer takes it.

Shapes: N images, L positions of the longest prompt, W width of a text feature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llamagen.errors import InputError
from llamagen.labels import Labels

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

    def __len__(self) -> int:
        return self.condition.shape[0]


def class_conditions(
    labels: Labels, wanted: Sequence[str | int], against: Sequence[str | int] | None, copies: int
) -> Conditions:
    """Labels of ``copies`` images of each class.

    Raises:
        InputError: there is no such class.
    """
    classes = [labels.find(name) for name in wanted for _ in range(copies)]
    described: list[dict[str, Any]] = [
        {"class": labels.name(index), "class_index": index} for index in classes
    ]
    if against is None:
        return Conditions(torch.tensor(classes), None, described)
    others = [labels.find(name) for name in against for _ in range(copies)]
    for entry, index in zip(described, others, strict=True):
        entry["negative_prompt"] = labels.name(index)
    return Conditions(torch.tensor(classes), None, described, torch.tensor(others))


def text_conditions(
    encoder: TextEncoder, wanted: Sequence[str], against: Sequence[str] | None, copies: int
) -> Conditions:
    """Features of ``copies`` images of each text.

    Raises:
        InputError: a text says nothing, or has control characters in it.
    """
    from llamagen.text.encoder import padded

    # Each text once, and whatever is wrong with one before the first is encoded.
    prepared = {text: encoder.require_text(text) for text in [*wanted, *(against or ())]}
    encoder.token_ids(list(prepared.values()), warn=True)
    features = dict(zip(prepared, encoder.encode(list(prepared.values())), strict=True))
    length = max(map(len, features.values()))

    def rows(chosen: Sequence[str]) -> tuple[Tensor, Tensor]:
        return padded([features[text] for text in chosen for _ in range(copies)], length)

    described: list[dict[str, Any]] = [{"prompt": text} for text in wanted for _ in range(copies)]
    if against is None:
        return Conditions(*rows(wanted), described)
    others = [text for text in against for _ in range(copies)]
    for entry, text in zip(described, others, strict=True):
        entry["negative_prompt"] = text
    return Conditions(*rows(wanted), described, *rows(against))


def one_each(negative: Prompts | None, prompts: int) -> list[str | int] | None:
    """One negative prompt per prompt.

    Raises:
        InputError: there are several, but not as many as prompts.
    """
    if negative is None:
        return None
    if isinstance(negative, str | int):
        return [negative] * prompts
    if len(negative) != prompts:
        raise InputError(
            f"{len(negative)} negative prompts for {prompts} prompts; give one, or one per prompt"
        )
    return list(negative)
