"""Milliseconds per code, how near that is to the machine's limits, and what the time goes to."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from llamagen.backends import StepTimes
from llamagen.config import SamplingConfig
from llamagen.evaluation.speed.machine import MachineLimits, measure_limits
from llamagen.evaluation.speed.plain import plain_codes
from llamagen.evaluation.speed.timing import time_in_turn
from llamagen.generation import generate_codes
from llamagen.models.transformer import KVCache, Transformer
from llamagen.models.transformer.quantization import QuantizedLinear, quantize

Precision = Literal["float32", "bfloat16", "float16", "int8", "int8-all"]
"""Of the weights; with int8 the rest is bfloat16 where the device is fast at it, and
"int8-all" keeps keys and values in 8 bits, too."""

SAMPLING = SamplingConfig(guidance_scale=4.0, top_k=2000)
"""What is measured includes guidance and top-k."""

PLAIN = "plain loop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One precision and number of images."""

    precision: str
    images: int
    """Each of them two rows of a batch."""
    seconds_per_code: list[float]
    """One number per repetition, for a code of every image."""
    floor: float
    """Seconds per code that reading weights and cache, or computing, takes at least."""
    shares: dict[str, float] | None
    """Of the time: products, attention, drawing, the rest; None where it is not counted."""

    @property
    def median(self) -> float:
        """Seconds per code."""
        return statistics.median(self.seconds_per_code)


def measure_decoding(
    model: Transformer,
    precisions: Sequence[Precision],
    images: Sequence[int],
    *,
    repeats: int,
    plain: bool = True,
    on_run: Callable[[], object] | None = None,
) -> list[Measurement]:
    """Times ``generate_codes`` of whole images with guidance and top-k 2000.

    For each number of images all precisions run in turn, with the plain loop among them.

    Args:
        model: class-conditional, in the precision that quantised weights go with.
        precisions: what to measure.
        images: numbers of images drawn at once.
        repeats: timings of each.
        plain: measure the plain loop too, in the first precision that is none of whole numbers.
        on_run: called after every run.
    """
    models: dict[str, Transformer] = {p: _with_precision(model, p) for p in precisions}
    limits = {name: measure_limits(each.device, each.dtype) for name, each in models.items()}
    floats = next((name for name in precisions if not name.startswith("int")), None)
    count = model.config.num_codes
    found = []
    for number in images:
        labels = torch.arange(number, device=model.device) % model.config.num_classes
        runs: dict[str, Callable[[], object]] = {}
        if plain and floats is not None:
            runs[PLAIN] = _plain_run(models[floats], labels)
        for name, each in models.items():
            runs[name] = _own_run(each, labels)
        seconds = time_in_turn(runs, repeats=repeats, progress=on_run)
        for run, values in seconds.items():
            precision = floats if run == PLAIN and floats is not None else run
            own = models[precision]
            found.append(
                Measurement(
                    precision=f"{run}, {precision}" if run == PLAIN else precision,
                    images=number,
                    seconds_per_code=[value / count for value in values],
                    floor=floor_seconds(own, number, limits[precision]),
                    shares=None if run == PLAIN else _shares(own, labels),
                )
            )
    return found


def _with_precision(model: Transformer, precision: Precision) -> Transformer:
    own = copy.deepcopy(model)
    if precision in ("int8", "int8-all"):
        quantize(own)
        own.kv_cache_dtype = torch.int8 if precision == "int8-all" else None
        return own
    return own.to(getattr(torch, precision))


def _own_run(model: Transformer, labels: Tensor) -> Callable[[], object]:
    return lambda: generate_codes(model, labels, seeds=range(len(labels)), sampling=SAMPLING)


def _plain_run(model: Transformer, labels: Tensor) -> Callable[[], object]:
    return lambda: plain_codes(model, labels, model.config.num_codes, SAMPLING)


def floor_seconds(model: Transformer, images: int, limits: MachineLimits) -> float:
    """Seconds for a code of each image, at the middle of the image."""
    config, rows = model.config, 2 * images
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    weights = sum(m.in_features * m.out_features for m in matrices)
    read = sum(tensor.nbytes for m in matrices for tensor in (*m.parameters(), *m.buffers()))
    positions = config.condition_length + config.num_codes / 2
    kept = KVCache.bytes_per_sequence(
        config, config.condition_length + config.num_codes // 2, model.cache_dtype
    )
    attention = 4 * config.layers * config.dim * positions
    return limits.seconds(
        read=read + rows * kept,
        operations=rows * (2 * weights + attention),
    )


def _shares(model: Transformer, labels: Tensor) -> dict[str, float] | None:
    """What the time of one run goes to, counted where the kernels decode."""
    times = StepTimes()
    start = time.perf_counter()
    generate_codes(model, labels, seeds=range(len(labels)), sampling=SAMPLING, times=times)
    whole = time.perf_counter() - start
    if not times.parts.any():
        return None
    products, attention, _ = (float(part) / whole for part in times.parts)
    shares = {"products": products, "attention": attention, "drawing": times.sampling / whole}
    return {**shares, "rest": 1 - sum(shares.values())}
