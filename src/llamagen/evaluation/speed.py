"""Measurements of this machine: its limits, milliseconds per code, seconds per image."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime as dt
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import llamagen.checkpoints as checkpoints
from llamagen.backends import CompiledStep, StepTimes, reference_only
from llamagen.checkpoints.info import is_text_encoder, path_of
from llamagen.checkpoints.sources import Source
from llamagen.config import SamplingConfig, default_sampling
from llamagen.generation import generate_codes
from llamagen.generation.schedules.parallel import default_steps
from llamagen.models.transformer import KVCache, Transformer
from llamagen.models.transformer.quantization import QuantizedLinear, quantize
from llamagen.pipeline import Pipeline
from llamagen.support.devices import dtype_name, find_device, find_dtype
from llamagen.support.errors import InputError

Precision = Literal["float32", "bfloat16", "float16", "int8", "int8-all"]
"""Of the weights; with int8 everything else is bfloat16 where the device is fast at it, and
"int8-all" has keys and values in 8 bits, too."""

SAMPLING = SamplingConfig(guidance_scale=4.0, top_k=2000)
REFERENCE = "reference"
"""The model's own operations, which every backend is compared with."""

_SECONDS = 2.0
"""Generation ends with the first finished row of the grid after this time."""

_READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
"""On a GPU enough that its cache and the time of a launch do not matter."""
_PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
_TRIES = 7


def machine() -> dict[str, Any]:
    """Return the machine and software of a measurement, for its record."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """Model name and the instruction sets that decide the speed of bfloat16 and int8."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    pairs = (line.partition(":") for line in info.read_text().splitlines())
    lines = {name.strip(): value.strip() for name, _, value in pairs}
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    found = [flag for flag in wanted if flag in lines.get("flags", "").split()]
    family = f"family {lines.get('cpu family')} model {lines.get('model')}"
    return f"{lines.get('model name', '')} ({family}; {', '.join(found)})"


@dataclasses.dataclass(frozen=True)
class MachineLimits:
    """Rates of a device that no way of decoding can exceed."""

    bytes_per_second: float
    """Of reading memory."""
    operations_per_second: float
    """Multiplications and additions of a large matrix product."""

    def seconds(self, *, read: float, operations: float) -> float:
        """Return the minimum time to read so many bytes and compute so much, side by side."""
        return max(read / self.bytes_per_second, operations / self.operations_per_second)


def measure_limits(device: torch.device, dtype: torch.dtype) -> MachineLimits:
    """Time a sum over 256 MB (on a GPU 2 GB) and a matrix product; the best of several tries."""
    count = _READ_BYTES.get(device.type, _READ_BYTES["cpu"])
    size = _PRODUCT_SIZE.get(device.type, _PRODUCT_SIZE["cpu"])
    numbers = torch.ones(count // 4, device=device)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = time_in_turn(
        {"read": numbers.sum, "product": lambda: matrix @ matrix}, repeats=_TRIES
    )
    return MachineLimits(count / min(seconds["read"]), 2 * size**3 / min(seconds["product"]))


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    progress: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Return seconds per call of each candidate, in the order A B A B ... so that drift hits all.

    Each is called once before, as a warm-up. ``progress`` is called after every call.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else torch.cpu.synchronize
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(1 + repeats):
        for name, run in candidates.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
            if progress is not None:
                progress()
    return {name: values[1:] for name, values in seconds.items()}


