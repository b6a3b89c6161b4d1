"""Sequences that are at different places, in one batch, give the logits they give alone."""

import torch

from llamagen.transformer import SlotCache
from tests.models import tiny_transformer


def start(model, slots, condition):
    """Begins the sequences of ``condition``; returns the logits of their first codes."""
    length = 1 if condition.ndim == 1 else condition.shape[1]
    cache = model.new_cache(condition.shape[0], condition_length=length)
    logits = model.prefill(condition, cache)
    slots.admit(cache)
    return logits


def new_slots(model, slots=6):
    return SlotCache.empty(
        model.config, slots, grid=model.config.grid, device=model.device, dtype=model.dtype
    )


@torch.inference_mode()
def test_sequences_join_and_leave():
    model = tiny_transformer(grid=(3, 5))
    labels = torch.tensor([0, 3, 4, 5])
    codes = torch.randint(64, (4, 15), generator=torch.Generator().manual_seed(0))
    wanted = model(codes[:, :-1], labels)  # (4, 15, V)
    slots = new_slots(model)
    # Sequence k joins at step 2 k and leaves when it is done.
    running, fed = [], {}
    for step in range(30):
        if step % 2 == 0 and step // 2 < 4:
            k = step // 2
            first = start(model, slots, labels[k : k + 1])
            torch.testing.assert_close(first, wanted[k : k + 1, 0])
            running.append(k)
            fed[k] = 0
        for k in [k for k in running if fed[k] == 14]:
            place = running.index(k)
            slots.remove(place)
            running[place] = running[-1]
            running.pop()
        if not running:
            break
        logits = model.step(torch.stack([codes[k, fed[k]] for k in running]), slots)
        for row, k in zip(logits, running, strict=True):
            fed[k] += 1
            torch.testing.assert_close(row, wanted[k, fed[k]])
    assert sorted(fed.values()) == [14] * 4
    assert slots.batch == 0


@torch.inference_mode()
def test_conditions_of_different_lengths():
    model = tiny_transformer(condition="text")
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(64, (3, 16), generator=generator)
    texts = [torch.randn(1, length, 16, generator=generator) for length in (2, 6, 4)]
    wanted = [model(codes[k : k + 1, :-1], text)[0] for k, text in enumerate(texts)]
    slots = new_slots(model)
    for text in texts:
        start(model, slots, text)
    for index in range(15):
        for row, expected in zip(model.step(codes[:, index], slots), wanted, strict=True):
            torch.testing.assert_close(row, expected[index + 1])


@torch.inference_mode()
def test_no_mask_where_all_are_at_one_place():
    model = tiny_transformer()
    slots = new_slots(model)
    start(model, slots, torch.tensor([0, 1]))
    assert slots.attended() is None
    model.step(torch.tensor([1, 2]), slots)
    assert slots.attended() is None
    start(model, slots, torch.tensor([2]))
    assert slots.attended().shape == (3, 1, 1, 3)
