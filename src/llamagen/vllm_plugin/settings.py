"""Settings of a request as vLLM carries them: to ``SamplingParams.extra_args`` and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llamagen.config import SamplingConfig, sampling_settings
from llamagen.generation.seeds import check_seed
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from vllm import SamplingParams

    from llamagen.vllm_plugin.hf_config import LlamaGenConfig

_SETTINGS = {setting.name: setting for setting in sampling_settings()}

NAMES = (*_SETTINGS, "seed")
"""Names of ``extra_args`` that are this plugin's."""

_OF_VLLM = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
"""Names of ``extra_args`` that are vLLM's own."""


def extra_args(sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    """Return the ``extra_args`` of a request, with every setting named.

    Raises:
        InputError: the seed lies outside 0 to 2^63 - 1.
    """
    values = {**dataclasses.asdict(sampling), "seed": check_seed(seed)}
    return {name: value for name, value in values.items() if value is not None}


def check_guidance(config: LlamaGenConfig, sampling: SamplingConfig) -> None:
    """Raise InputError if guidance is asked of a model that runs without it."""
    if sampling.guided and config.streams == 1:
        raise InputError(
            f"guidance_scale is {sampling.guidance_scale}, but this engine runs without guidance; "
            f"ask for 1, or start it (or export its model) with guidance"
        )


def sampling_params(config: LlamaGenConfig, sampling: SamplingConfig, seed: int) -> SamplingParams:
    """Return the parameters of a request to vLLM for one image of ``config``'s model.

    Raises:
        InputError: as ``extra_args`` and ``check_guidance``.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    check_guidance(config, sampling)
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

    Raises:
        InputError: a setting is unknown, or not a value it can have.
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


def _integer(name: str, value: Any) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value == int(value)):
        raise InputError(f"{name} is {value!r}, expected an integer")
    return int(value)
