"""Sequences that are at different places, in one batch, give the logits they give alone."""

import pytest
import torch

from llamagen.models.transformer import SlotCache
from tests.tiny_models import tiny_transformer


def new_slots(model, slots=6, **settings):
    return SlotCache.empty(
        model.config,
        slots,
        grid=model.config.grid,
        device=model.device,
        dtype=model.dtype,
        **settings,
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
            first = model.start(labels[k : k + 1], slots)
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
        model.start(text, slots)
    for index in range(15):
        for row, expected in zip(model.step(codes[:, index], slots), wanted, strict=True):
            torch.testing.assert_close(row, expected[index + 1])


@torch.inference_mode()
def test_no_mask_where_all_are_at_one_place():
    model = tiny_transformer()
    slots = new_slots(model)
    model.start(torch.tensor([0, 1]), slots)
    assert slots.attended() is None
    model.step(torch.tensor([1, 2]), slots)
    assert slots.attended() is None
    model.start(torch.tensor([2]), slots)
    assert slots.attended().shape == (3, 1, 1, 3)


@torch.inference_mode()
def test_windows_at_different_places():
    """Drafts do not change what stands before them, and leave nothing behind."""
    model = tiny_transformer(condition="text", kv_heads=2)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(64, (3, 16), generator=generator)
    texts = [torch.randn(1, length, 16, generator=generator) for length in (2, 6, 6)]
    wanted = [model(codes[k : k + 1, :-1], text)[0] for k, text in enumerate(texts)]
    slots = new_slots(model)
    for text in texts:
        model.start(text, slots)
    fed = [0, 0, 0]
    for right in ([1, 3, 2], [4, 4, 0], [0, 1, 2], [3, 0, 1]):
        # Of the window the first codes are right, and the others drafts that will not hold.
        window = torch.randint(64, (3, 4), generator=generator)
        for k, count in enumerate(right):
            window[k, :count] = codes[k, fed[k] : fed[k] + count]
        logits = model.extend(window, slots)
        for k, count in enumerate(right):
            found = logits[k, :count]
            torch.testing.assert_close(found, wanted[k][fed[k] + 1 : fed[k] + 1 + count])
            fed[k] += count
        slots.advance_each(right)
    assert fed == [8, 8, 5]
    assert slots.lengths == [10, 14, 11]


@torch.inference_mode()
def test_a_window_at_one_place_is_causal():
    model = tiny_transformer()
    labels, slots = torch.tensor([0, 1]), new_slots(model)
    codes = torch.randint(64, (2, 15), generator=torch.Generator().manual_seed(3))
    wanted = model(codes, labels)
    model.start(labels, slots)
    torch.testing.assert_close(model.extend(codes[:, :6], slots), wanted[:, 1:7])
    slots.advance(4)
    torch.testing.assert_close(model.extend(codes[:, 4:], slots), wanted[:, 5:])


@torch.inference_mode()
def test_windows_past_the_last_code_need_room():
    model = tiny_transformer()
    labels = torch.tensor([0, 1])
    codes = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(4))
    wanted = model(codes[:, :15], labels)
    slots = new_slots(model, spare=1)
    model.start(labels, slots)
    model.extend(codes[:, :14], slots)
    slots.advance_each([13, 14])
    window = torch.stack([codes[0, 13:16], codes[1, 14:17]])
    logits = model.extend(window, slots)
    torch.testing.assert_close(logits[0, :2], wanted[0, 14:16])
    torch.testing.assert_close(logits[1, 0], wanted[1, 15])
    assert logits.isfinite().all()
    with pytest.raises(AssertionError, match="19 positions in slots with room for 18"):
        model.extend(codes[:, :4], slots)


@torch.inference_mode()
def test_codes_in_any_order():
    """Where each sees what stands before it, the order they come in makes no difference."""
    model = tiny_transformer(condition="text", kv_heads=2)
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(64, (3, 15), generator=generator)
    texts = [torch.randn(1, length, 16, generator=generator) for length in (2, 6, 4)]
    wanted = [model(codes[k : k + 1], text)[0] for k, text in enumerate(texts)]
    slots = new_slots(model)
    for text in texts:
        model.start(text, slots)
    model.extend_at(codes[:, :4], slots, range(4))
    logits = model.extend_at(codes[:, [5, 4]], slots, [5, 4])
    for k in range(3):
        torch.testing.assert_close(logits[k, 0], wanted[k][6])
        torch.testing.assert_close(logits[k, 1], wanted[k][5])
    # Another code stood there.
    model.extend_at(codes[:, :1], slots, [6])
    logits = model.extend_at(codes[:, 6:], slots, range(6, 15))
    for k in range(3):
        torch.testing.assert_close(logits[k], wanted[k][7:])
    assert slots.lengths == [2, 6, 4]


@torch.inference_mode()
def test_what_codes_that_do_not_follow_each_other_attend_to():
    model = tiny_transformer(condition="text")
    slots = new_slots(model)
    for length in (1, 2):
        model.start(torch.randn(1, length, 16), slots)
    there = slots.at([4, 1])
    assert there.keys[0] is slots.keys[0]
    assert there.attended(2).squeeze(1).int().tolist() == [
        [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]],
    ]
    assert slots.at([4]).attended() is not None
    slots.remove(1)
    assert slots.at([4]).attended() is None
