"""``llamagen info``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from llamagen.checkpoints.info import ModelSummary, PartSummary
    from llamagen.evaluation.speed import SpeedSummary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a model, a checkpoint or a generated image; without a name, list what is known."""

    source: tyro.conf.Positional[str | None] = None
    """Name, folder, checkpoint file, hub repository, or an image made by llamagen."""
    measure: bool = False
    """Load the model, and measure for a few seconds how long an image takes here."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the same as data."""


def run(options: Info) -> None:
    """Print the description."""
    print(_description(options))


def _description(options: Info) -> str:
    from llamagen.support.pictures import KINDS, read_metadata

    source = options.source
    is_image = source is not None and Path(source).suffix.lower() in KINDS
    if options.measure and (source is None or is_image):
        raise InputError("--measure goes with a model; name one, for example emoji")
    if source is None:
        return _json(_known()) if options.as_json else _overview()
    if is_image:
        return _json(read_metadata(source))
    from llamagen.checkpoints.info import describe_model
    from llamagen.evaluation.speed import measure_speed

    summary = describe_model(source)
    speed = measure_speed(source) if options.measure else None
    if options.as_json:
        measured = {} if speed is None else {"speed": dataclasses.asdict(speed)}
        return _json(dataclasses.asdict(summary) | measured)
    return "\n\n".join(_paragraphs(summary) + ([] if speed is None else [_speed(speed)]))


def _overview() -> str:
    known = _known()
    lines = ["transformer presets (layers, heads, dim):"]
    for name, c in known["transformer_presets"].items():
        lines.append(f"  {name:<5} {c['layers']:>3} {c['heads']:>3} {c['dim']:>5}")
    lines += ["", "image tokenizer presets (downsampling, codes):"]
    for name, c in known["tokenizer_presets"].items():
        lines.append(f"  {name:<5} {_downsampling(c):>3} {c['codebook_size']:>6}")
    lines += ["", "models that come with the package (names for --model):"]
    lines += [f"  {name}" for name in known["shipped_models"]]
    lines += ["", "published models (names for --model and --tokenizer):"]
    for m in known["published_models"]:
        lines.append(f"  {m['name']:<12} {m['kind']:<16} {m['repo']}/{m['file']}")
    return "\n".join(lines)


def _known() -> dict[str, Any]:
    """Return all presets and models that have names, as data."""
    from llamagen.checkpoints import PUBLIC_MODELS, shipped_models
    from llamagen.config import TOKENIZER_PRESETS, TRANSFORMER_PRESETS, config_to_dict

    return {
        "transformer_presets": {n: config_to_dict(c) for n, c in TRANSFORMER_PRESETS.items()},
        "tokenizer_presets": {n: config_to_dict(c) for n, c in TOKENIZER_PRESETS.items()},
        "shipped_models": shipped_models(),
        "published_models": [config_to_dict(model) for model in PUBLIC_MODELS],
    }


def _downsampling(config: dict[str, Any]) -> int:
    return 2 ** (len(config["channel_multipliers"]) - 1)


def _paragraphs(summary: ModelSummary) -> list[str]:
    found = [f"model: {summary.name}", _parts_table(summary)]
    found += [_architecture(part, summary) for part in summary.parts if part.config]
    last = []
    if summary.image_size is not None:
        height, width = summary.image_size
        last.append(f"images: {width} x {height} pixels")
    if summary.class_names:
        last.append(f"classes: {summary.classes} ({', '.join(summary.class_names[:5])}, ...)")
    elif summary.classes is not None:
        last.append(f"classes: {summary.classes}")
    if summary.text is not None:
        text = summary.text
        cleaned = "cleaned" if text.clean else "as they are"
        # Of an encoder of the model's own, its folder's name in the model.
        encoder = Path(text.encoder).name if Path(text.encoder).is_dir() else text.encoder
        last.append(f"text: by {encoder}, {text.max_length} tokens, captions {cleaned}")
    if summary.sampling is not None:
        settings = dataclasses.asdict(summary.sampling).items()
        last.append("sampling: " + ", ".join(f"{name} {value}" for name, value in settings))
    return [*found, "\n".join(last)] if last else found


def _parts_table(summary: ModelSummary) -> str:
    """Return parameters, disk and memory of each part and, of several, in all."""
    from llamagen.evaluation.speed import table

    def row(name: str, parameters: int | None, disk: int | None, memory: Any) -> list[str]:
        counted = "unknown" if parameters is None else f"{parameters:,}"
        stored = "not here" if disk is None else _mib(disk)
        return [name, counted, stored, *(_mib(memory.get(p)) for p in summary.memory)]

    rows = [row(p.kind, p.parameters, p.disk_bytes, p.memory) for p in summary.parts]
    if len(rows) > 1:
        rows.append(row("in all", summary.parameters, summary.disk_bytes, summary.memory))
    precisions = [f"in {precision}" for precision in summary.memory]
    return table(["MiB", "parameters", "on disk", *precisions], rows)


def _architecture(part: PartSummary, summary: ModelSummary) -> str:
    config = part.config
    rows: dict[str, Any] = {}
    if part.kind == "image tokenizer":
        rows["downsampling"] = _downsampling(config)
        rows["codebook"] = f"{config['codebook_size']} x {config['codebook_dim']}"
    else:
        sizes = (str(config.get(name, "?")) for name in ("layers", "heads", "dim"))
        rows["layers, heads, dim"] = ", ".join(sizes)
        if "order" in config:
            rows["order"] = config["order"]
    if part.kind == "transformer" and summary.grid is not None and summary.kv_cache is not None:
        grid = " x ".join(map(str, summary.grid))
        rows["condition"] = summary.condition
        rows["grid"] = f"{grid} = {summary.codes} codes of {config['codebook_size']}"
        rows["KV cache of an image with guidance"] = ", ".join(
            f"{_mib(size)} MiB in {precision}" for precision, size in summary.kv_cache.items()
        )
    rows["stored as"] = part.stored_as or "not on this machine"
    return "\n".join([f"{part.kind}:", *(f"  {name}: {value}" for name, value in rows.items())])


def _speed(speed: SpeedSummary) -> str:
    from llamagen.evaluation.speed import table

    about = speed.machine
    on = about["gpu"] if speed.device.startswith("cuda") else about["processor"]
    rows = [
        [
            str(each.images),
            f"{1000 * each.seconds_per_code:.2f}",
            "" if each.decode_seconds is None else f"{each.decode_seconds:.3f}",
            f"{each.seconds_per_image:.3f}",
            f"{each.images_per_minute:,.1f}",
        ]
        for each in speed.estimates
    ]
    header = ["images at once", "ms/code", "s for pixels", "s/image", "images/minute"]
    where = f"measured on {speed.device} in {speed.dtype} ({on}, {about['threads']} threads):"
    return "\n\n".join([where, table(header, rows), speed.how])


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"


def _json(data: Any) -> str:
    # Where the output takes ASCII only, it would not be JSON any more.
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(data, indent=2, ensure_ascii=not is_unicode)
