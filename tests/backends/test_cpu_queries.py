"""Queries of a model of random order in the step in C."""

import pytest
import torch

from llamagen.backends.cpu.step import CpuStep
from llamagen.models.transformer import NO_CELL, QUERY
from tests.backends.models import model_of
from tests.backends.test_cpu_step import (
    CODES,
    WALKS,
    Sequence,
    cache_of,
    expected_logits,
    feed,
    quantized,
    walk,
)


def three_orders():
    """Sequences of random order: a class, then in turn a query and the code of its cell."""
    generator = torch.Generator().manual_seed(4)
    cells = [torch.randperm(15, generator=generator)[:6].tolist() for _ in range(3)]
    return [
        Sequence(
            torch.tensor([CODES + label, *(x for code in range(6) for x in (QUERY, 7 * code))]),
            [NO_CELL, *(cell for cell in own for _ in range(2))],
        )
        for label, own in zip((0, 5, 2), cells, strict=True)
    ]


@pytest.mark.parametrize("size", ["grouped queries", "odd heads", "QK-norm"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int8 cache"])
@torch.inference_mode()
def test_queries_match_the_definition(size, kind):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    exact, model = model_of(size, order="random"), model_of(size, dtype, order="random")
    exact.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    if kind == "int8":
        exact, model = quantized(exact), quantized(model)
    int8_cache = kind == "int8 cache"
    sequences, step = three_orders(), CpuStep(model)
    together = walk(
        step, cache_of(model, dtype=torch.int8 if int8_cache else None), sequences, WALKS["ragged"]
    )
    for number, sequence in enumerate(sequences):
        wanted = expected_logits(exact, sequence, int8_cache)
        tolerance = {"float32": 2e-5, "int8": 2e-5, "bfloat16": 3e-2, "int8 cache": 1e-2}[kind]
        assert (together[number] - wanted).norm() < tolerance * wanted.norm()
        alone = feed(
            step,
            cache_of(model, dtype=torch.int8 if int8_cache else None),
            [(1, sequence, 0, 13)],
        )
        assert torch.equal(alone, together[number])
