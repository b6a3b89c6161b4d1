"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from llamagen.config import KVCacheDType, SamplingConfig, sampling_settings
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.pipeline import Pipeline, PipelineOutput

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Ranking = Literal["likelihood", "condition"]
"""As ``llamagen.pipeline.ranking`` has it, which imports torch."""

_STEM_LENGTH = 50
"""Letters of a prompt that a file is named by."""


def require_at_least(minimum: int, options: object, *names: str) -> None:
    """Raise InputError if one of these options is below ``minimum``."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise InputError(f"`{name}` is {value}, expected at least {minimum}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Device and precision of computation."""

    device: Device = "auto"
    """Where to compute; auto takes the GPU if there is one."""
    dtype: DType = "auto"
    """Precision of the weights; auto takes bfloat16 where the device is fast at it."""

    def resolve(self) -> tuple[torch.device, torch.dtype]:
        """Return device and precision; raise InputError if this machine has no such device."""
        from llamagen.support.devices import find_device, find_dtype

        device = find_device(self.device)
        return device, find_dtype(self.dtype, device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """Precision of weights and KV cache."""

    quantization: Literal["none", "int8"] = "none"
    """Weights of the transformer in 8 bits: half the memory of 16, and faster where reading them
    takes the time. A folder that is quantised stays so."""
    kv_cache_dtype: KVCacheDType = "auto"
    """Keys and values of earlier codes in 8 bits: half the memory for them, and faster for many
    images at once. auto is the weights' precision."""

    def quantize(self, pipeline: Pipeline) -> None:
        """Quantise a pipeline's transformer and its cache, if that is wanted."""
        weights = None if self.quantization == "none" else self.quantization
        kept = None if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        if weights is not None or kept is not None:
            pipeline.quantize(weights, kv_cache_dtype=kept)


def setting_options(*, default: str = "the model's own", without: Collection[str] = ()) -> Any:
    """Return a dataclass with an option for each field of ``SamplingConfig``, None by default.

    Args:
        default: what None means, for the help.
        without: names of settings to leave out.
    """
    fields = []
    for setting in sampling_settings():
        if setting.name not in without:
            note = tyro.conf.arg(help=f"{setting.help} Default: {default}.")
            annotation = Annotated[setting.annotation | None, note]  # type: ignore[name-defined]
            fields.append((setting.name, annotation, dataclasses.field(default=None)))
    return dataclasses.make_dataclass("SettingOptions", fields, frozen=True, kw_only=True)


CHOICES = ("negative_prompt", "blend", "blend_share", "best_of", "rank_by")
"""Options that are arguments of a pipeline besides the sampling settings."""


def given_settings(options: object, *others: str) -> dict[str, Any]:
    """Return the sampling settings, and other options, that were given, by name.

    Raises:
        InputError: a setting lies outside its range.
    """
    settings = [setting.name for setting in sampling_settings()]
    values = {name: getattr(options, name, None) for name in (*settings, *others)}
    given = {name: value for name, value in values.items() if value is not None}
    SamplingConfig().replace(**{name: given[name] for name in settings if name in given})
    return given


if TYPE_CHECKING:

    class SettingOptions:
        """An option for each field of ``SamplingConfig``."""
else:
    SettingOptions = setting_options()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions(SettingOptions):
    """Sampling settings, and the choice among candidates."""

    negative_prompt: str | None = None
    """Text, or class, that guidance leads away from. Default: the model's "no text"."""
    blend: str | None = None
    """Text, or class, that every prompt or class is blended with."""
    blend_share: float | None = None
    """How much that counts, from 0 to 1. Default: 0.5."""
    best_of: int = 1
    """Candidates for each image, of which the best is returned."""
    rank_by: Ranking = "likelihood"
    """How the best is chosen: likelihood, the most likely codes, which tend to be plain; or
    condition, those that the prompt or class makes more likely."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOptions(SamplingOptions, QuantizationOptions, DeviceOptions):
    """Options of the commands that make images."""

    prompts: Annotated[tuple[str, ...], tyro.conf.arg(name="prompt", aliases=["-p"])] = ()
    """Prompts, for text-conditional models; one text or several."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class", aliases=["-c"])] = ()
    """Classes, for class-conditional models; by name or number, one or several."""
    count: Annotated[int, tyro.conf.arg(name="num-images", aliases=["-n"])] = 1
    """Images of each prompt or class."""
    seed: int | None = None
    """Seed of the first image; the next get the next numbers. Default: random; 0 for a file of
    prompts."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("images")
    """Folder for the images (and a sheet of them), or a .png file for the sheet alone."""

    @property
    def _sheet_only(self) -> bool:
        return self.out.suffix.lower() == ".png"

    def require_out(self) -> None:
        """Check, before any image is made, that they can be saved.

        Raises:
            InputError: ``out`` is a file of another kind.
            OSError: it cannot be written to.
        """
        import llamagen.support.storage as storage

        if not self._sheet_only and self.out.exists() and not self.out.is_dir():
            raise InputError(f"{self.out} is a file; give --out a folder or a name ending in .png")
        storage.require_writable(self.out.parent if self._sheet_only else self.out)

    def save(self, output: PipelineOutput, *, columns: int | None = None) -> None:
        """Save images, with a sheet if they are several, and print where; or the sheet alone."""
        from llamagen.support.pictures import image_grid, save_png

        alone = len(output.images) == 1
        if not self._sheet_only:
            for image, metadata in zip(output.images, output.metadata, strict=True):
                path = self.out / f"{_file_stem(metadata)}.png"
                save_png(image, path, metadata=metadata)
                print(path)
        if self._sheet_only or not alone:
            path = self.out if self._sheet_only else self.out / "sheet.png"
            sheet = output.images[0] if alone else image_grid(output.images, columns=columns)
            save_png(sheet, path, metadata=output.metadata[0] if alone else None)
            print(path)


def _file_stem(metadata: dict[str, Any]) -> str:
    text = str(metadata.get("class", metadata.get("prompt", "image")))
    name = re.sub(r"[^\w]+", "-", text).strip("-").lower()
    # File names of 255 bytes are the longest almost anywhere, of which a letter may take four.
    return f"{name[:_STEM_LENGTH].strip('-') or 'image'}-{metadata['seed']}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Engine that generates the codes, and options of vLLM."""

    engine: Literal["native", "vllm"] = "native"
    """Engine that generates the codes: this package's own, or vLLM (extra vllm)."""
    tensor_parallel_size: int = 1
    """GPUs that share the model, with vLLM."""
    data_parallel_size: int = 1
    """Copies of the model, with vLLM."""
    gpu_memory_utilization: float | None = None
    """Share of a GPU's memory that vLLM takes for a model; default vLLM's own, 0.9. Text encoder
    and image tokenizer need some too."""

    def vllm_options(self) -> dict[str, Any] | None:
        """Return what vLLM is started with, once it is told to be quiet; None for other engines.

        Raises:
            InputError: another engine was given options of vLLM's.
        """
        from llamagen.pipeline.pipeline import ENGINES
        from llamagen.vllm_plugin import keep_vllm_quiet

        values = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "data_parallel_size": self.data_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
        }
        given = {n: value for n, value in values.items() if value != getattr(EngineOptions, n)}
        if ENGINES[self.engine].copies_model:
            keep_vllm_quiet()
            return given
        if given:
            raise InputError(f"`{next(iter(given))}` goes with --engine vllm")
        return None
