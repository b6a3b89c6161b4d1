"""Steps of a transformer by hand: conditions and codes as tokens."""

import numpy as np
import torch

from llamagen.models.transformer import NO_CELL, Tokens


def condition_tokens(model, conditions, first=0):
    """Tokens of conditions (labels or text features) for sequences from ``first`` on."""
    lengths = [1 if each.ndim == 0 else len(each) for each in conditions]
    is_class = model.config.condition == "class"
    ids = torch.zeros(sum(lengths))
    if is_class:
        ids = torch.stack(list(conditions)) + model.config.codebook_size
    return Tokens(
        ids=ids.to(torch.int64),
        sequences=np.repeat(np.arange(first, first + len(lengths), dtype=np.int32), lengths),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        cells=np.full(sum(lengths), NO_CELL, dtype=np.int32),
        wanted=np.cumsum(lengths, dtype=np.int64) - 1,
        features=None if is_class else torch.cat(list(conditions)),
    )


def code_tokens(codes, lengths, condition_lengths):
    """Tokens of codes (R, T) behind what sequences with these lengths hold."""
    count, width = codes.shape
    positions = np.array(lengths)[:, None] + np.arange(width)
    return Tokens(
        ids=codes.flatten(),
        sequences=np.repeat(np.arange(count, dtype=np.int32), width),
        positions=positions.flatten().astype(np.int32),
        cells=(positions - np.array(condition_lengths)[:, None]).flatten().astype(np.int32),
        wanted=np.arange(count * width, dtype=np.int64),
    )


def start_sequences(model, conditions, cache, step=None):
    """Read conditions into a cache; return logits (R, V) of the first codes."""
    first = cache.sequences
    cache.add(len(conditions))
    tokens = condition_tokens(model, conditions, first)
    logits = (step or model.step)(tokens, cache).clone()
    cache.condition_lengths = getattr(cache, "condition_lengths", []) + [
        1 if each.ndim == 0 else len(each) for each in conditions
    ]
    cache.lengths[first:] = cache.condition_lengths[first:]
    return logits


def feed_codes(model, codes, cache, step=None):
    """Feed codes (R, T) to all sequences of a cache; return logits (R, T, V)."""
    tokens = code_tokens(codes, cache.lengths, cache.condition_lengths)
    logits = (step or model.step)(tokens, cache).clone()
    cache.lengths = [length + codes.shape[1] for length in cache.lengths]
    return logits.view(*codes.shape, -1)
