"""Our engine under many clients: throughput against one offline batch, first rows, fairness.

    python benchmarks/serving.py --preset B --requests 64 --at-once 16
    python benchmarks/serving.py --model emoji --requests 64 --at-once 64

Three measurements, through everything but HTTP (engine, decoder, prompts):

- burst: all requests at once, each with settings of its own, against the same number of images
  drawn and decoded by ``Pipeline`` in batches of the same size, in turn;
- first: of those, the time until the first row of the first image that is drawn, as a share of
  that image's own time;
- steady: requests that arrive at random (Poisson) at 70 % of the measured throughput; the 99th
  percentile of their times over the median.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from typing import Any

import torch
from common import median_and_spread, print_table, record

from llamagen import Pipeline
from llamagen.config import TRANSFORMER_PRESETS, TokenizerConfig, preset
from llamagen.generation.engine import NativeEngine
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import Transformer
from llamagen.serving.metrics import ServerMetrics
from llamagen.serving.models import ServedModel
from llamagen.support.devices import find_device, find_dtype


def random_pipeline(name: str) -> Pipeline:
    """A transformer preset with VQ-16, weights drawn at random."""
    device = find_device("auto")
    dtype = find_dtype("auto", device)
    transformer = Transformer(preset(TRANSFORMER_PRESETS, name))
    torch.nn.init.normal_(transformer.output.weight, std=0.02)
    tokenizer = ImageTokenizer(TokenizerConfig())
    return Pipeline(tokenizer.eval(), transformer.eval(), name=name).to(device, dtype)


def mixed(index: int) -> dict[str, Any]:
    """Settings of request ``index``: all guided, as the offline batch is."""
    scales, ks, ps = (2.0, 4.0, 7.5), (0, 1000, 2000), (1.0, 0.95)
    return {
        "guidance_scale": scales[index % 3],
        "top_k": ks[index // 3 % 3],
        "top_p": ps[index // 9 % 2],
        "temperature": (1.0, 0.9)[index % 2],
    }


def prompts(pipe: Pipeline, count: int) -> list[str]:
    if pipe.labels is not None:
        return [str(index % len(pipe.labels)) for index in range(count)]
    words = ("llama", "red heart", "pizza", "waving hand", "flag: Japan", "cat with a hat")
    return [words[index % len(words)] for index in range(count)]


def offline(pipe: Pipeline, requests: int, at_once: int) -> float:
    """Seconds for the same images by the pipeline."""
    begun = time.perf_counter()
    pipe(prompts(pipe, requests), seed=0, guidance_scale=4.0, top_k=2000, batch_size=at_once)
    return time.perf_counter() - begun


async def one(model: ServedModel, prompt: str, seed: int) -> tuple[float, float, float]:
    """Seconds of a request of one image, until its first row, and between the two."""
    begun = time.perf_counter()
    settings = mixed(seed)
    job = await model.job(prompt, None, images=1, seed=seed, settings=settings)
    first = None
    async for update in model.updates(job):
        first = first or time.perf_counter()
        last = update
    await model.image(job, last)
    end = time.perf_counter()
    assert first is not None
    return end - begun, first - begun, end - first


async def burst(pipe: Pipeline, requests: int, at_once: int) -> tuple[float, float]:
    """Seconds for all, and the share of the first image's time after which its first row came."""
    model = served(pipe, at_once)
    begun = time.perf_counter()
    results = await asyncio.gather(
        *[one(model, text, seed) for seed, text in enumerate(prompts(pipe, requests))]
    )
    seconds = time.perf_counter() - begun
    await model.close()
    total, first, _ = min(results)
    return seconds, first / total


async def steady(
    pipe: Pipeline, requests: int, at_once: int, per_second: float
) -> tuple[float, float]:
    """Median and 99th percentile of the seconds of requests that come at random."""
    model = served(pipe, at_once)
    arrivals = random.Random(0)
    tasks = []
    for seed, text in enumerate(prompts(pipe, requests)):
        tasks.append(asyncio.create_task(one(model, text, seed)))
        await asyncio.sleep(arrivals.expovariate(per_second))
    times = sorted(total for total, _, _ in await asyncio.gather(*tasks))
    await model.close()
    return statistics.median(times), times[min(len(times) - 1, round(0.99 * len(times)))]


def served(pipe: Pipeline, at_once: int) -> ServedModel:
    engine = NativeEngine(pipe.transformer, max_images=at_once)
    return ServedModel("model", pipe, engine, metrics=ServerMetrics(), max_in_flight=10**6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="B")
    parser.add_argument("--model", help="a pipeline instead of a preset's random weights")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--steady-requests", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    pipe = (
        random_pipeline(arguments.preset)
        if arguments.model is None
        else Pipeline.from_pretrained(arguments.model)
    )
    requests, at_once = arguments.requests, arguments.at_once
    offline(pipe, at_once, at_once)
    alone, together, shares = [], [], []
    for _ in range(arguments.repeats):
        alone.append(offline(pipe, requests, at_once))
        seconds, share = asyncio.run(burst(pipe, requests, at_once))
        together.append(seconds)
        shares.append(share)
    ratio = statistics.median(alone) / statistics.median(together)
    rate = requests / statistics.median(together)
    median, late = asyncio.run(steady(pipe, arguments.steady_requests, at_once, 0.7 * rate))
    rows = [
        ["offline, seconds", median_and_spread(alone)],
        [f"{requests} requests at once, seconds", median_and_spread(together)],
        ["throughput against offline", f"{ratio:.2f}"],
        ["first row, share of the image's time", f"{statistics.median(shares):.3f}"],
        ["steady load, images/s", f"{0.7 * rate:.2f}"],
        ["steady, median seconds", f"{median:.2f}"],
        ["steady, 99th percentile over median", f"{late / median:.2f}"],
    ]
    print_table(["measure", "value"], rows)
    record(
        f"serving-{arguments.model or arguments.preset}",
        {"requests": requests, "at_once": at_once, **dict(rows)},
    )


if __name__ == "__main__":
    main()