def median_and_spread(values: Sequence[float], *, unit: float = 1.0) -> str:
    """Return the median, and the smallest and largest value, each times ``unit``."""
    low, high = min(values) * unit, max(values) * unit
    return f"{statistics.median(values) * unit:.1f} ({low:.1f}-{high:.1f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


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
    steps: int | None = None,
    reference: bool = True,
    on_run: Callable[[], object] | None = None,
) -> list[Measurement]:
    """Time whole images of a class-conditional model with ``SAMPLING``, in ``steps`` passes.

    For each number of images at once all precisions run in turn, and before them the reference in
    the first precision of floating-point weights. ``on_run`` is called after every run. The model
    is in the precision that quantised weights go with.
    """
    sampling = SAMPLING.replace(steps=steps)
    models: dict[str, Transformer] = {p: _with_precision(model, p) for p in precisions}
    for each in models.values():
        if CompiledStep.supports(each):
            # Compile in the warm-up runs, not after many steps.
            CompiledStep.of(each, eager_steps=0)
    limits = {name: measure_limits(each.device, each.dtype) for name, each in models.items()}
    # Each run and its model.
    names = {name: name for name in models}
    floats = next((name for name in precisions if not name.startswith("int")), None)
    if reference and floats is not None:
        names = {f"{REFERENCE}, {floats}": floats, **names}
    found = []
    for number in images:
        labels = torch.arange(number, device=model.device) % model.config.num_classes
        runs: dict[str, Callable[[], object]] = {}
        for run, name in names.items():
            generate = functools.partial(_generate, models[name], labels, sampling)
            runs[run] = generate if run == name else reference_only()(generate)
        seconds = time_in_turn(runs, repeats=repeats, progress=on_run)
        found += [
            Measurement(
                precision=run,
                images=number,
                seconds_per_code=[value / model.config.num_codes for value in seconds[run]],
                floor=_floor_seconds(models[name], number, limits[name], steps),
                shares=_shares(models[name], labels, sampling) if run == name else None,
            )
            for run, name in names.items()
        ]
    return found


def _with_precision(model: Transformer, precision: Precision) -> Transformer:
    own = copy.deepcopy(model)
    if precision in ("int8", "int8-all"):
        quantize(own)
        own.kv_cache_dtype = torch.int8 if precision == "int8-all" else None
        return own
    return own.to(getattr(torch, precision))


def _generate(
    model: Transformer, labels: Tensor, sampling: SamplingConfig, times: StepTimes | None = None
) -> Tensor:
    return generate_codes(model, labels, seeds=range(len(labels)), sampling=sampling, times=times)


def _floor_seconds(
    model: Transformer, images: int, limits: MachineLimits, steps: int | None
) -> float:
    """The minimum seconds for a code of each image, at the middle of the image."""
    config, rows = model.config, 2 * images
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    weights = sum(m.in_features * m.out_features for m in matrices)
    read = sum(tensor.nbytes for m in matrices for tensor in (*m.parameters(), *m.buffers()))
    tokens, passes = config.tokens_per_code, 1.0
    if config.order == "random":
        passes = (steps or default_steps(config.num_codes)) / config.num_codes
    length = config.condition_length + tokens * config.num_codes // 2
    # Of the codes, a pass in random order has on the average 1 - 2 / pi before it.
    drawn = tokens * config.num_codes * (0.5 if tokens == 1 else 1 - 2 / math.pi)
    cache = KVCache.bytes_per_sequence(
        config, config.condition_length + int(drawn), model.cache_dtype
    )
    head = config.dim * config.codebook_size  # only where a code is predicted
    operations = 2 * head + tokens * (
        2 * (weights - head) + 4 * config.layers * config.dim * length
    )
    return limits.seconds(read=passes * (read + rows * cache), operations=rows * operations)


