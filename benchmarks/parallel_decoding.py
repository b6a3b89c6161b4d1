"""Drawing several codes per pass against one by one, of one image: passes and milliseconds.

    python benchmarks/parallel_decoding.py emoji --prompts "red heart" dog pizza
    python benchmarks/parallel_decoding.py demo/transformer/pipeline --windows 2 4 8

Every window draws every prompt with the same seeds, with the model's own settings, and its codes
are compared with those drawn one by one. All ways run in turn; a repeat is the mean over prompts
and seeds, the condition's own pass included and the text encoder and the tokenizer left out.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from common import median_and_spread, print_table, record, time_in_turn
from torch import Tensor

from llamagen import Pipeline
from llamagen.generation import generate_codes, generate_codes_in_parallel
from llamagen.pipeline.conditions import Conditions

ONE_BY_ONE = "one by one"
GROWING = "as it pays"
DEFAULT_PROMPTS = 8
"""Classes, where no prompts are given: the first ones of the model."""


def draw_one_by_one(pipe: Pipeline, conditions: list[Conditions], seeds: list[int]) -> list[Tensor]:
    """Codes (1, rows, columns) of every condition and seed."""
    return [
        generate_codes(
            pipe.transformer,
            wanted.condition,
            condition_mask=wanted.mask,
            seeds=[seed],
            sampling=pipe.sampling,
        )
        for wanted in conditions
        for seed in seeds
    ]


def draw_in_windows(
    pipe: Pipeline, conditions: list[Conditions], seeds: list[int], *, window: int | None
) -> tuple[list[Tensor], list[int]]:
    """As above, and the passes that each image took."""
    drawn = [
        generate_codes_in_parallel(
            pipe.transformer,
            wanted.condition,
            window=window,
            condition_mask=wanted.mask,
            seeds=[seed],
            sampling=pipe.sampling,
        )
        for wanted in conditions
        for seed in seeds
    ]
    return [one.codes for one in drawn], [one.passes[0] for one in drawn]


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
    conditions = [pipe.conditions([prompt]) for prompt in prompts]
    seeds = list(range(arguments.seeds))
    ways: dict[str, int | None] = {f"window {window}": window for window in arguments.windows}
    ways[GROWING] = None

    reference = draw_one_by_one(pipe, conditions, seeds)
    images, total = len(reference), reference[0].numel()
    passes, same = {ONE_BY_ONE: float(total)}, {ONE_BY_ONE: images}
    for name, window in ways.items():
        codes, taken = draw_in_windows(pipe, conditions, seeds, window=window)
        passes[name] = statistics.mean(taken)
        same[name] = sum(torch.equal(a, b) for a, b in zip(codes, reference, strict=True))

    candidates: dict[str, Callable[[], object]] = {
        ONE_BY_ONE: functools.partial(draw_one_by_one, pipe, conditions, seeds)
    }
    for name, window in ways.items():
        candidates[name] = functools.partial(
            draw_in_windows, pipe, conditions, seeds, window=window
        )
    seconds = time_in_turn(candidates, repeats=arguments.repeats)
    rows = []
    for name, values in seconds.items():
        ratios = [one / own for one, own in zip(seconds[ONE_BY_ONE], values, strict=True)]
        row = [name, f"{passes[name]:.1f}", median_and_spread([1e3 * v / images for v in values])]
        rows.append([*row, f"{statistics.median(ratios):.2f}", f"{same[name]} of {images}"])
    print(f"{arguments.model}: {images} images of {total} codes, {pipe.sampling}")
    print_table(["way", "passes", "ms an image", "times one by one", "same codes"], rows)
    results = {
        name: {
            "passes": passes[name],
            "same_codes": same[name] / images,
            "seconds_per_image": [value / images for value in values],
        }
        for name, values in seconds.items()
    }
    name = arguments.name or Path(arguments.model).name
    record(f"parallel-decoding-{name}", {"codes": total, "images": images, "ways": results})


if __name__ == "__main__":
    main()
