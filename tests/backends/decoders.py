"""What tests of decoders share: models, walks through a cache of slots, and how near is near."""

import torch

from llamagen.models.transformer import SlotCache
from tests.tiny_models import tiny_transformer

# Sizes that the kernels take: inputs in 32s, outputs in 16s.
SIZES = {
    "even": {"dim": 64, "heads": 2, "layers": 2},
    "grouped queries": {"dim": 128, "heads": 4, "kv_heads": 2, "layers": 2},
    "odd heads": {"dim": 160, "heads": 8, "layers": 2},  # head dimension 20
    "heads of 64": {"dim": 128, "heads": 2, "layers": 2},
    "heads of 128": {"dim": 256, "heads": 2, "layers": 1},
    "wide heads": {"dim": 480, "heads": 4, "layers": 1},  # head dimension 120
}


def model_of(size, dtype=torch.float32, **settings):
    return tiny_transformer(**SIZES[size], **settings).to(dtype)


def assert_close(found, wanted):
    """Up to what float32 loses on numbers of this size."""
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def slots_of(model, sequences, spare=0):
    """Room for so many sequences."""
    return SlotCache.empty(
        model.config,
        sequences,
        grid=model.config.grid,
        device=model.device,
        dtype=model.cache_dtype,
        spare=spare,
    )


def join(model, slots, labels):
    """Sequences of these labels join."""
    cache = model.new_cache(len(labels))
    model.prefill(torch.tensor(labels), cache)
    slots.admit(cache)


def logits_at_different_places(model, decoder, codes):
    """Logits of three sequences that join one after the other, codes (3, 12); the first leaves."""
    slots = slots_of(model, 4)
    logits = []
    for step in range(12):
        if step in (0, 2, 5):
            join(model, slots, [slots.batch])
        fed = torch.tensor([codes[row, slots.lengths[row] - 1] for row in range(slots.batch)])
        logits.append(decoder.next_logits(fed, slots).clone())
        if step == 8:
            slots.remove(0)
    return torch.cat(logits)


def logits_of_windows(model, decoder, windows):
    """Logits of windows (3, T) of several lengths, T at most 6."""
    slots = slots_of(model, 3, spare=5)
    join(model, slots, [0, 1, 2])
    logits = []
    for round_ in range(3):
        for codes in windows:
            logits.append(decoder.extend(codes, slots).clone().flatten(0, 1))
            # Less is kept than was fed, and not of all sequences alike.
            slots.advance_each([1 + round_ % 2, 1, codes.shape[1] // 2])
    return torch.cat(logits)


# Codes of a grid of 3 x 5 whose rows are two columns behind each other; before the second row
# begins, all of the first one's places are filled.
SCATTERED = (
    (0, 1, 2, 3),
    (1, 4),
    (2, 5, 6, 7, 8),
    (3, 6, 9),
    (4, 10, 7),
    (8, 11),
)


def slots_with_texts(model, lengths=(2, 6, 4)):
    """Sequences of text features of these lengths."""
    slots, generator = slots_of(model, len(lengths)), torch.Generator().manual_seed(5)
    for length in lengths:
        model.start(torch.randn(1, length, model.config.text_dim, generator=generator), slots)
    return slots


def logits_of_scattered(model, decoder):
    """Logits of three sequences whose codes do not follow each other, and the slots."""
    slots, generator = slots_with_texts(model), torch.Generator().manual_seed(6)
    logits = []
    for cells in SCATTERED:
        codes = torch.randint(model.config.codebook_size, (3, len(cells)), generator=generator)
        logits.append(decoder.extend_at(codes, slots, cells).clone().flatten(0, 1))
    return torch.cat(logits), slots


def logits_with_changed_cells(model, decoder, cells, changed):
    """Logits (3, T, V) at ``cells`` before and after other ones get other keys and values."""
    slots, found = slots_with_texts(model), []
    for part in slots.keys + slots.values:
        part.normal_()
    codes = torch.randint(model.config.codebook_size, (3, len(cells)))
    for _ in range(2):
        found.append(decoder.extend_at(codes, slots, cells).clone())
        for sequence, condition in enumerate(slots.conditions):
            for part in slots.keys + slots.values:
                part[sequence, :, [condition + cell for cell in changed]] = 1e4
    return found