def _shares(
    model: Transformer, labels: Tensor, sampling: SamplingConfig
) -> dict[str, float] | None:
    """Shares of the time of one run, counted by the CPU kernels."""
    times = StepTimes()
    start = time.perf_counter()
    _generate(model, labels, sampling, times)
    whole = time.perf_counter() - start
    if not times.parts.any():
        return None
    products, attention, _ = (float(part) / whole for part in times.parts)
    shares = {"products": products, "attention": attention, "sampling": times.sampling / whole}
    return {**shares, "rest": 1 - sum(shares.values())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of generating a number of images at once."""

    images: int
    seconds_per_code: float
    """Of all images at once: time until the last measured row, over the codes of one image."""
    codes: int
    """Codes of an image that were generated; if not all, the rest is taken to be as fast."""
    decode_seconds: float | None
    """Image tokenizer, all images; None without one."""
    seconds_per_image: float
    images_per_minute: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedSummary:
    """Result of ``measure_speed``."""

    device: str
    dtype: str
    machine: dict[str, Any]
    estimates: tuple[Speed, ...]
    """One per number of images, the smallest first."""
    how: str
    """Explanation of the times, in a few sentences."""


@torch.inference_mode()
def measure_speed(
    source: Source,
    *,
    images: Sequence[int] = (1, 8),
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
) -> SpeedSummary:
    """Generate images for a few seconds, some numbers of them at once.

    With the model's own sampling settings, by default in the precision that images are generated
    in. The text encoder is not loaded; conditions of text have the maximum length. InputError if
    the model generates no images, or is a published one that is not on this machine.
    """
    if not images or min(images) < 1:
        raise InputError(f"images is {list(images)}, expected integers of at least 1")
    where = find_device(device)
    precision = find_dtype(dtype, where)
    if is_text_encoder(Path(source).expanduser()):
        raise InputError(
            f"{source} is a text encoder, which generates no images; measure a pipeline"
        )
    found = checkpoints.resolve_pipeline(source)
    for part in (found.transformer, found.tokenizer):
        if part is not None and path_of(part) is None:
            raise InputError(
                f"{part} is not on this machine, so it cannot be measured; generate an image with "
                f"{source} first, which downloads it"
            )
    model = checkpoints.load_transformer(found.transformer, device=where, dtype=precision)
    sampling, pipeline = found.sampling or default_sampling(model.config), None
    if found.tokenizer is not None:
        tokenizer = checkpoints.load_tokenizer(found.tokenizer, device=where, dtype=precision)
        pipeline = Pipeline(tokenizer, model)
    counts = sorted(set(images))
    return SpeedSummary(
        device=str(where),
        dtype=dtype_name(precision),
        machine=machine(),
        estimates=tuple(_measure(model, pipeline, each, sampling) for each in counts),
        how=_how(model, sampling, has_tokenizer=pipeline is not None),
    )


def _measure(
    model: Transformer, pipeline: Pipeline | None, images: int, sampling: SamplingConfig
) -> Speed:
    """Speed of some images at once. Their conditions are zeros, which changes no time."""
    config = model.config
    condition = torch.zeros(images, dtype=torch.int64)
    if config.condition == "text":
        condition = torch.zeros(images, config.text_length, config.text_dim)
    # In the first row, kernels are compiled and memory is allocated.
    _time_rows(model, condition, sampling, seconds=0.0)
    # In random order the first codes take most of the passes.
    limit = math.inf if config.order == "random" else _SECONDS
    rows, seconds = _time_rows(model, condition, sampling, seconds=limit)
    codes = rows * config.grid[1]
    whole = seconds * config.num_codes / codes
    decode_seconds = None
    if pipeline is not None:
        start = time.perf_counter()
        pipeline.decode(torch.zeros(images, *config.grid, dtype=torch.int64))
        decode_seconds = time.perf_counter() - start
        whole += decode_seconds
    return Speed(
        images=images,
        seconds_per_code=seconds / codes,
        codes=codes,
        decode_seconds=decode_seconds,
        seconds_per_image=whole / images,
        images_per_minute=60 * images / whole,
    )


class _EnoughError(Exception):
    """Ends a generation."""


def _time_rows(
    model: Transformer, condition: Tensor, sampling: SamplingConfig, *, seconds: float
) -> tuple[int, float]:
    """Generate until the first finished row after ``seconds``; return rows, and their time."""
    rows, taken = 0, 0.0
    start = time.perf_counter()

    def on_row(row: int, codes: Tensor) -> None:
        nonlocal rows, taken
        codes[:, row - 1].cpu()  # a device may still compute them
        rows, taken = row, time.perf_counter() - start
        if taken > seconds:
            raise _EnoughError

    seeds = range(len(condition))
    with contextlib.suppress(_EnoughError):
        generate_codes(model, condition, seeds=seeds, sampling=sampling, on_row=on_row)
    return rows, taken


def _how(model: Transformer, sampling: SamplingConfig, *, has_tokenizer: bool) -> str:
    config = model.config
    how = (
        f"ms/code: time {'with' if sampling.guided else 'without'} guidance, for all images at "
        f"once, over the {config.num_codes} codes of an image"
    )
    raster = "; of a slow model only the first rows are generated."
    how += raster if config.order == "raster" else "."
    if config.condition == "text":
        length = config.text_length
        how += f" The prompt has {length} tokens, the maximum; the text encoder is left out."
    added = "Added is the image tokenizer's time for whole images."
    missing = "There is no image tokenizer, so its time is left out."
    return f"{how} {added if has_tokenizer else missing}"
