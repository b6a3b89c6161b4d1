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

Ranking = Literal["likelihood", "condition"]
"""Criterion of a ranking: "likelihood", that its codes are likelier given the
condition, or "condition", that the condition makes them so much likelier than they are without."""


def check_best_of(best_of: int) -> None:
    """Raise InputError unless images can have so many candidates."""
    if best_of < 1:
        raise InputError(f"best_of is {best_of}, expected at least 1")


def check_ranking(ranking: str, best_of: int) -> None:
    """Raise InputError unless images can be ranked so."""
    check_best_of(best_of)
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

    def total(rows: Sequence[int], conditions: list[Tensor], *, conditional: bool) -> Tensor:
        own = codes[list(rows)]
        found = code_log_likelihoods(model, own, conditions, conditional=conditional)
        return found.sum((1, 2), dtype=torch.float64).cpu()

    every = range(len(conditions))
    own = [each.condition for each in conditions]
    score = total(every, own, conditional=True)
    blends = [(row, each.blend) for row, each in enumerate(conditions) if each.blend is not None]
    if blends:
        rows = [row for row, _ in blends]
        other = total(rows, [blend for _, blend in blends], conditional=True)
        shares = torch.tensor([conditions[row].blend_share for row in rows], dtype=torch.float64)
        score[rows] = score[rows].lerp(other, shares)
    if ranking == "condition":
        score = score - total(every, own, conditional=False)
    return score


def best_of_each(scores: Tensor, candidates: int) -> list[int]:
    """Return the index of the highest of each run of ``candidates`` scores."""
    best: Sequence[int] = scores.view(-1, candidates).argmax(-1).tolist()
    return [image * candidates + number for image, number in enumerate(best)]
