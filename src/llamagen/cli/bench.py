"""``llamagen bench``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro

from llamagen.cli.options import DeviceOption, require_at_least
from llamagen.config import Order
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.evaluation.speed import Measurement, Precision
    from llamagen.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(DeviceOption):
    """Measure decoding: milliseconds per code, the machine's limits, and where the time goes."""

    model: str | None = None
    """A class-conditional model: name, pipeline folder, hub repository or transformer. Default:
    random weights, of --preset."""
    preset: str = "B"
    """Size of the transformer with random weights."""
    order: Order = "raster"
    """Order in which the transformer with random weights predicts codes."""
    steps: int | None = None
    """Passes in which a model of random order draws an image."""
    images: tuple[int, ...] = (1, 8, 32)
    """Numbers of images generated at once, each with guidance."""
    precisions: tuple[Literal["float32", "bfloat16", "float16", "int8", "int8-all"], ...] = ()
    """Precisions of the weights; int8-all has keys and values in 8 bits, too. Default: the fastest
    of this device, int8 and int8-all."""
    repeats: int = 3
    """Timings of each, in turn."""
    reference: Annotated[bool, tyro.conf.arg(aliases=["--plain"])] = True
    """Measure the model's own torch operations, too, and how many times as fast the backend is."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """JSON file for all timings, with machine and date."""


def run(options: Bench) -> None:
    """Measure, and print a table in Markdown."""
    from tqdm import tqdm

    from llamagen.evaluation import speed
    from llamagen.generation.schedules.parallel import default_steps
    from llamagen.support import storage
    from llamagen.support.devices import dtype_name, find_device, find_dtype

    if min(options.images, default=0) < 1:
        raise InputError(f"--images is {list(options.images)}, expected integers of at least 1")
    require_at_least(1, options, "repeats")
    if options.model is not None and options.order != "raster":
        raise InputError("--order goes with random weights; a model has its own: leave out --order")
    if options.out is not None:
        storage.require_writable(options.out.parent)
    device = find_device(options.device)
    dtype = find_dtype(None, device)
    model = _model(options, device, dtype)
    chosen = options.precisions or (cast("Precision", dtype_name(dtype)), "int8", "int8-all")
    runs = len(options.images) * (len(chosen) + options.reference) * (options.repeats + 1)
    with tqdm(total=runs, unit="run", disable=None) as bar:
        found = speed.measure_decoding(
            model,
            chosen,
            options.images,
            repeats=options.repeats,
            steps=options.steps,
            reference=options.reference,
            on_run=bar.update,
        )
    about = speed.machine()
    label = options.model or options.preset
    codes, order = model.config.num_codes, model.config.order
    steps = codes if order == "raster" else options.steps or default_steps(codes)
    print(f"{label}, {codes} codes in {steps} passes ({order} order), with guidance")
    print(f"{about['processor'] or about['gpu']}, {about['threads']} threads, {about['date']}")
    print(_table(found))
    if options.out is not None:
        about_model = {"model": label, "order": order, "steps": steps}
        results = {**about_model, "measured": [dataclasses.asdict(each) for each in found]}
        storage.write_json(options.out, {"machine": about, "results": results})
        print(options.out)


def _model(options: Bench, device: torch.device, dtype: torch.dtype) -> Transformer:
    import torch

    import llamagen.checkpoints as checkpoints
    from llamagen.config import TRANSFORMER_PRESETS, preset
    from llamagen.models.transformer import Transformer
    from llamagen.models.transformer.quantization import refuse_quantized

    if options.model is None:
        torch.manual_seed(0)
        with torch.device(device):
            config = preset(TRANSFORMER_PRESETS, options.preset)
            model = Transformer(dataclasses.replace(config, order=options.order))
        model = model.to(dtype).eval()
        # The initial output head is zero, so that all codes would be equally likely.
        torch.nn.init.normal_(model.output.weight, std=0.02)
        return model
    found = checkpoints.resolve_pipeline(options.model)
    model = checkpoints.load_transformer(found.transformer, device=device, dtype=dtype)
    refuse_quantized(model.config, "be measured in several precisions")
    if model.config.condition != "class":
        raise InputError(
            f"{options.model} is conditioned on text; bench measures class-conditional models"
        )
    return model


def _table(found: list[Measurement]) -> str:
    from llamagen.evaluation.speed import REFERENCE, median_and_spread, table

    header = ["weights", "images (rows)", "ms/code", "floor", "of reference", "time goes to"]
    references = {m.images: m.median for m in found if m.precision.startswith(REFERENCE)}
    rows = [
        [
            m.precision,
            f"{m.images} ({2 * m.images})",
            median_and_spread(m.seconds_per_code, unit=1000),
            f"{1000 * m.floor:.1f}",
            f"{references[m.images] / m.median:.2f}x" if m.images in references else "",
            ", ".join(f"{name} {share:.0%}" for name, share in (m.shares or {}).items()),
        ]
        for m in found
    ]
    return table(header, rows)
