"""Whatever is asked of vLLM, what comes back are codes, and as many as an image has."""

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.vllm_plugin.export import ExportOptions
from tests.tiny_models import tiny_transformer
from tests.vllm_plugin.conftest import SECOND_RUNNER
from tests.vllm_plugin.engines import Engine, Image, alone

vllm = pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError  # noqa: E402

pytestmark = pytest.mark.skipif(
    SECOND_RUNNER, reason="Triton's interpreter fails in kernels for vLLM's own settings"
)

CODES, CLASSES = 64, 5
FIRST, END = CLASSES + 1, CLASSES


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Works until another engine is started in this process, as the last tests do."""
    return Engine(tiny_transformer(), tmp_path_factory.mktemp("engine") / "model")


def draw(engine, prompt=(1,), **settings):
    params = vllm.SamplingParams(**{"max_tokens": 16, "detokenize": False, **settings})
    (output,) = engine.llm.generate({"prompt_token_ids": list(prompt)}, params, use_tqdm=False)
    return [list(each.token_ids) for each in output.outputs]


def test_settings_of_all_kinds_give_all_codes(engine):
    asked = [
        {},
        {"temperature": 2.0, "top_k": 3, "top_p": 0.4, "min_p": 0.3, "seed": 7},
        {"logit_bias": {CODES + FIRST: 100.0, 0: 100.0}},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.9},
        {"logprobs": 5},
        {"n": 3, "temperature": 1.0},
        {"extra_args": {"temperature": 1000.0}},
        {"extra_args": {"temperature": 1e-30}},
        {"extra_args": {"top_p": 1e-30, "top_k": 10**9}},
        {"extra_args": {"guidance_scale": 1000.0}},
    ]
    for settings in asked:
        drawn = draw(engine, **settings)
        assert [len(ids) for ids in drawn] == [16] * settings.get("n", 1), settings
        assert all(FIRST <= each < FIRST + CODES for ids in drawn for each in ids), settings
    # Where vLLM masks logits by id, among them those of codes, the request ends without codes.
    for settings in ({"allowed_token_ids": [0, 1]}, {"min_tokens": 16}):
        assert draw(engine, **settings) == [[END]], settings


def test_settings_of_vllm_count_where_a_request_names_no_others(engine):
    image = Image(
        condition=torch.tensor(1),
        seed=9,
        sampling=SamplingConfig(guidance_scale=2.0, temperature=0.8, top_k=12, top_p=0.9),
    )
    named = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "seed": 9}
    (ids,) = draw(engine, **named, extra_args={"guidance_scale": 2.0})
    assert [each - FIRST for each in ids] == alone(tiny_transformer(), image)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_scale": 2.0, "guidance_scal": 3.0}, "no setting 'guidance_scal'"),
        ({"guidance_scale": "much"}, "guidance_scale is 'much'"),
        ({"guidance_scale": True}, "guidance_scale is True"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_rejects_invalid_settings(engine, given, message):
    with pytest.raises(VLLMValidationError, match=message) as caught:
        draw(engine, extra_args=given)
    assert "\n" not in str(caught.value)
    assert len(draw(engine)[0]) == 16


@pytest.mark.parametrize("prompt", [(7000,), (CLASSES + 1,), (1, 0), (1, 7000)])
def test_prompts_without_valid_label(engine, prompt):
    (ids,) = draw(engine, prompt, max_tokens=4)
    assert ids == [END]
    assert len(draw(engine)[0]) == 16


def test_unchecked_invalid_settings_end_without_codes(engine, start):
    """An unknown name alone could be meant for somebody else, and must not end the engine."""
    assert draw(engine, extra_args={"guidance_scal": 3.0}) == [[END]]
    single = start(tiny_transformer(), ExportOptions(guidance=False))
    assert draw(single, extra_args={"guidance_scale": 3.0}) == [[END]]
    assert len(draw(single)[0]) == 16


def test_no_more_codes_than_the_image_has(start):
    """A short text leaves room for more."""
    engine = start(tiny_transformer(condition="text", text_length=30))
    prompt = engine.prompts.of(torch.randn(2, 16))
    params = vllm.SamplingParams(max_tokens=40, detokenize=False, ignore_eos=True)
    (output,) = engine.llm.generate(prompt, params, use_tqdm=False)
    ids = output.outputs[0].token_ids
    assert all(1 <= each <= CODES for each in ids[:16])
    assert set(ids[16:]) == {0}
    params.ignore_eos = False
    params.stop_token_ids = [engine.config.end_id]
    (output,) = engine.llm.generate(prompt, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 17


def test_logits_that_are_not_finite_end_the_request(start):
    model = tiny_transformer()
    with torch.no_grad():
        model.output.weight[3] = torch.nan
    assert start(model).draw([Image(condition=torch.tensor(1))]) == [[-1]]
