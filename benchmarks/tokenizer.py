"""Seconds per image of encoding and decoding, by precision, against plain float32.

The plain way is torch's operations in float32 and the default memory layout. All run in turn, in
one process that keeps freed memory, as extract-codes does. The weights are random.

    python benchmarks/tokenizer.py --preset VQ-16 --images 1 4
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable

import torch
from common import median_and_spread, print_table, record, time_in_turn
from torch import Tensor

from llamagen.backends.cpu.convolution import accelerate
from llamagen.config import TOKENIZER_PRESETS, preset
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support.devices import DTYPES, find_device, keep_freed_memory

PLAIN = "plain torch, float32"


def plain_encode(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) to codes (B, h, w)."""
    latents = tokenizer.encoder(images.contiguous())
    codes: Tensor = tokenizer.quantize(tokenizer.quant_conv(latents)).codes
    return codes


def plain_decode(tokenizer: ImageTokenizer, codes: Tensor) -> Tensor:
    """Codes (B, h, w) to images (B, 3, H, W)."""
    vectors = tokenizer.quantize.lookup(codes).contiguous()
    images: Tensor = tokenizer.decoder(tokenizer.post_quant_conv(vectors))
    return images


@torch.inference_mode()
def measure(
    models: dict[str, ImageTokenizer], codes: Tensor, images: Tensor, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds per image, by task and way; the models are by precision."""
    plain = models["float32"]
    decode: dict[str, Callable[[], object]] = {PLAIN: functools.partial(plain_decode, plain, codes)}
    encode: dict[str, Callable[[], object]] = {
        PLAIN: functools.partial(plain_encode, plain, images)
    }
    for name, model in models.items():
        fast = accelerate(copy.deepcopy(model))
        decode[f"torch, {name}"] = functools.partial(model.decode, codes)
        encode[f"torch, {name}"] = functools.partial(model.encode, images)
        decode[f"llamagen, {name}"] = functools.partial(fast.decode, codes)
        encode[f"llamagen, {name}"] = functools.partial(fast.encode, images)
    found = {}
    for what, runs in (("decode", decode), ("encode", encode)):
        seconds = time_in_turn(runs, repeats=repeats)
        found[what] = {way: [s / len(codes) for s in values] for way, values in seconds.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="VQ-16", choices=TOKENIZER_PRESETS)
    parser.add_argument("--images", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], choices=DTYPES, help="besides float32"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    keep_freed_memory()
    torch.manual_seed(0)
    config = preset(TOKENIZER_PRESETS, arguments.preset)
    tokenizer = ImageTokenizer(config).to(device).eval()
    models = {name: copy.deepcopy(tokenizer).to(DTYPES[name]) for name in arguments.dtypes}
    models = {"float32": tokenizer, **models}
    rows, results = [], []
    for count in arguments.images:
        grid = config.grid_of(arguments.size, arguments.size)
        codes = torch.randint(config.codebook_size, (count, *grid), device=device)
        images = torch.rand(count, 3, arguments.size, arguments.size, device=device) * 2 - 1
        found = measure(models, codes, images, arguments.repeats)
        for what, ways in found.items():
            plain = statistics.median(ways[PLAIN])
            rows += [
                [
                    what,
                    str(count),
                    way,
                    median_and_spread(values, unit=1000),
                    f"{plain / statistics.median(values):.2f}",
                ]
                for way, values in ways.items()
            ]
        results.append(
            {
                "preset": arguments.preset,
                "size": arguments.size,
                "images": count,
                "seconds_per_image": found,
            }
        )
    print_table(["what", "images", "how", "ms/image", "times as fast"], rows)
    record("tokenizer", results)


if __name__ == "__main__":
    main()
