"""vLLM's logits processor that mixes the streams and samples the codes.

vLLM 0.32 has two model runners with an interface of their own each: V1 (on CPUs) tells a
processor of rows that are added, removed and moved; V2 (on GPUs) tells it of slots, and at every
step which row belongs to which slot. An entry point names one class, so one class serves both.

It is loaded for every model that vLLM serves beside this package, and leaves all others alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as RowProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as SlotProcessor

from llamagen.config import SamplingConfig
from llamagen.support.errors import InputError
from llamagen.vllm_plugin.hf_config import LlamaGenConfig
from llamagen.vllm_plugin.sampling import (
    CodeSampling,
    Request,
    check_sampling,
    is_addressed,
    read_settings,
)

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import SamplingParams
    from vllm.config import VllmConfig

_log = logging.getLogger(__name__)


class CodeSampler(RowProcessor, SlotProcessor):  # type: ignore[misc]  # vLLM may be missing
    """The ladder of sampling, with each request's own settings."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise InputError for settings that no model of this kind can have.

        vLLM asks before it takes a request, and for whatever model it serves.
        """
        if is_addressed(sampling_params.extra_args):
            read_settings(sampling_params, SamplingConfig())

    def __init__(
        self, vllm_config: VllmConfig, device_or_slots: Any, is_pin_memory: bool | None = None
    ) -> None:
        """Start without requests; V1 gives its device, V2 its table of slots."""
        config = vllm_config.model_config.hf_config
        self._config = config if isinstance(config, LlamaGenConfig) else None
        self._rows: dict[int, tuple[Request | None, int, list[int]]] = {}
        """V1: by row, the request, its codes in the prompt and those drawn."""
        self._slots: dict[int, Request | None] = {}
        """V2: by slot."""
        self._prompt_lengths = None if is_pin_memory is not None else device_or_slots.prompt_len
        if self._config is not None:
            codes, first = self._config.model.codebook_size, self._config.first_code
            self._sample = CodeSampling(codebook_size=codes, first_code=first)

    # V1

    def is_argmax_invariant(self) -> bool:
        """Whether greedy requests can do without: those of other models."""
        return self._config is None

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of the batch."""
        if batch_update is None or self._config is None:
            return
        rows, is_text = self._rows, self._config.is_text
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, params, prompt, drawn in batch_update.added:
            given = 0 if is_text or prompt is None else len(prompt) - 1
            rows[row] = (self._request(params, prompt), given, drawn)
        for source, target, direction in batch_update.moved:
            moved, replaced = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                rows[source] = replaced

    # V2

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Put a request into a slot."""
        if self._config is None:
            return False
        self._slots[req_idx] = self._request(sampling_params)
        return True

    # Both

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Return logits (rows, ids) that leave each row one id, from those of both streams.

        ``logits`` are float32, and overwritten. ``ctx`` is V2's description of the rows.
        """
        if self._config is None or logits.shape[0] == 0:
            return logits
        if ctx is None:
            # Rows without a request are in batches that vLLM makes up to measure memory.
            rows = [self._rows.get(row, (None, 0, [])) for row in range(logits.shape[0])]
            requests = [request for request, _, _ in rows]
            return self._sample(logits, requests, [given + len(drawn) for _, given, drawn in rows])
        assert self._prompt_lengths is not None
        slots = ctx.idx_mapping_np.tolist()
        seen = ctx.seq_lens_upper_bound_np[: len(slots)].tolist()
        # In front of the codes stands a label, or a text that is the whole prompt. Where only a
        # part of a prompt has been read, the sample is thrown away.
        is_text, lengths = self._config.is_text, self._prompt_lengths.np
        front = [int(lengths[slot]) if is_text else 1 for slot in slots]
        indices = [max(0, end - start) for end, start in zip(seen, front, strict=True)]
        return self._sample(logits, list(map(self._slots.get, slots)), indices)

    def _request(
        self, params: SamplingParams, prompt: Sequence[int] | None = None
    ) -> Request | None:
        """Return a request; None, and a line in the log, if it cannot be served.

        By now vLLM has taken it: an exception would end the engine.
        """
        config = self._config
        assert config is not None
        try:
            sampling, seed = read_settings(params, config.default_sampling)
            check_sampling(config, sampling)
            if prompt is not None:
                _check_prompt(config, prompt)
            return Request.of(sampling, seed, config.model.num_codes)
        except InputError as error:
            _log.error("a request ends without codes: %s", error)
            return None


def _check_prompt(config: LlamaGenConfig, prompt: Sequence[int]) -> None:
    """Raise InputError unless a prompt is a label with codes behind it."""
    if config.is_text:
        raise InputError("the prompt is made of ids, but this model takes prompt_embeds")
    (label, *codes), end, first = prompt, config.end_id, config.first_code
    if label > end:
        raise InputError(f"the prompt begins with {label}, expected a label from 0 to {end - 1}")
    last = first + config.model.codebook_size - 1
    for code in codes:
        if not first <= code <= last:
            raise InputError(
                f"the prompt has {code} behind its label, expected codes from {first} to {last}"
            )
