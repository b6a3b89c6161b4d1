"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from llamagen.config import KVCacheDType, SamplingConfig, sampling_settings
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.pipeline import Pipeline

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Ranking = Literal["likelihood", "condition"]
"""As ``llamagen.pipeline.ranking`` has it, which imports torch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where to compute, and how precisely."""

    device: Device = "auto"
    """Where to compute; auto takes the GPU if there is one."""
    dtype: DType = "auto"
    """Precision of the weights; auto takes bfloat16 where the device is fast at it."""

    def resolve(self) -> tuple[torch.device, torch.dtype]:
        """The device and precision meant.

        Raises:
            InputError: this machine has no such device.
        """
        from llamagen.support.devices import find_device, find_dtype

        device = find_device(self.device)
        return device, find_dtype(self.dtype, device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """Precision of what decoding reads."""

    quantization: Literal["none", "int8"] = "none"
    """Weights of the transformer in 8 bits: half the memory of 16, and faster where reading them
    takes the time. A folder that is quantised stays so."""
    kv_cache_dtype: KVCacheDType = "auto"
    """Keys and values of earlier codes in 8 bits: half the memory for them, and faster for many
    images at once. auto is the weights' precision."""

    def quantize(self, pipeline: Pipeline) -> None:
        """Quantises a pipeline's transformer and its cache, if that is wanted.

        Raises:
            InputError: it is quantised differently already, or its sizes do not fit.
        """
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


def given_settings(options: object) -> dict[str, Any]:
    """Return the sampling settings that were given, by name.

    Raises:
        InputError: one lies outside its range.
    """
    values = {each.name: getattr(options, each.name, None) for each in sampling_settings()}
    given = {name: value for name, value in values.items() if value is not None}
    SamplingConfig().replace(**given)
    return given


if TYPE_CHECKING:

    class SettingOptions:
        """An option for each field of ``SamplingConfig``."""
else:
    SettingOptions = setting_options()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions(SettingOptions):
    """How codes are sampled."""

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

    def recorded(self) -> dict[str, Any]:
        """Return the given settings that the metadata of images record too, by name.

        Raises:
            InputError: one lies outside its range.
        """
        blend = {"blend": self.blend, "blend_share": self.blend_share}
        given = {name: value for name, value in blend.items() if value is not None}
        return {**given_settings(self), **given}

    def ranking(self) -> dict[str, Any]:
        """Return the settings of the choice among candidates."""
        return {"best_of": self.best_of, "rank_by": self.rank_by}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What draws the codes."""

    engine: Literal["native", "vllm"] = "native"
    """What draws the codes: this package, or vLLM (extra vllm)."""
    tensor_parallel_size: int = 1
    """GPUs that share the model, with vLLM."""
    data_parallel_size: int = 1
    """Copies of the model, with vLLM."""
    gpu_memory_utilization: float | None = None
    """Share of a GPU's memory that vLLM takes for a model; default vLLM's own, 0.9. Text encoder
    and image tokenizer need some too."""

    def vllm_options(self) -> dict[str, Any] | None:
        """What vLLM is started with, once it is told to be quiet; None for our own engine.

        Raises:
            InputError: our own engine was given options of vLLM's.
        """
        options: dict[str, Any] = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "data_parallel_size": self.data_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
        }
        unset = EngineOptions()
        given = {name: value for name, value in options.items() if value != getattr(unset, name)}
        if self.engine == "vllm":
            from llamagen.vllm_plugin.library import keep_vllm_quiet

            keep_vllm_quiet()
            return given
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise InputError(f"--{flag} goes with --engine vllm")
        return None
