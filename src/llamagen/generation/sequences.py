"""The sequences that a batch of images needs: one of each image, and with guidance two.

Shapes: B images, R sequences, C condition length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.config import SamplingConfig
from llamagen.generation.seeds import check_seed
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError


@dataclasses.dataclass(frozen=True)
class Blend:
    """A second condition of each image: its logits are mixed with those of the first.

    Probabilities are then in proportion to p1^(1 - share) p2^share.
    """

    condition: Tensor
    """Shaped like the first one: labels (B,) or text features (B, C, text_dim), real ones last."""
    mask: Tensor | None = None
    """(B, C) bool, False where text features are padding; by default that of the first one."""
    share: float = 0.5
    """How much it counts, from 0 to 1."""

    def __post_init__(self) -> None:
        check_share(self.share)


def check_share(share: float) -> float:
    """Returns how much the second of two conditions counts.

    Raises:
        InputError: it lies outside 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise InputError(f"blend_share is {share}, expected a number from 0 to 1")
    return share


class Sequences(NamedTuple):
    """The conditions of a batch's sequences: of all images, then blended, then unconditional."""

    images: int
    """B."""
    condition: Tensor
    """Labels (R,) or text features (R, C, text_dim) on the model's device; R is B, and B more for
    a blend, and for guidance."""
    mask: Tensor | None
    """(R, C) bool, False where text features are padding; None if none are."""
    guided: bool = False
    """Whether images have unconditional sequences."""

    def by_length(self) -> list[tuple[list[int], Tensor]]:
        """The sequences in groups whose conditions are equally long without their padding.

        Exact: padding is never attended to, and condition positions carry no position of their
        own (see ``rope_table``).

        Returns:
            Per group, which sequences it has and their conditions.

        Raises:
            InputError: a condition is nothing but padding.
        """
        if self.mask is None:
            return [(list(range(len(self.condition))), self.condition)]
        lengths = self.mask.sum(-1).tolist()
        if 0 in lengths:
            raise InputError(
                "the condition mask leaves no text feature of an image; each needs at least one"
            )
        groups = []
        for length in sorted(set(lengths)):
            members = [row for row, own in enumerate(lengths) if own == length]
            kept = [self.condition[row][self.mask[row]] for row in members]
            groups.append((members, torch.stack(kept)))
        return groups


def sequences_of(
    model: Transformer,
    condition: Tensor,
    *,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    condition_mask: Tensor | None = None,
    unconditional: Tensor | None = None,
    unconditional_mask: Tensor | None = None,
    blend: Blend | None = None,
) -> Sequences:
    """Makes one batch of what ``generate_codes`` is given, without the padding all rows share.

    Raises:
        InputError: condition, masks or seeds do not fit the model or each other.
    """
    condition = condition.to(model.device)
    model.cls_embedding.check(condition)
    images = condition.shape[0]
    if len(seeds) != images:
        raise InputError(f"{len(seeds)} seeds for {images} images; give one seed per image")
    for seed in seeds:
        check_seed(seed)
    parts, masks = [condition], [condition_mask]
    if blend is not None:
        model.cls_embedding.check(blend.condition)
        if blend.condition.shape != condition.shape:
            raise InputError(
                f"the condition to blend with has shape {tuple(blend.condition.shape)}, expected "
                f"{tuple(condition.shape)} like the first one"
            )
        parts.append(blend.condition.to(condition))
        masks.append(blend.mask)
    if sampling.guided:
        if unconditional is None:
            unconditional = model.cls_embedding.unconditional(condition)
        parts.append(unconditional.to(condition))
        masks.append(unconditional_mask)
    mask = _all_masks(condition, masks)
    condition = torch.cat(parts)
    if mask is not None:
        condition, mask = _without_common_padding(condition, mask.to(model.device))
    return Sequences(images, condition, mask, sampling.guided)


def _all_masks(condition: Tensor, masks: Sequence[Tensor | None]) -> Tensor | None:
    """The masks of all rows; where there is none, the first one, which is that of the images."""
    if all(mask is None for mask in masks):
        return None
    first = masks[0]
    if first is None:
        first = torch.ones(condition.shape[:2], dtype=torch.bool)
    whole = [first if mask is None else mask for mask in masks]
    for mask in whole:
        _check_mask(mask, condition)
    return torch.cat([mask.bool().cpu() for mask in whole])


def _check_mask(mask: Tensor, condition: Tensor) -> None:
    if mask.shape != condition.shape[:2]:
        raise InputError(
            f"the condition mask has shape {tuple(mask.shape)}, "
            f"expected {tuple(condition.shape[:2])} like the text features"
        )


def _without_common_padding(condition: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cuts the padding that all rows share off the front of text features.

    Exact: padding is never attended to, and condition positions carry no position of their own
    (see ``rope_table``).
    """
    _check_mask(mask, condition)
    mask = mask.bool()
    used = max(1, int(mask.sum(-1).max()))
    mask = mask[:, -used:]
    return condition[:, -used:], None if bool(mask.all()) else mask
