"""What drawing several rows of an image at once costs in quality, and how much faster it is.

    python benchmarks/row_parallel.py emoji emoji/ --picture docs/images/row-parallel.png
    python benchmarks/row_parallel.py digits runs/digits/pipeline
    python benchmarks/row_parallel.py speed emoji        # or a preset, as B, with random weights

The emoji folder is one that ``emoji.py split`` has prepared. Every lag draws the same prompts with
the same seeds; the largest one, of a whole row, draws the exact image. Measured are

- passes: forward passes of an image;
- right: of emoji, what ``emoji.py`` measures; of digits, the share that a classifier, trained on
  real ones, takes for the digit asked for;
- bits per code of the images drawn, given prompt or class, under the exact model, without its
  guidance and temperature: how unlikely the model finds what was drawn;
- seconds: of one image's codes, with guidance, the text encoder included.

Behind ± are standard errors over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import emoji
import numpy as np
import torch
from common import median_and_spread, print_table, record, time_in_turn
from PIL import Image
from quantization import code_bits, evenly, predicted
from torch import Tensor

from llamagen import Pipeline
from llamagen.config import TRANSFORMER_PRESETS
from llamagen.evaluation.speed.decoding import SAMPLING
from llamagen.generation import generate_codes, generate_codes_row_parallel
from llamagen.models.transformer import Transformer
from llamagen.pipeline import PipelineOutput
from llamagen.support.devices import find_device, find_dtype
from llamagen.support.pictures import image_grid, save_png, stacked, titled
from llamagen.training.demo import DigitClassifier, load_digits

KINDS = ("clock times", "keycaps and letters")
"""Emoji that differ in few pixels."""
SHOWN = 8
"""Prompts of the picture."""

Prompts = list[str]


def lags_of(grid: tuple[int, int]) -> list[int]:
    """A whole row first, then three quarters of one, a half, a quarter ... and 1."""
    columns = grid[1]
    parts = {columns, columns * 3 // 4, columns // 2, columns // 4, columns // 8, 1}
    return sorted(parts - {0}, reverse=True)


def passes_of(grid: tuple[int, int], lag: int) -> int:
    return grid[1] + (grid[0] - 1) * lag


@torch.inference_mode()
def mean_bits(pipe: Pipeline, output: PipelineOutput, prompts: Prompts) -> float:
    """Of all codes of some images."""
    found: list[Tensor] = []
    for first in range(0, len(prompts), 50):
        part = slice(first, first + 50)
        codes = output.codes[part].flatten(1)
        found.append(code_bits(predicted(pipe, codes, prompts[part]), codes))
    return float(torch.cat(found).mean())


class EmojiJudge:
    """What ``emoji.py`` measures, of images of many seeds."""

    def __init__(self, pipe: Pipeline, folder: Path) -> None:
        self._pipe = pipe
        rows = emoji.read_rows(folder / "train.csv")
        held_out = emoji.read_rows(folder / "held-out.csv")
        grid = pipe.transformer.config.grid
        side = grid[0] * pipe.tokenizer.config.downsampling
        self._folder, self._rows, self._held_out = folder, rows, held_out
        self._known = emoji.load(folder, rows, side)
        self._latents = emoji.latents(pipe, self._known)
        self._chosen = {"names": evenly(len(rows), emoji.PROMPTS)}
        for kind in KINDS:
            of_kind = [n for n, r in enumerate(rows) if re.search(emoji.KINDS[kind], r["text"])]
            self._chosen[kind] = np.array(of_kind[: emoji.MOST])

    def __call__(self, lag: int, seeds: range) -> dict[str, list[float]]:
        """Each measure, of each seed."""
        names = [self._rows[index]["text"] for index in self._chosen["names"]]
        new = [row["text"] for row in self._held_out]
        drawn: dict[str, list[np.ndarray]] = {kind: [] for kind in self._chosen}
        tones, bits = [], []
        for seed in seeds:
            for kind, chosen in self._chosen.items():
                texts = [self._rows[index]["text"] for index in chosen]
                output = self._pipe(texts, seed=seed, row_lag=lag)
                drawn[kind].append(pixels(output))
                if kind == "names":
                    bits.append(mean_bits(self._pipe, output, names))
            images = pixels(self._pipe(new, seed=seed, row_lag=lag))
            tones.append(emoji.tones_right(self._folder, self._rows, self._held_out, images))
        found = {
            kind: shares_found(self._chosen[kind], images, self._known)
            for kind, images in drawn.items()
        }
        latents = [emoji.latents(self._pipe, images) for images in drawn["names"]]
        found["names by latents"] = shares_found(self._chosen["names"], latents, self._latents)
        return {**found, "held-out tones": tones, "bits per code": bits}

    def prompts(self) -> Prompts:
        """Of the picture: spread evenly over all, none picked."""
        return [self._rows[index]["text"] for index in evenly(len(self._rows), SHOWN)]


class DigitsJudge:
    """How many digits are recognised, a hundred of each."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self._classifier = DigitClassifier(load_digits())

    def __call__(self, lag: int, seeds: range) -> dict[str, list[float]]:
        """Each measure, of each seed."""
        digits = np.arange(10).repeat(100)
        prompts = [str(digit) for digit in digits]
        found: dict[str, list[float]] = {"recognised": [], "bits per code": []}
        for seed in seeds:
            output = self._pipe(prompts, seed=1000 * seed, row_lag=lag)
            found["recognised"].append(self._classifier.share(output.images, digits))
            found["bits per code"].append(mean_bits(self._pipe, output, prompts))
        return found

    def prompts(self) -> Prompts:
        """Of the picture."""
        return [str(digit) for digit in range(10)]


