"""Milliseconds per code, the machine's limits, and what the time goes to."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from llamagen.backends import CompiledStep, StepTimes, reference_only
from llamagen.config import SamplingConfig
from llamagen.evaluation.speed.limits import MachineLimits, measure_limits
from llamagen.evaluation.speed.timing import time_in_turn
from llamagen.generation import generate_codes
from llamagen.models.transformer import KVCache, Transformer
from llamagen.models.transformer.quantization import QuantizedLinear, quantize

Precision = Literal["float32", "bfloat16", "float16", "int8", "int8-all"]
"""Of the weights; with int8 everything else is bfloat16 where the device is fast at it, and
"int8-all" has keys and values in 8 bits, too."""

SAMPLING = SamplingConfig(guidance_scale=4.0, top_k=2000)
"""Measurements include guidance and top-k."""

REFERENCE = "reference"
"""The model's own operations, which every backend is compared with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Speed in one precision, for one number of images."""

    precision: str
    images: int
    """Each of them two rows of a batch."""
    seconds_per_code: list[float]
    """One number per repetition, for a code of every image."""
    floor: float
    """Minimum: seconds per code for reading weights and cache, or for computing."""
    shares: dict[str, float] | None
    """Of the time: products, attention, sampling, the rest; None where it is not counted."""

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
    reference: bool = True,
    on_run: Callable[[], object] | None = None,
) -> list[Measurement]:
    """Time whole images with guidance and top-k 2000.

    For each number of images all precisions run in turn, the reference among them.

    Args:
        model: class-conditional, in the precision that quantised weights go with.
        precisions: of the weights.
        images: numbers of images generated at once.
        repeats: timings of each.
        reference: measure the reference, too, in the first precision of floating-point weights.
        on_run: called after every run.
    """
    models: dict[str, Transformer] = {p: _with_precision(model, p) for p in precisions}
    for each in models.values():
        if CompiledStep.supports(each):
            # Compile in the warm-up runs, not after many steps.
            CompiledStep.of(each, eager_steps=0)
    limits = {name: measure_limits(each.device, each.dtype) for name, each in models.items()}
    floats = next((name for name in precisions if not name.startswith("int")), None)
    count = model.config.num_codes
    found = []
    for number in images:
        labels = torch.arange(number, device=model.device) % model.config.num_classes
        names = {name: name for name in models}
        runs: dict[str, Callable[[], object]] = {}
        if reference and floats is not None:
            names = {f"{REFERENCE}, {floats}": floats, **names}
        for run, name in names.items():
            runs[run] = _run(models[name], labels, reference=run != name)
        seconds = time_in_turn(runs, repeats=repeats, progress=on_run)
        for run, name in names.items():
            found.append(
                Measurement(
                    precision=run,
                    images=number,
                    seconds_per_code=[value / count for value in seconds[run]],
                    floor=floor_seconds(models[name], number, limits[name]),
                    shares=_shares(models[name], labels) if run == name else None,
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


def _run(model: Transformer, labels: Tensor, *, reference: bool) -> Callable[[], object]:
    def run() -> object:
        return generate_codes(model, labels, seeds=range(len(labels)), sampling=SAMPLING)

    return reference_only()(run) if reference else run


def floor_seconds(model: Transformer, images: int, limits: MachineLimits) -> float:
    """Return the minimum seconds for a code of each image, at the middle of the image."""
    config, rows = model.config, 2 * images
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    weights = sum(m.in_features * m.out_features for m in matrices)
    read = sum(tensor.nbytes for m in matrices for tensor in (*m.parameters(), *m.buffers()))
    positions = config.condition_length + config.num_codes / 2
    cache = KVCache.bytes_per_sequence(
        config, config.condition_length + config.num_codes // 2, model.cache_dtype
    )
    attention = 4 * config.layers * config.dim * positions
    return limits.seconds(
        read=read + rows * cache,
        operations=rows * (2 * weights + attention),
    )


def _shares(model: Transformer, labels: Tensor) -> dict[str, float] | None:
    """Shares of the time of one run, counted by the CPU kernels."""
    times = StepTimes()
    start = time.perf_counter()
    generate_codes(model, labels, seeds=range(len(labels)), sampling=SAMPLING, times=times)
    whole = time.perf_counter() - start
    if not times.parts.any():
        return None
    products, attention, _ = (float(part) / whole for part in times.parts)
    shares = {"products": products, "attention": attention, "sampling": times.sampling / whole}
    return {**shares, "rest": 1 - sum(shares.values())}
