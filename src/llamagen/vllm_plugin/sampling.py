"""How a request is sampled: its settings as vLLM carries them, and from logits to codes.

Settings travel in ``SamplingParams.extra_args``. Shapes: B requests, V codes, I ids of vLLM.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llamagen.backends.cpu.sampling import Rows
from llamagen.config import SamplingConfig, sampling_settings
from llamagen.generation.request import check_schedule, check_seed, uniform_draws
from llamagen.generation.sampling import Sampler, fastest_sampler, guidance_scale_at
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from vllm import SamplingParams

    from llamagen.vllm_plugin.hf_config import LlamaGenConfig

_SETTINGS = {setting.name: setting for setting in sampling_settings()}

NAMES = (*_SETTINGS, "seed")
"""Names of ``extra_args`` that are this plugin's."""

_OF_VLLM = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
"""Names of ``extra_args`` that are vLLM's own."""

_GREEDY = SamplingConfig(guidance_scale=1.0, temperature=0.0)
"""Of rows that are not served."""


def extra_args(sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    """Return the ``extra_args`` of a request, with every setting named."""
    values = {**dataclasses.asdict(sampling), "seed": check_seed(seed)}
    return {name: value for name, value in values.items() if value is not None}


def check_sampling(config: LlamaGenConfig, sampling: SamplingConfig) -> None:
    """Raise InputError for passes, and for guidance of a model that runs without it."""
    check_schedule(sampling, "raster", config.model.num_codes)
    if sampling.guided and config.streams == 1:
        raise InputError(
            f"guidance_scale is {sampling.guidance_scale}, but this engine runs without guidance; "
            f"ask for 1, or start it (or export its model) with guidance"
        )


def sampling_params(config: LlamaGenConfig, sampling: SamplingConfig, seed: int) -> SamplingParams:
    """Return the parameters of a request to vLLM for one image; InputError if it cannot be served.

    It cannot be with guidance where the model runs without, or a seed outside 0 to 2^63 - 1.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    check_sampling(config, sampling)
    return SamplingParams(
        # Greedy to vLLM: it takes the one code that the logits processor leaves.
        temperature=0.0,
        max_tokens=config.model.num_codes,
        stop_token_ids=[config.end_id],
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=config.model.grid[1],
        extra_args=extra_args(sampling, seed),
    )


def is_addressed(given: Mapping[str, Any] | None) -> bool:
    """Whether ``extra_args`` are meant for this plugin, and not for another model's."""
    return given is not None and any(name in given for name in NAMES)


def read_settings(params: SamplingParams, defaults: SamplingConfig) -> tuple[SamplingConfig, int]:
    """Return settings and seed of a request.

    Settings that ``extra_args`` do not name are taken from vLLM's own fields of the same name
    (temperature, top_k, top_p, min_p, seed), or else from ``defaults``. Without a seed it is 0.
    InputError if a setting is unknown, or not a value it can have.
    """
    seed = 0 if params.seed is None else max(0, params.seed)
    values = dataclasses.asdict(defaults)
    values |= {name: getattr(params, name) for name in _SETTINGS if hasattr(params, name)}
    values["top_k"] = max(0, params.top_k)
    for name, value in (params.extra_args or {}).items():
        if name == "seed":
            seed = _integer(name, value)
        elif name in _SETTINGS:
            # JSON knows one kind of number: 5.0 is an integer where one is expected.
            is_integer = _SETTINGS[name].type is int and value is not None
            values[name] = _integer(name, value) if is_integer else value
        elif name not in _OF_VLLM:
            raise InputError(f"there is no setting {name!r}; choose from {', '.join(NAMES)}")
    return SamplingConfig(**values), check_seed(seed)


def refuse_unsupported(speculative: object, pipeline_parallel_size: int) -> None:
    """Raise InputError for options with which vLLM would run, but sample other codes."""
    if speculative:
        raise InputError("speculative decoding does not go with guidance; leave it out")
    if pipeline_parallel_size != 1:
        raise InputError(
            "pipeline_parallel_size is not supported; use tensor_parallel_size instead"
        )


def _integer(name: str, value: Any) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value == int(value)):
        raise InputError(f"{name} is {value!r}, expected an integer")
    return int(value)


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Settings and random numbers of one image."""

    sampling: SamplingConfig
    uniforms: tuple[float, ...]
    """One number in [0, 1) per code."""

    @classmethod
    def of(cls, sampling: SamplingConfig, seed: int, codes: int) -> Request:
        """Return the request for an image of ``codes`` codes."""
        return cls(sampling, tuple(uniform_draws([seed], codes)[0].tolist()))


class CodeSampling:
    """Samples for batches whose requests come, go and change rows.

    Only the settings of the last batch are kept, which usually are those of the next one too.
    """

    def __init__(self, *, codebook_size: int, first_code: int) -> None:
        """Code c has the id ``first_code`` + c; the id before the codes ends a sequence."""
        self.codebook_size, self.first_code = codebook_size, first_code
        self._settings: list[SamplingConfig] = []
        self._sampler: Sampler | None = None

    def __call__(
        self, logits: Tensor, requests: Sequence[Request | None], indices: Sequence[int]
    ) -> Tensor:
        """Leave one id per row that can be sampled: 0 for the chosen code, -inf for all others.

        The first V of ``logits`` (B, I), float32 and overwritten, are those of the conditional
        stream, the next V those of the unconditional one, which guided ``requests`` need;
        ``indices`` say which code of its image each row is about to sample. A request that is None,
        has all its codes or has logits that are not finite gets the id that ends it.
        """
        count, codes = len(requests), self.codebook_size
        settings, uniforms, served = [_GREEDY] * count, [0.0] * count, [False] * count
        scales = np.ones(count, dtype=np.float32)
        for row, (request, index) in enumerate(zip(requests, indices, strict=True)):
            if request is not None and 0 <= index < len(request.uniforms):
                settings[row], uniforms[row] = request.sampling, request.uniforms[index]
                scales[row] = guidance_scale_at(request.sampling, index, len(request.uniforms))
                served[row] = True
        if self._sampler is None or settings != self._settings:
            self._settings = settings
            self._sampler = fastest_sampler(settings, codes, logits.device)
        each = np.arange(count, dtype=np.int64)
        rows = Rows(each, np.where(scales == 1.0, -1, each), scales)
        start = codes if (scales != 1.0).any() else 0
        conditional, unconditional = logits[:, :codes], logits[:, start : start + codes]
        # Whether all is finite is not asked: that would synchronise with the device at every step.
        drawn, finite = self._sampler(
            conditional, unconditional, rows, _to_device(logits.device, uniforms)
        )
        if not all(served):
            finite &= _to_device(logits.device, served)
        ids = torch.where(finite, drawn + self.first_code, self.first_code - 1)
        return logits.fill_(-torch.inf).scatter_(1, ids.unsqueeze(-1), 0.0)


def _to_device(device: torch.device, values: list[float] | list[bool]) -> Tensor:
    """Copy a few numbers to the device, without waiting for it."""
    dtype = torch.bool if isinstance(values[0], bool) else torch.float32
    pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
