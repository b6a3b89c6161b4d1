"""The sequences that a batch of images needs: one of each image, and with guidance two.

Shapes: B images, R sequences, C condition length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.config import SamplingConfig
from llamagen.errors import InputError
from llamagen.generation.seeds import check_seed
from llamagen.transformer import Transformer


class Sequences(NamedTuple):
    """The conditions of a batch's sequences: those of all images, then the unconditional ones."""

    images: int
    """B."""
    condition: Tensor
    """Labels (R,) or text features (R, C, text_dim) on the model's device; R is B, or 2 B with
    guidance."""
    mask: Tensor | None
    """(R, C) bool, False where text features are padding; None if none are."""

    @property
    def guided(self) -> bool:
        """Whether images have unconditional sequences."""
        return len(self.condition) > self.images

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
    if sampling.guided:
        if unconditional is None:
            unconditional = model.cls_embedding.unconditional(condition)
        condition_mask = _both_masks(condition, condition_mask, unconditional_mask)
        condition = torch.cat([condition, unconditional.to(condition)])
    if condition_mask is not None:
        condition, condition_mask = _without_common_padding(
            condition, condition_mask.to(model.device)
        )
    return Sequences(images, condition, condition_mask)


def _both_masks(
    condition: Tensor, mask: Tensor | None, unconditional_mask: Tensor | None
) -> Tensor | None:
    """The mask of the conditional rows above that of the unconditional ones."""
    if mask is None and unconditional_mask is None:
        return None
    if mask is None:
        mask = torch.ones(condition.shape[:2], dtype=torch.bool)
    other = mask if unconditional_mask is None else unconditional_mask
    for each in (mask, other):
        _check_mask(each, condition)
    return torch.cat([mask.bool().cpu(), other.bool().cpu()])


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
