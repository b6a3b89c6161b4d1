"""Images per second of code extraction: our store against one image at a time.

The published way reads an image, encodes its centre crop in float32 and writes one .npy file for
its codes and one for its label. Ours extracts the same crops in batches, in bfloat16 where the
device is fast at it, into a store; once as it is and once compiled. All read the same files, in
turn, each in a process of its own, since ours sets its process to keep freed memory. The first of
four shards is not timed: compiling happens in it. The weights are random.

    python benchmarks/extraction.py --preset small VQ-16 --images 2000 24
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from common import median_and_spread, print_table, record
from PIL import Image

from llamagen.config import TOKENIZER_PRESETS, TokenizerConfig, preset
from llamagen.data.extraction import extract_store
from llamagen.data.images import ImageFolder, open_image
from llamagen.data.views import Views, center_crop
from llamagen.models.tokenizer import ImageTokenizer, uint8_to_images
from llamagen.support.devices import DTYPES, find_device, find_dtype, keep_freed_memory

PLAIN, OURS, COMPILED = "one at a time", "llamagen", "llamagen, compiled"
WAYS = (PLAIN, OURS, COMPILED)
SHARDS = 4
PRESETS = {
    "small": TokenizerConfig(
        base_channels=32, channel_multipliers=(1, 2, 2), z_channels=64, codebook_size=1024
    ),
    **TOKENIZER_PRESETS,
}
SIZES = {"small": 64}
"""Side of the images, where it is not 256."""


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEG files in two classes: smooth colours with some noise, as photographs have."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side + side // 4, side), Image.Resampling.BICUBIC))
        pixels = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        path = folder / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


@torch.inference_mode()
def one_at_a_time(tokenizer: ImageTokenizer, images: ImageFolder, size: int, out: Path) -> None:
    """Encode batches of one image in the default memory layout; write two files for each."""
    out.mkdir(parents=True)
    assert images.labels is not None
    for index, (path, label) in enumerate(zip(images.paths, images.labels, strict=True)):
        pixels = np.array(center_crop(open_image(path), size))
        batch = torch.from_numpy(pixels).movedim(-1, -3)[None].contiguous()  # (1, 3, H, W)
        latents = tokenizer.encoder(uint8_to_images(batch.to(tokenizer.device)))
        codes = tokenizer.quantize(tokenizer.quant_conv(latents)).codes
        np.save(out / f"{index}_codes.npy", codes.flatten(1).cpu().numpy())
        np.save(out / f"{index}_label.npy", np.array([label]))


def worker(
    connection: Connection,
    way: str,
    name: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Extract each time True arrives, and send images per second; end when False arrives."""
    tokenizer = ImageTokenizer(preset(PRESETS, name)).to(device).eval()
    images = ImageFolder.scan(folder / "images")
    size = SIZES.get(name, 256)
    views = Views(height=size, width=size, kind="center")
    if way != PLAIN:
        keep_freed_memory()
    few = images.subset(range(0, len(images), SHARDS))
    connection.send(None)
    for run in itertools.count():
        if not connection.recv():
            return
        out = folder / f"{way}-{run}"
        start = time.perf_counter()
        if way == PLAIN:
            one_at_a_time(tokenizer, few, size, out)
            connection.send(len(few) / (time.perf_counter() - start))
        else:
            extract_store(
                tokenizer,
                images,
                views,
                out,
                dtype=dtype,
                compiled=way == COMPILED,
                shard_size=len(images) // SHARDS,
                progress=False,
            )
            written = sorted(path.stat().st_mtime for path in out.glob("shard-*.npy"))
            connection.send(len(images) * (SHARDS - 1) / SHARDS / (written[-1] - written[0]))


def measure(
    name: str, count: int, repeats: int, device: torch.device, dtype: torch.dtype, folder: Path
) -> dict[str, list[float]]:
    """Images per second of all ways, A B C A B C ... so that drift hits all alike."""
    write_images(folder / "images", count, SIZES.get(name, 256))
    context = multiprocessing.get_context("spawn")
    workers = {}
    for way in WAYS:
        ours, theirs = context.Pipe()
        arguments = (theirs, way, name, folder, device, dtype)
        process = context.Process(target=worker, args=arguments, daemon=True)
        process.start()
        ours.recv()
        workers[way] = (ours, process)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, (connection, _process) in workers.items():
            connection.send(True)
            found[way].append(connection.recv())
    for connection, process in workers.values():
        connection.send(False)
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["small", "VQ-16"])
    parser.add_argument("--images", nargs="+", type=int, default=[2000, 24])
    parser.add_argument("--dtype", default=None, choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    dtype = find_dtype(arguments.dtype, device)
    rows, results = [], []
    for name, count in zip(arguments.preset, arguments.images, strict=True):
        assert count % SHARDS == 0, f"give --images multiples of {SHARDS}"
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, count, arguments.repeats, device, dtype, Path(folder))
        plain = statistics.median(found[PLAIN])
        precision = str(dtype).removeprefix("torch.")
        rows += [
            [
                name,
                way,
                "float32" if way == PLAIN else precision,
                median_and_spread(found[way]),
                f"{statistics.median(found[way]) / plain:.2f}",
            ]
            for way in WAYS
        ]
        results.append({"preset": name, "dtype": precision, "images_per_second": found})
    print_table(["tokenizer", "way", "in", "images/s", "ratio"], rows)
    record("extraction", results)


if __name__ == "__main__":
    main()
