"""Captions per second of text feature extraction: length-sorted batches against one at a time.

One at a time: a caption is encoded alone, in the precision that ours uses. Ours is `extract_text`
into a store. Both encode the same captions, cleaned, with an encoder of T5-small's size and random
weights. It reads bytes, so captions have as many bytes as captions of ten or twenty words have
tokens of T5's own: a log-normal distribution around 20.

    python benchmarks/text_features.py
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import median_and_spread, print_table, record, time_in_turn

from llamagen.config import SmallTextEncoderConfig
from llamagen.support.devices import DTYPES, find_device, find_dtype, keep_freed_memory
from llamagen.text.encoder import TextEncoder
from llamagen.text.features import extract_text

T5_SMALL = SmallTextEncoderConfig(dim=512, layers=6, heads=8, hidden_dim=1024, max_length=120)
WORDS = ["a", "red", "blue", "old", "cat", "dog", "house", "tree", "on", "with", "of", "the"]


def make_captions(count: int) -> list[str]:
    """Different captions of random words."""
    rng = np.random.default_rng(0)
    captions = []
    for number in range(count):
        length = int(np.clip(rng.lognormal(np.log(20), 0.5), 5, 110))
        words = [f"{number}"]
        while sum(map(len, words)) + len(words) < length:
            words.append(str(rng.choice(WORDS)))
        captions.append(" ".join(words))
    return captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default=None, choices=DTYPES)
    arguments = parser.parse_args()
    keep_freed_memory()
    device = find_device(arguments.device)
    dtype = find_dtype(arguments.dtype, device)
    torch.manual_seed(0)
    encoder = TextEncoder.small(T5_SMALL, clean=False).to(device, dtype).eval()
    captions = make_captions(arguments.captions)
    numbers = itertools.count()

    def one_at_a_time() -> None:
        for caption in captions:
            encoder.encode([encoder.prepare(caption)])

    with tempfile.TemporaryDirectory() as folder:
        ours = "llamagen"
        seconds = time_in_turn(
            {
                "one at a time": one_at_a_time,
                ours: lambda: extract_text(encoder, captions, Path(folder) / str(next(numbers))),
            },
            repeats=arguments.repeats,
        )
    rates = {way: [len(captions) / s for s in values] for way, values in seconds.items()}
    plain = statistics.median(rates["one at a time"])
    print_table(
        ["way", "captions/s", "ratio"],
        [
            [way, median_and_spread(found), f"{statistics.median(found) / plain:.2f}"]
            for way, found in rates.items()
        ],
    )
    record("text-features", {"dtype": str(dtype).removeprefix("torch."), "captions_per_s": rates})


if __name__ == "__main__":
    main()
