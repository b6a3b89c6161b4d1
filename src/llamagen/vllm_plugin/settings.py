"""How a request is drawn, as vLLM carries it: ``SamplingParams.extra_args`` and back."""

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

NAMES = (*(setting.name for setting in sampling_settings()), "seed")
"""What a request may say of itself."""

_OF_VLLM = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
"""What vLLM itself looks for in ``extra_args``."""


def extra_args(sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    """``extra_args`` of a request, with every setting named.

    Raises:
        InputError: the seed lies outside 0 to 2^63 - 1.
    """
    values = {**dataclasses.asdict(sampling), "seed": check_seed(seed)}
    return {name: value for name, value in values.items() if value is not None}


def sampling_params(config: LlamaGenConfig, sampling: SamplingConfig, seed: int) -> SamplingParams:
    """Parameters of a request to vLLM for one image of the model that ``config`` describes.

    Raises:
        InputError: the seed lies outside 0 to 2^63 - 1, or the model runs without guidance and is
            asked for it.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if sampling.guided and config.streams == 1:
        raise InputError(
            f"guidance_scale is {sampling.guidance_scale}, but this engine runs without guidance; "
            f"ask for 1, or start it (or export its model) with guidance"
        )
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
    """Whether ``extra_args`` are meant for this plugin. Other models' requests have others."""
    return given is not None and any(name in given for name in NAMES)


def read_settings(params: SamplingParams, defaults: SamplingConfig) -> tuple[SamplingConfig, int]:
    """Settings and seed of a request.

    What ``extra_args`` do not name is taken from vLLM's own fields of the same meaning
    (temperature, top_k, top_p, min_p, seed); the rest, which vLLM has not, from ``defaults``.
    Without a seed it is 0.

    Raises:
        InputError: a setting is unknown, or not a value it can have.
    """
    seed = 0 if params.seed is None else max(0, params.seed)
    values: dict[str, Any] = {
        **dataclasses.asdict(defaults),
        "top_k": max(0, params.top_k),
    }
    settings = {setting.name: setting for setting in sampling_settings()}
    # What vLLM has a field of its own for, under the same name.
    values |= {
        name: getattr(params, name)
        for name in settings
        if name != "top_k" and hasattr(params, name)
    }
    for name, value in (params.extra_args or {}).items():
        if name == "seed":
            seed = _integer(name, value)
        elif name in settings:
            # JSON knows one kind of number: 5.0 is an integer where one is expected.
            wanted = settings[name].type
            values[name] = _integer(name, value) if wanted is int and value is not None else value
        elif name not in _OF_VLLM:
            raise InputError(f"there is no setting {name!r}; choose from {', '.join(NAMES)}")
    known = {name: value for name, value in values.items() if name in settings}
    return SamplingConfig(**known), check_seed(seed)


def _integer(name: str, value: Any) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value):
        raise InputError(f"{name} is {value!r}, expected an integer")
    return int(value)
