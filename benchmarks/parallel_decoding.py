"""Several codes per pass against one by one, for one image: passes and milliseconds.

    python benchmarks/parallel_decoding.py emoji --prompts "red heart" dog pizza
    python benchmarks/parallel_decoding.py demo/transformer/pipeline --windows 2 4 8

Every window generates every prompt with the same seeds, with the model's own settings, and its
codes are compared with those generated one by one. All ways run in turn; a repeat is the mean over
prompts and seeds, the condition's own pass included and text encoder and tokenizer left out.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from common import median_and_spread, print_table, record, time_in_turn
from torch import Tensor

from llamagen import Pipeline
from llamagen.generation import GenerationRequest
from llamagen.generation.batch import Batch

ONE_BY_ONE = "one by one"
ADAPTIVE = "adaptive"
DEFAULT_PROMPTS = 8
"""Classes, where no prompts are given: the first ones of the model."""


def requests_of(
    pipe: Pipeline, prompts: Sequence[str | int], seeds: int, window: int | None
) -> list[GenerationRequest]:
    return [
        condition.request(seed=seed, sampling=pipe.sampling, window=window)
        for condition in pipe.conditions(prompts)
        for seed in range(seeds)
    ]


def generate(pipe: Pipeline, requests: list[GenerationRequest]) -> list[tuple[Tensor, int]]:
    """Codes (1, T) of each image, generated alone, and its number of passes."""
    found = []
    for request in requests:
        batch = Batch(pipe.transformer, 1, max_sequences=request.sequences)
        images = batch.add([request])
        passes = 1
        while not images[0].is_finished:
            batch.step()
            passes += 1
        found.append((batch.codes_of(images, batch.total), passes))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="pipeline folder or the name of a model")
    parser.add_argument("--prompts", nargs="+", help="prompts or classes")
    parser.add_argument("--seeds", type=int, default=1, help="images of each prompt")
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", help="of the record; by default the model's")
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained(arguments.model)
    prompts = arguments.prompts or list(range(DEFAULT_PROMPTS))
    windows: dict[str, int | None] = {ONE_BY_ONE: 1}
    windows |= {f"window {window}": window for window in arguments.windows}
    windows[ADAPTIVE] = None

    requests = {
        way: requests_of(pipe, prompts, arguments.seeds, window) for way, window in windows.items()
    }
    found = {way: generate(pipe, own) for way, own in requests.items()}
    reference = [codes for codes, _ in found[ONE_BY_ONE]]
    images, total = len(reference), reference[0].numel()
    passes = {way: statistics.mean(each for _, each in own) for way, own in found.items()}
    same = {
        way: sum(torch.equal(a, b) for (a, _), b in zip(own, reference, strict=True))
        for way, own in found.items()
    }
    seconds = time_in_turn(
        {way: functools.partial(generate, pipe, own) for way, own in requests.items()},
        repeats=arguments.repeats,
    )
    rows = []
    for way, values in seconds.items():
        ratios = [one / own for one, own in zip(seconds[ONE_BY_ONE], values, strict=True)]
        row = [way, f"{passes[way]:.1f}", median_and_spread([1e3 * v / images for v in values])]
        rows.append([*row, f"{statistics.median(ratios):.2f}", f"{same[way]} of {images}"])
    print(f"{arguments.model}: {images} images of {total} codes, {pipe.sampling}")
    print_table(["way", "passes", "ms an image", "times one by one", "same codes"], rows)
    results = {
        way: {
            "passes": passes[way],
            "same_codes": same[way] / images,
            "seconds_per_image": [value / images for value in values],
        }
        for way, values in seconds.items()
    }
    name = arguments.name or Path(arguments.model).name
    record(f"parallel-decoding-{name}", {"codes": total, "images": images, "ways": results})


if __name__ == "__main__":
    main()
