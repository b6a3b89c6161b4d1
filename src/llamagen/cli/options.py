"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from llamagen.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.pipeline import Pipeline

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


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
        from llamagen.devices import find_device, find_dtype

        device = find_device(self.device)
        return device, find_dtype(self.dtype, device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """How many bits a weight has."""

    quantization: Literal["none", "int8", "int4"] = "none"
    """Weights of the transformer in 8 or 4 bits: less memory, and faster where reading them takes
    the time. A folder that is quantised stays so."""

    def quantize(self, pipeline: Pipeline) -> None:
        """Quantises a pipeline's transformer, if that is wanted.

        Raises:
            InputError: it is quantised differently already, or its sizes do not fit.
        """
        if self.quantization != "none":
            pipeline.quantize(self.quantization)


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