def shares_found(chosen: np.ndarray, drawn: list[np.ndarray], known: np.ndarray) -> list[float]:
    """``emoji.share_found`` of the images of each seed."""
    found = emoji.nearest(np.concatenate(drawn), known).reshape(len(drawn), -1)
    return [
        float(
            np.mean([np.array_equal(known[a], known[b]) for a, b in zip(chosen, own, strict=True)])
        )
        for own in found
    ]


def pixels(output: PipelineOutput) -> np.ndarray:
    """(N, H, W, 3) bytes."""
    return np.stack([np.asarray(image) for image in output.images])


def measure_quality(
    pipe: Pipeline,
    judge: Callable[[int, range], dict[str, list[float]]],
    lags: list[int],
    seeds: int,
    name: str,
) -> None:
    grid = pipe.transformer.config.grid
    measured = {lag: judge(lag, range(seeds)) for lag in lags}
    print_table(
        ["lag", "passes", *measured[lags[0]]],
        [
            [str(lag), str(passes_of(grid, lag)), *map(mean_and_error, values.values())]
            for lag, values in measured.items()
        ],
    )
    results = [
        {"lag": lag, "passes": passes_of(grid, lag), **values} for lag, values in measured.items()
    ]
    about = {"sampling": dataclasses.asdict(pipe.sampling), **pipe.precision}
    record(f"row-parallel-{name}", {"model": pipe.name, **about, "lags": results})


def mean_and_error(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def picture(pipe: Pipeline, prompts: Prompts, lags: list[int], seed: int) -> Image.Image:
    """A row for each lag, a column for each prompt, which has a seed of its own."""
    grid, rows = pipe.transformer.config.grid, []
    for lag in lags:
        images = pipe(prompts, seed=seed, row_lag=lag).images
        captions = prompts if lag == lags[-1] else None
        exact = ": the exact image" if lag == grid[1] else ""
        title = f"lag {lag}, {passes_of(grid, lag)} passes{exact}"
        rows.append(
            titled(image_grid(images, columns=len(prompts), captions=captions, scale=2), title)
        )
    return stacked(rows, gap=2)


def measure_speed(name: str, wanted: list[int] | None, repeats: int, record_name: str) -> None:
    """Seconds for the codes of one image, one by one and with several lags."""
    if name in TRANSFORMER_PRESETS:
        device = find_device("auto")
        torch.manual_seed(0)
        model = Transformer(TRANSFORMER_PRESETS[name]).to(device, find_dtype(None, device)).eval()
        labels = torch.zeros(1, dtype=torch.int64, device=device)
        settings = {"seeds": [0], "sampling": SAMPLING}
        lags = wanted or lags_of(model.config.grid)
        runs: dict[str, Callable[[], object]] = {
            "one by one": lambda: generate_codes(model, labels, **settings)
        }
        for lag in lags:
            runs[str(lag)] = lambda lag=lag: generate_codes_row_parallel(
                model, labels, lag=lag, **settings
            )
    else:
        pipe = Pipeline.from_pretrained(name)
        prompt = "red heart" if pipe.labels is None else 0
        model = pipe.transformer
        lags = wanted or lags_of(model.config.grid)
        runs = {"one by one": lambda: pipe(prompt, seed=0, window=1, output_type="codes")}
        for lag in lags:
            runs[str(lag)] = lambda lag=lag: pipe(prompt, seed=0, row_lag=lag, output_type="codes")
    seconds = time_in_turn(runs, repeats=repeats)
    grid = model.config.grid
    passes = {"one by one": grid[0] * grid[1], **{str(lag): passes_of(grid, lag) for lag in lags}}
    print_table(
        ["lag", "passes", "ms an image"],
        [
            [way, str(passes[way]), median_and_spread(each, unit=1e3)]
            for way, each in seconds.items()
        ],
    )
    record(f"row-parallel-speed-{record_name}", {"passes": passes, "seconds": seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["emoji", "digits", "speed"])
    parser.add_argument("source", help="folder of emoji, pipeline of digits, model or preset")
    parser.add_argument("--model", default="emoji", help="what draws emoji")
    parser.add_argument("--lags", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--name", help="of the record; by default the model's")
    arguments = parser.parse_args()
    if arguments.what == "speed":
        name = arguments.name or Path(arguments.source).name
        measure_speed(arguments.source, arguments.lags, arguments.repeats, name)
        return
    if arguments.what == "emoji":
        pipe = Pipeline.from_pretrained(arguments.model)
        judge = EmojiJudge(pipe, Path(arguments.source))
    else:
        pipe = Pipeline.from_pretrained(arguments.source)
        judge = DigitsJudge(pipe)
    lags = arguments.lags or lags_of(pipe.transformer.config.grid)
    if arguments.picture is not None:
        save_png(picture(pipe, judge.prompts(), lags, seed=0), arguments.picture)
    measure_quality(pipe, judge, lags, arguments.seeds, arguments.name or pipe.name)


if __name__ == "__main__":
    main()
