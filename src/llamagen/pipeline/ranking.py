"""The best of several images of the same condition, by the model's own judgement."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from llamagen.generation.likelihood import code_log_likelihoods
from llamagen.generation.request import GenerationRequest
from llamagen.models.transformer import Transformer
from llamagen.pipeline.conditions import Condition
from llamagen.support.errors import InputError
from llamagen.support.values import require_integer

Ranking = Literal["likelihood", "condition"]
"""The best image: "likelihood", the one whose codes are most likely given the condition, or
"condition", the one whose codes the condition makes so much likelier than they are without."""


def check_ranking(ranking: str, best_of: int) -> None:
    """Raise InputError unless images can have so many candidates, ranked so."""
    require_integer("best_of", best_of, 1)
    known = typing.get_args(Ranking)
    if ranking not in known:
        raise InputError(f"rank_by is {ranking!r}, expected one of {', '.join(known)}")


def score_images(
    model: Transformer,
    codes: Tensor,
    conditions: Sequence[Condition | GenerationRequest],
    ranking: Ranking,
) -> Tensor:
    """Score images: (images,) float64, the higher the better.

    Args:
        model: in eval mode.
        codes: (images, rows, columns).
        conditions: one of each image. That of a blend counts by its share.
        ranking: what is better.
    """

    def total(codes: Tensor, conditions: list[Tensor], *, conditional: bool = True) -> Tensor:
        found = code_log_likelihoods(model, codes, conditions, conditional=conditional)
        return found.sum((1, 2), dtype=torch.float64).cpu()

    own = [each.condition for each in conditions]
    score = total(codes, own)
    blends = {row: each.blend for row, each in enumerate(conditions) if each.blend is not None}
    if blends:
        rows = list(blends)
        shares = torch.tensor([conditions[row].blend_share for row in rows], dtype=torch.float64)
        score[rows] = score[rows].lerp(total(codes[rows], list(blends.values())), shares)
    if ranking == "condition":
        score = score - total(codes, own, conditional=False)
    return score


def best_of_each(scores: Tensor, candidates: int) -> list[int]:
    """Return the index of the highest of each run of ``candidates`` scores."""
    best = scores.view(-1, candidates).argmax(-1)
    indices: list[int] = (best + torch.arange(len(best)) * candidates).tolist()
    return indices
