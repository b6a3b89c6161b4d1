"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from llamagen.config import MAX_INTEGER, KVCacheDType, SamplingConfig, sampling_settings
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.pipeline import Pipeline

DType = Literal["auto", "float32", "bfloat16", "float16"]


def require_at_least(minimum: int, options: object, *names: str) -> None:
    """Raise InputError if one of these options is there, and below ``minimum`` or huge."""
    for name in names:
        value = getattr(options, name, None)
        if value is not None and value < minimum:
            raise InputError(f"`{name}` is {value}, expected at least {minimum}")
        if value is not None and value > MAX_INTEGER:
            raise InputError(f"`{name}` is {value}, expected at most {MAX_INTEGER}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """Device of computation."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes the GPU if there is one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions(DeviceOption):
    """Device and precision of computation."""

    dtype: DType = "auto"
    """Precision of the weights; auto takes bfloat16 where the device is fast at it."""

    def resolve(self, *, auto: DType = "auto") -> tuple[torch.device, torch.dtype]:
        """Return device and precision, ``auto`` if none was asked for; or raise InputError."""
        from llamagen.support.devices import find_device, find_dtype

        device = find_device(self.device)
        return device, find_dtype(auto if self.dtype == "auto" else self.dtype, device)


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


def setting_options(default: str = "the model's own", *, without: Collection[str] = ()) -> Any:
    """Return a dataclass with an option for each field of ``SamplingConfig``, None by default.

    ``default`` is what None means, for the help; ``without`` names settings to leave out.
    """
    fields = []
    for setting in sampling_settings():
        if setting.name not in without:
            note = tyro.conf.arg(help=f"{setting.help} Default: {default}.")
            annotation = Annotated[setting.annotation | None, note]  # type: ignore[name-defined]
            fields.append((setting.name, annotation, dataclasses.field(default=None)))
    return dataclasses.make_dataclass("SettingOptions", fields, frozen=True, kw_only=True)


def given_settings(options: object, *others: str) -> dict[str, Any]:
    """Return the sampling settings, checked, and other options that were given, by name."""
    settings = [setting.name for setting in sampling_settings()]
    values = {name: getattr(options, name, None) for name in (*settings, *others)}
    given = {name: value for name, value in values.items() if value is not None}
    SamplingConfig().replace(**{name: given[name] for name in settings if name in given})
    return given


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

        Other engines with options of vLLM's are an InputError.
        """
        from llamagen.pipeline.models import ENGINES
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
