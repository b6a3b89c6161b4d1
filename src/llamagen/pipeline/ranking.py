"""The best of several images of the same condition, by the model's own judgement."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from llamagen.generation.likelihood import code_log_likelihoods
from llamagen.models.transformer import Transformer
from llamagen.pipeline.conditions import Conditions
from llamagen.support.errors import InputError

Ranking = Literal["likelihood", "condition"]
"""What makes an image better than another: "likelihood", that its codes are likelier given the
condition, or "condition", that the condition makes them so much likelier than they are without."""


def check_best_of(best_of: int) -> None:
    """Raises InputError unless images can have so many candidates."""
    if best_of < 1:
        raise InputError(f"best_of is {best_of}, expected at least 1")


def check_ranking(ranking: str, best_of: int) -> None:
    """Raises InputError unless images can be ranked so."""
    check_best_of(best_of)
    known = typing.get_args(Ranking)
    if ranking not in known:
        raise InputError(f"rank_by is {ranking!r}, expected one of {', '.join(known)}")


def score_images(
    model: Transformer, codes: Tensor, conditions: Conditions, ranking: Ranking
) -> Tensor:
    """What images are ranked by: (images,) float64, the higher the better.

    Args:
        model: in eval mode.
        codes: (images, rows, columns).
        conditions: one of each image. That of a blend counts by its share.
        ranking: what is better.
    """

    def total(condition: Tensor, mask: Tensor | None, *, conditional: bool) -> Tensor:
        found = code_log_likelihoods(
            model, codes, condition, condition_mask=mask, conditional=conditional
        )
        return found.sum((1, 2), dtype=torch.float64).cpu()

    score = total(conditions.condition, conditions.mask, conditional=True)
    blend = conditions.blend
    if blend is not None:
        mask = conditions.mask if blend.mask is None else blend.mask
        score = score.lerp(total(blend.condition, mask, conditional=True), blend.share)
    if ranking == "condition":
        score = score - total(conditions.condition, conditions.mask, conditional=False)
    return score


def best_of_each(scores: Tensor, candidates: int) -> list[int]:
    """Of each run of ``candidates`` scores (images * candidates,), the index of the highest."""
    best: Sequence[int] = scores.view(-1, candidates).argmax(-1).tolist()
    return [image * candidates + number for image, number in enumerate(best)]
