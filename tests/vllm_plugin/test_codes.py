"""vLLM draws the codes that our own engine draws, whatever it does with the requests."""

import dataclasses

import pytest
import torch

from llamagen.backends import reference_only
from llamagen.config import SamplingConfig
from llamagen.support.errors import InputError
from llamagen.vllm_plugin.export import ExportOptions
from tests.parity.test_transformer import condition_of, model_of
from tests.tiny_models import tiny_transformer
from tests.vllm_plugin.engines import Image, alone, mixed_settings, texts

pytest.importorskip("vllm")

TINY = ["gpt_c2i_tiny", "gpt_c2i_gqa_tiny", "gpt_t2i_tiny"]


@pytest.mark.parametrize("name", TINY)
def test_greedy_codes_are_those_of_the_published_model(read_case, start, name):
    case = read_case(name)
    engine = start(model_of(case))
    condition, mask = condition_of(case)
    conditions = list(condition)
    if mask is not None:
        conditions = [text[kept] for text, kept in zip(condition, mask, strict=True)]
    for settings in case.info["generate"]:
        interval = settings["cfg_interval"]
        sampling = SamplingConfig(
            guidance_scale=settings["cfg_scale"],
            guidance_stop=None if interval < 0 else interval + 2,
            top_k=settings["top_k"],
            temperature=0.0,
        )
        drawn = engine.draw([Image(condition=each, sampling=sampling) for each in conditions])
        expected = case.tensor(settings["array"]).long()
        assert torch.equal(torch.tensor(drawn)[:, : expected.shape[1]], expected), settings


def class_images(count, *, classes, codes=16, guided=True):
    settings = mixed_settings(count, codes=codes, guided=guided)
    return [
        Image(condition=torch.tensor(i % classes), seed=100 + i, sampling=settings[i])
        for i in range(count)
    ]


def text_images(count, *, longest, codes=16, guided=True):
    settings = mixed_settings(count, codes=codes, guided=guided)
    return [
        Image(condition=text, seed=100 + i, sampling=settings[i])
        for i, text in enumerate(texts(count, longest=longest))
    ]


def test_sixty_requests_of_mixed_settings_in_one_batch(start):
    model = tiny_transformer()
    images = class_images(60, classes=5)
    assert start(model).draw(images) == [alone(model, image) for image in images]


def test_texts_of_all_lengths_in_one_batch(start):
    model = tiny_transformer(condition="text", text_length=30)
    images = text_images(60, longest=30)
    assert start(model).draw(images) == [alone(model, image) for image in images]


@pytest.mark.parametrize("kind", ["class", "text"])
def test_preempted_requests_get_the_same_codes(start, kind):
    """With memory for a fraction of what runs, vLLM takes it away from one for another."""
    model = tiny_transformer(condition=kind, text_length=40, grid=(8, 12))
    make = class_images if kind == "class" else text_images
    images = make(24, codes=96, **({"classes": 5} if kind == "class" else {"longest": 40}))
    # An image takes 4 or 5 blocks of 32 positions.
    engine = start(model, block_size=32, num_gpu_blocks_override=24, enable_prefix_caching=False)
    drawn = engine.draw(images)
    assert engine.preemptions() >= 10
    assert drawn == [alone(model, image) for image in images]


@pytest.mark.parametrize("chunked", [True, False])
def test_long_texts_with_and_without_chunked_prefill(start, chunked):
    model = tiny_transformer(condition="text", text_length=100)
    images = text_images(12, longest=12)
    images += [
        dataclasses.replace(image, condition=text)
        for image, text in zip(images, texts(100, longest=100)[88:], strict=True)
    ]
    positions = 116
    engine = start(
        model,
        enable_chunked_prefill=chunked,
        max_num_batched_tokens=24 if chunked else positions,
        max_num_seqs=8,
    )
    assert engine.draw(images) == [alone(model, image) for image in images]


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": (2, 8)},
        {"grid": (7, 1)},
        {"dim": 200, "heads": 2, "grid": (3, 5)},  # head dimension 100
        {"dim": 144, "heads": 4, "kv_heads": 2},  # 36, with grouped queries
        {"num_classes": 200},  # more labels than codes
    ],
)
def test_shapes(start, changes):
    model = tiny_transformer(**changes)
    images = class_images(12, classes=5, codes=model.config.num_codes)
    assert start(model).draw(images) == [alone(model, image) for image in images]


