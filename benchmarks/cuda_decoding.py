"""Decoding on a CUDA device: with recorded steps, and with the model's operations one by one.

    python benchmarks/cuda_decoding.py
    python benchmarks/cuda_decoding.py --presets L --images 1 8 --precisions bfloat16 int8

Whole images of 384 x 384 (24 x 24 codes) with guidance and top-k, of transformers with random
weights. Both ways run in turn. The floor is the time for reading weights and cache, or for
computing, at the rates measured just before, whichever is more.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import median_and_spread, print_table, record, time_in_turn

from llamagen.config import TRANSFORMER_PRESETS, preset
from llamagen.evaluation.speed import measure_limits
from llamagen.evaluation.speed.decoding import SAMPLING, floor_seconds
from llamagen.generation import generate_codes
from llamagen.models.transformer import Transformer
from llamagen.models.transformer.quantization import quantize
from llamagen.support.devices import find_dtype

GRAPHS, EAGER = "graphs", "eager"


def random_transformer(name: str, precision: str) -> Transformer:
    """A preset with random weights; whole numbers go with the device's fastest precision."""
    device = torch.device("cuda", torch.cuda.current_device())
    is_quantized = precision.startswith("int")
    dtype = find_dtype("auto" if is_quantized else precision, device)
    config = dataclasses.replace(preset(TRANSFORMER_PRESETS, name), grid=(24, 24))
    torch.manual_seed(0)
    with device:
        model = Transformer(config).to(dtype).eval()
    # As drawn at first, the output head is zero and all codes are alike.
    torch.nn.init.normal_(model.output.weight, std=0.02)
    if is_quantized:
        quantize(model, precision)  # type: ignore[arg-type]
    return model


def run_of(model: Transformer, images: int, way: str) -> Callable[[], object]:
    labels = torch.arange(images, device=model.device)

    def run() -> object:
        os.environ["LLAMAGEN_CUDA_GRAPHS"] = "on" if way == GRAPHS else "off"
        return generate_codes(model, labels, seeds=range(images), sampling=SAMPLING)

    return run


def measure(name: str, precision: str, images: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    model = random_transformer(name, precision)
    limits = measure_limits(model.device, model.dtype)
    count = model.config.num_codes
    found = []
    for number in images:
        runs = {way: run_of(model, number, way) for way in (GRAPHS, EAGER)}
        seconds = time_in_turn(runs, repeats=repeats)
        found.append(
            {
                "preset": name,
                "precision": precision,
                "images": number,
                "floor": floor_seconds(model, number, limits),
                **{way: [value / count for value in values] for way, values in seconds.items()},
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["L", "XL", "XXL", "3B"])
    parser.add_argument("--images", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--precisions", nargs="+", default=["bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "there is no CUDA device here, so there is nothing to measure\n")
    found = []
    for name in arguments.presets:
        for precision in arguments.precisions:
            found += measure(name, precision, arguments.images, arguments.repeats)
            torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, ms/code of every image, with guidance")
    print_table(
        ["preset", "weights", "images", GRAPHS, EAGER, "floor"],
        [
            [
                each["preset"],
                each["precision"],
                str(each["images"]),
                *(median_and_spread(each[way], unit=1000) for way in (GRAPHS, EAGER)),
                f"{1000 * each['floor']:.2f}",
            ]
            for each in found
        ],
    )
    record("cuda-decoding", found)


if __name__ == "__main__":
    main()
