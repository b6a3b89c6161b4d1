"""Images by requests: vLLM's asynchronous engine, for servers and everything above it."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncGenerator, Hashable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from llamagen.checkpoints.sources import Source
from llamagen.config import Grid, SamplingConfig
from llamagen.models.transformer import Transformer
from llamagen.support.devices import find_device, find_dtype
from llamagen.support.errors import InputError, NotFiniteError
from llamagen.vllm_plugin.export import ExportOptions, temporary_export
from llamagen.vllm_plugin.library import require_vllm
from llamagen.vllm_plugin.prompts import Prompts
from llamagen.vllm_plugin.settings import sampling_params

if TYPE_CHECKING:
    from llamagen.vllm_plugin.hf_config import LlamaGenConfig

_CPU_BLOCK = 128
"""Positions that vLLM's cache on a CPU hands out at a time."""
_CPU_IMAGES = 256
"""Images that vLLM draws at once unless it is told otherwise, at most."""
_CPU_SHARE = 0.4
"""Of the free memory."""


class VllmEngine:
    """A transformer on vLLM that draws any number of images at once.

    Requests may differ in everything, and join, leave and wait at any time: each image gets the
    codes (up to floating-point ties) that it would get alone, and from ``generate_codes``.

    vLLM computes in processes of its own, which start anew from the program's main module: what a
    script does at its top level belongs under ``if __name__ == "__main__":``.
    """

    def __init__(
        self,
        source: Source | Transformer,
        *,
        export: ExportOptions | None = None,
        dtype: str | torch.dtype | None = None,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        **options: Any,
    ) -> None:
        """Starts vLLM; returns when it is ready.

        Args:
            source: an exported folder, a transformer, or whatever a pipeline can be loaded from.
            export: what the engine shall be able to do; by default what an exported folder says,
                and guidance without negative prompts for everything else.
            dtype: precision; by default bfloat16 where the device is fast at it.
            tensor_parallel_size: devices that share each layer.
            data_parallel_size: copies of the model, among which requests are spread.
            options: of vLLM's ``AsyncEngineArgs``, as max_num_seqs, enforce_eager,
                gpu_memory_utilization or quantization.

        Raises:
            FileNotFoundError: a file of the source is missing.
            InputError: vLLM is not installed, the source is no transformer, or vLLM refuses the
                options.
        """
        require_vllm()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._open = ExitStack()
        try:
            folder = self._open.enter_context(temporary_export(source, export))
            device = find_device("auto")
            precision = find_dtype(dtype, device)
            self._prompts = Prompts(folder, precision)
            _check_options(self._prompts.config, tensor_parallel_size, options)
            arguments: dict[str, Any] = {
                "model": str(folder),
                "skip_tokenizer_init": True,
                "dtype": str(precision).removeprefix("torch."),
                "tensor_parallel_size": tensor_parallel_size,
                "data_parallel_size": data_parallel_size,
                "enable_prompt_embeds": self._prompts.takes_embeddings,
                "disable_log_stats": True,
                **options,
            }
            if device.type == "cpu":
                _limit_memory(arguments, self._prompts.config, precision)
            try:
                self._engine: Any = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
            except (TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise InputError(f"vLLM refuses to start with these options: {reason}") from error
        except BaseException:
            self._open.close()
            raise

        self.grid: Grid = self._prompts.config.model.grid
        """Rows and columns of an image."""
        scheduled = self._engine.vllm_config.scheduler_config.max_num_seqs
        self.max_images: int = scheduled * data_parallel_size
        """Images drawn at once; more wait."""

    @property
    def guidance(self) -> bool:
        """Whether requests may be guided."""
        return self._prompts.config.streams == 2

    @property
    def alive(self) -> bool:
        """Whether vLLM's processes still work; they do not come back."""
        return self._engine is not None and not self._engine.errored

    @property
    def sampling(self) -> SamplingConfig:
        """The model's own settings."""
        return self._prompts.config.default_sampling

    async def draw(
        self,
        condition: Tensor,
        *,
        seed: int,
        sampling: SamplingConfig,
        unconditional: Tensor | None = None,
        blend: Tensor | None = None,
        blend_share: float = 0.5,
        known: Tensor | None = None,
        request: Hashable = None,
    ) -> AsyncGenerator[list[int], None]:
        """Draws one image.

        Args:
            condition: a label (), or text features (C, text_dim) without padding.
            seed: decides, with the condition and the settings, the image.
            sampling: how codes are drawn.
            unconditional: likewise, what guidance leads away from; by default the model's own "no
                class" or "no text".
            blend: not possible here, as ``known``.
            blend_share: goes with it.
            known: not possible here.
            request: whose image it is; vLLM serves them in the order in which they come.

        Yields:
            All codes so far, after each finished row of the grid or several; at last all of them.
            Closing the iterator ends the request.

        Raises:
            InputError: condition, seed or settings do not fit the model or the engine, or it is
                asked to keep codes or to blend.
            NotFiniteError: the model's logits are not finite.
        """
        del request, blend_share
        if blend is not None or known is not None:
            raise InputError("vLLM neither keeps codes nor blends; draw this with engine 'native'")
        from vllm.exceptions import VLLMClientError

        config = self._prompts.config
        params = sampling_params(config, sampling, seed)
        prompt = self._prompts.of(condition, unconditional if sampling.guided else None)
        rows, columns = self.grid
        codes: list[int] = []
        done = 0
        stream = self._engine.generate(prompt, params, f"image-{uuid.uuid4().hex}")
        try:
            async for output in stream:
                codes += [token - config.first_code for token in output.outputs[0].token_ids]
                if len(codes) // columns > done and codes[-1] >= 0:
                    done = len(codes) // columns
                    yield codes[: done * columns]
        except VLLMClientError as error:
            raise InputError(f"vLLM refuses the request: {' '.join(str(error).split())}") from error
        finally:
            await stream.aclose()
        if done != rows:
            raise NotFiniteError(
                "the transformer's logits are not finite; use bfloat16 or float32, or check the "
                "weights"
            )

    async def close(self) -> None:
        """Ends vLLM's processes; drawing that still goes on fails."""
        if self._engine is not None:
            self._engine.shutdown()
            # Let go now: what is left until the interpreter ends complains then.
            self._engine = None
        self._open.close()


def _check_options(
    config: LlamaGenConfig, tensor_parallel_size: int, options: Mapping[str, Any]
) -> None:
    """Raises InputError for what vLLM offers and images with guidance cannot be drawn with."""
    heads = config.model.heads
    if tensor_parallel_size < 1 or heads % tensor_parallel_size:
        raise InputError(
            f"tensor_parallel_size is {tensor_parallel_size}, expected a divisor of the model's "
            f"{heads} heads"
        )
    if options.get("speculative_config"):
        raise InputError("speculative decoding does not go with guidance; leave it out")
    if options.get("pipeline_parallel_size", 1) != 1:
        raise InputError(
            "pipeline_parallel_size is not supported; use tensor_parallel_size instead"
        )


def _limit_memory(arguments: dict[str, Any], config: LlamaGenConfig, dtype: torch.dtype) -> None:
    """Gives vLLM's cache on a CPU as much as its images can fill, and a part of what is free.

    By itself vLLM takes nearly all memory of the machine, and does not start if some is in use.
    """
    if {"kv_cache_memory_bytes", "gpu_memory_utilization"} & arguments.keys():
        return
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return
    processes = arguments["tensor_parallel_size"] * arguments["data_parallel_size"]
    positions = -(-config.max_position_embeddings // _CPU_BLOCK) * _CPU_BLOCK
    heads = config.num_hidden_layers * config.num_key_value_heads
    image = 2 * heads * positions * config.head_dim * dtype.itemsize
    images = arguments.get("max_num_seqs") or _CPU_IMAGES
    own = image * images // arguments["tensor_parallel_size"]
    free = psutil.virtual_memory().available * _CPU_SHARE / processes
    arguments["kv_cache_memory_bytes"] = int(max(image, min(own, free)))