@pytest.mark.parametrize("kind", ["class", "text"])
def test_an_engine_without_guidance(start, kind):
    model = tiny_transformer(condition=kind)
    images = (
        class_images(20, classes=5, guided=False)
        if kind == "class"
        else text_images(20, longest=6, guided=False)
    )
    engine = start(model, ExportOptions(guidance=False))
    assert engine.draw(images) == [alone(model, image) for image in images]
    assert engine.config.hidden_size == model.config.dim
    with pytest.raises(InputError, match="without guidance"):
        engine.draw([dataclasses.replace(images[0], sampling=SamplingConfig())])


def test_classes_that_guidance_leads_away_from(start):
    model = tiny_transformer()
    images = [
        dataclasses.replace(image, unconditional=torch.tensor(i % 6) if i % 4 else None)
        for i, image in enumerate(class_images(24, classes=5))
    ]
    engine = start(model, ExportOptions(negative_prompts=True))
    assert engine.draw(images) == [alone(model, image) for image in images]


def test_texts_that_guidance_leads_away_from(start):
    """They are longer or shorter than the prompts."""
    model = tiny_transformer(condition="text", text_length=30)
    others = texts(24, longest=7, seed=1)
    images = [
        dataclasses.replace(image, unconditional=other if i % 4 else None)
        for i, (image, other) in enumerate(zip(text_images(24, longest=30), others, strict=True))
    ]
    engine = start(model, ExportOptions(negative_prompts=True))
    assert engine.draw(images) == [alone(model, image) for image in images]


def test_negative_prompts_are_refused_where_the_engine_takes_none(start):
    engine = start(tiny_transformer())
    with pytest.raises(InputError, match="negative_prompts"):
        engine.draw([Image(condition=torch.tensor(0), unconditional=torch.tensor(1))])


def test_requests_come_and_go(start):
    """One joins at every step, and every third is given up on the way."""
    model = tiny_transformer()
    images = class_images(24, classes=5)
    core = start(model, max_num_seqs=6)
    engine = core.llm.llm_engine
    finished, waiting, steps = {}, list(enumerate(images)), 0
    while waiting or engine.has_unfinished_requests():
        if waiting:
            number, image = waiting.pop(0)
            prompt, params = core.request(image)
            engine.add_request(str(number), prompt, params)
        for output in engine.step():
            finished.setdefault(output.request_id, []).extend(core.codes(output))
        steps += 1
        if steps % 3 == 0 and steps < 60:
            engine.abort_request([str(steps // 3 * 3)])
    for number, image in enumerate(images):
        if number % 3:
            assert finished[str(number)] == alone(model, image)


def test_codes_in_a_prompt_are_continued(start):
    """A label with the first codes of an image gives the rest of it."""
    from vllm import TokensPrompt

    model = tiny_transformer()
    image = class_images(3, classes=5)[2]
    engine = start(model)
    whole = alone(model, image)
    prompt, params = engine.request(image)
    given = [code + engine.config.first_code for code in whole[:7]]
    params.max_tokens = 9
    (output,) = engine.llm.generate(
        TokensPrompt(prompt_token_ids=prompt["prompt_token_ids"] + given), params, use_tqdm=False
    )
    assert engine.codes(output) == whole[7:]


def test_half_precision(start):
    model = tiny_transformer().to(torch.bfloat16)
    images = class_images(8, classes=5)
    engine = start(model, dtype="bfloat16")
    drawn = engine.draw(images)
    assert drawn == engine.draw(images)
    # Both round after each of torch's operations, which the kernels do not; and the first code has
    # no history that rounding could have changed.
    with reference_only():
        expected = [alone(model, image) for image in images]
    assert [codes[0] for codes in drawn] == [codes[0] for codes in expected]
