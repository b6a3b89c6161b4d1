"""Settings as vLLM carries them. Needs no vLLM."""

from types import SimpleNamespace

import pytest

from llamagen.config import SamplingConfig
from llamagen.support.errors import InputError
from llamagen.vllm_plugin.settings import extra_args, is_addressed, read_settings


def params(**changes):
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": None, "extra_args": None}
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(guidance_scale=0.0, guidance_stop=7, temperature=0.0, top_k=3, top_p=0.2),
    ],
)
def test_round_trip(sampling):
    carried = extra_args(sampling, 2**63 - 1)
    # vLLM's own fields say something else.
    given = params(temperature=0.3, top_k=9, top_p=0.1, seed=4, extra_args=carried)
    assert read_settings(given, SamplingConfig(guidance_scale=9.0)) == (sampling, 2**63 - 1)


def test_vllms_fields_and_the_models_guidance_fill_the_rest():
    defaults = SamplingConfig(guidance_scale=7.5, guidance_stop=9, top_k=1000)
    sampling, seed = read_settings(params(temperature=0.5, top_k=-1, seed=3), defaults)
    assert sampling == SamplingConfig(guidance_scale=7.5, guidance_stop=9, temperature=0.5)
    assert seed == 3
    assert read_settings(params(), defaults)[1] == 0


def test_guidance_stop_can_be_taken_back():
    given = params(extra_args={"guidance_stop": None})
    assert read_settings(given, SamplingConfig(guidance_stop=5))[0].guidance_stop is None


def test_numbers_may_come_as_json_has_them():
    given = params(extra_args={"top_k": 20.0, "guidance_scale": 3})
    assert read_settings(given, SamplingConfig())[0] == SamplingConfig(guidance_scale=3.0, top_k=20)


def test_ignores_arguments_of_vllm_itself():
    given = params(extra_args={"kv_transfer_params": {"a": 1}, "seed": 4})
    assert read_settings(given, SamplingConfig())[1] == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance": 2.0}, "no setting 'guidance'"),
        ({"top_k": "many"}, "top_k is 'many', expected an integer"),
        ({"top_k": float("inf")}, "top_k is inf, expected an integer"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a finite number"),
        ({"temperature": None}, "temperature is None"),
        ({"seed": 2**63}, "seed is"),
    ],
)
def test_rejects_bad_settings(given, message):
    with pytest.raises(InputError, match=message):
        read_settings(params(extra_args=given), SamplingConfig())


def test_requests_of_other_models_are_not_addressed():
    assert not is_addressed(None)
    assert not is_addressed({"some_other_plugin": 1})
    assert is_addressed({"guidance_scale": 1, "some_other_plugin": 1})
