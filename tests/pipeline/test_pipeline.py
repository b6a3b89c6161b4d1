import json

import numpy as np
import pytest
import torch

from llamagen.backends import reference_only
from llamagen.backends.cpu.library import load_kernels
from llamagen.config import SamplingConfig
from llamagen.generation.batch import Batch
from llamagen.pipeline import Pipeline
from llamagen.pipeline import pipeline as pipeline_module
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from tests.tiny_models import (
    tiny_pipeline,
    tiny_text_pipeline,
    tiny_tokenizer,
    tiny_transformer,
)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_images_of_several_classes(pipe):
    output = pipe(["dog", "red fox", 0], num_images_per_prompt=2, seed=10)
    assert len(output.images) == 6
    assert all(image.size == (16, 16) for image in output.images)
    assert output.codes.shape == (6, 4, 4)
    assert output.seeds == (10, 11, 12, 13, 14, 15)
    assert [entry["class"] for entry in output.metadata] == [
        *("dog", "dog", "red fox", "red fox", "cat", "cat")
    ]


def test_an_image_can_be_made_again_from_its_metadata(pipe):
    output = pipe(["dog", "cat"], num_images_per_prompt=3, seed=5, top_k=9, guidance_scale=2.5)
    entry = output.metadata[4]
    again = pipe(
        entry["class_index"],
        seed=entry["seed"],
        **{key: entry[key] for key in ("guidance_scale", "top_k", "top_p", "temperature")},
    )
    assert same(again.images[0], output.images[4])


def test_batches_make_no_difference(pipe):
    whole = pipe(["dog", "cat", "crane"], num_images_per_prompt=3, seed=1)
    split = pipe(["dog", "cat", "crane"], num_images_per_prompt=3, seed=1, batch_size=2)
    assert torch.equal(whole.codes, split.codes)
    assert all(map(same, whole.images, split.images))


@pytest.mark.parametrize("window", [1, 4])
def test_window_changes_no_code(pipe, window, monkeypatch):
    wanted = pipe(["dog", "cat"], num_images_per_prompt=2, seed=1)
    steps = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: steps.append(1) or step(batch))
    found = pipe(["dog", "cat"], num_images_per_prompt=2, seed=1, window=window)
    assert torch.equal(found.codes, wanted.codes)
    assert len(steps) == 15 if window == 1 else 0 < len(steps) < 15


def test_rejects_window_on_vllm_before_it_starts(pipe):
    by_vllm = Pipeline(pipe.tokenizer, pipe.transformer, labels=pipe.labels, engine="vllm")
    with pytest.raises(InputError, match="window goes with engine 'native'"):
        by_vllm("dog", window=2)


def test_rejects_unknown_settings(pipe):
    with pytest.raises(InputError, match="no setting 'top_q'; choose from guidance_scale"):
        pipe("dog", top_q=2)


def test_progress_of_every_batch(pipe):
    seen = []
    output = pipe("dog", num_images_per_prompt=3, seed=0, batch_size=2, callback=seen.append)
    assert [(p.first, p.row, p.rows) for p in seen] == [
        *((0, 1, 4), (0, 2, 4), (0, 3, 4), (0, 4, 4)),
        *((2, 1, 4), (2, 2, 4), (2, 3, 4), (2, 4, 4)),
    ]
    assert torch.equal(seen[-1].codes, output.codes[2:])


def test_a_callback_can_stop_a_call(pipe):
    class StopError(Exception):
        pass

    def stop(progress):
        raise StopError

    with pytest.raises(StopError):
        pipe("dog", callback=stop)


def test_models_in_training_mode_draw_without_dropout():
    dropout = dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout"), 0.5)
    pipe = Pipeline(tiny_tokenizer(dropout=0.5), tiny_transformer(**dropout))
    ranked = {"seed": 0, "best_of": 3, "num_images_per_prompt": 2}
    wanted, best = pipe(1, seed=0), pipe(1, **ranked)
    codes = pipe.tokenizer.encode(torch.zeros(1, 3, 16, 16))
    models = (pipe.transformer, pipe.tokenizer)
    for model in models:
        model.train()
    for _ in range(2):
        again = pipe(1, seed=0)
        assert torch.equal(again.codes, wanted.codes)
        assert same(again.images[0], wanted.images[0])
        assert again.metadata == wanted.metadata
        assert torch.equal(pipe(1, **ranked).codes, best.codes)
        assert torch.equal(pipe.tokenizer.encode(torch.zeros(1, 3, 16, 16)), codes)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(1, seed=0, callback=stop)
    assert all(part.training for model in models for part in model.modules())


def test_metadata_say_what_changes_codes():
    pipe = tiny_pipeline()
    (entry,) = pipe("dog", seed=0).metadata
    assert entry["engine"] == "native"
    assert entry["kernels"].split()[0] == "cpu" or load_kernels() is None
    assert "text_encoder_dtype" not in entry
    with reference_only():
        assert pipe("dog", seed=0).metadata[0] == {**entry, "kernels": "none"}
    text = tiny_text_pipeline()
    assert text("a dog", seed=0).metadata[0]["text_encoder_dtype"] == "float32"
    text.text_encoder.to(torch.bfloat16)
    assert text("a dog", seed=0).metadata[0]["text_encoder_dtype"] == "bfloat16"


def test_fingerprints_tell_all_models():
    pipe = tiny_text_pipeline()
    first = pipe.fingerprints()
    assert set(first) == {"transformer", "tokenizer", "text_encoder"}
    assert set(tiny_pipeline().fingerprints()) == {"transformer", "tokenizer"}
    others = tiny_text_pipeline(seed=1).fingerprints()
    assert {name for name in first if first[name] != others[name]} == {"text_encoder"}


def test_seeds_are_random_unless_given(pipe):
    first, second = pipe("dog"), pipe("dog")
    assert first.seeds != second.seeds
    assert pipe("dog", num_images_per_prompt=2, seed=[7, 3]).seeds == (7, 3)


def test_models_bring_their_own_settings(tmp_path):
    pipe = tiny_pipeline()
    pipe = Pipeline(
        pipe.tokenizer,
        pipe.transformer,
        labels=pipe.labels,
        name="tiny",
        sampling=SamplingConfig(guidance_scale=1.5, top_k=7),
    )
    entry = pipe("dog", seed=0).metadata[0]
    assert (entry["guidance_scale"], entry["top_k"]) == (1.5, 7)
    assert pipe("dog", seed=0, top_k=0).metadata[0]["top_k"] == 0


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_save_and_load(tmp_path, pipe, dtype):
    pipe.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model", device="cpu", dtype=dtype or "float32")
    assert loaded.labels == pipe.labels
    assert loaded.name == "tiny"
    assert loaded.sampling == pipe.sampling
    if dtype is None:
        assert torch.equal(loaded("dog", seed=3).codes, pipe("dog", seed=3).codes)
    else:
        assert loaded.dtype == torch.bfloat16
        assert loaded.tokenizer.dtype == torch.bfloat16
        assert len(loaded("dog", seed=3).images) == 1
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        *("labels.json", "model_index.json", "tokenizer", "transformer")
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_replaces_pipelines_only(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "model")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(InputError, match="no pipeline folder"):
        pipe.save_pretrained(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_parts_that_do_not_fit():
    with pytest.raises(InputError, match="32 codes but the transformer predicts 64"):
        Pipeline(tiny_tokenizer(codebook_size=32), tiny_transformer())
    with pytest.raises(InputError, match="2 class names"):
        Pipeline(tiny_tokenizer(), tiny_transformer(), labels=Labels(("a", "b")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "dgo"}, "did you mean 'dog'"),
        ({"prompt": 5}, "no class 5"),
        ({"prompt": []}, "no class was given"),
        ({"prompt": None}, "class names or indices"),
        ({"prompt": "dog", "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"prompt": "dog", "batch_size": 0}, "batch_size"),
        ({"prompt": "dog", "top_k": -3}, "top_k"),
        ({"prompt": "dog", "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": "dog", "seed": -1}, "seed"),
        ({"prompt": "dog", "seed": [1, 2]}, "2 seeds for 1"),
    ],
)
def test_bad_input(pipe, arguments, message):
    with pytest.raises(InputError, match=message):
        pipe(**arguments)


def test_text_features():
    pipe = Pipeline(tiny_tokenizer(), tiny_transformer(condition="text"), name="t")
    features = torch.randn(2, 6, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    output = pipe(
        prompt_embeds=features, prompt_attention_mask=mask, num_images_per_prompt=2, seed=0
    )
    assert len(output.images) == 4
    alone = pipe(prompt_embeds=features[1:, 3:], seed=3)
    assert torch.equal(alone.codes[0], output.codes[3])
    with pytest.raises(InputError, match="prompt_embeds"):
        pipe("a photo")


def test_a_batch_that_overflows_the_gpu_is_halved(pipe, monkeypatch):
    sizes = []
    add = Batch.add

    def limited(batch, requests):
        sizes.append(len(requests))
        if len(requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return add(batch, requests)

    monkeypatch.setattr(Batch, "add", limited)
    output = pipe("dog", num_images_per_prompt=5, seed=0)
    monkeypatch.undo()
    assert sizes == [5, 2, 2, 1]
    assert torch.equal(output.codes, pipe("dog", num_images_per_prompt=5, seed=0).codes)


def test_pixels_are_fetched_after_the_next_codes_are_launched(pipe, monkeypatch):
    log = []
    add, copy = Batch.add, pipeline_module.copy_to_host

    def added(batch, requests):
        log.append("codes")
        return add(batch, requests)

    def copied(pixels):
        wait = copy(pixels)
        log.append("pixels")
        return lambda: (log.append("fetched"), wait())[1]

    whole = pipe("dog", num_images_per_prompt=5, seed=0)
    monkeypatch.setattr(Batch, "add", added)
    monkeypatch.setattr(pipeline_module, "copy_to_host", copied)
    output = pipe("dog", num_images_per_prompt=5, seed=0, batch_size=2)
    assert log == [
        *("codes", "pixels", "codes", "pixels", "fetched"),
        *("codes", "pixels", "fetched", "fetched"),
    ]
    assert all(map(same, whole.images, output.images))


def test_quantising_weights_and_cache():
    pipe = tiny_pipeline()
    assert pipe.quantize(kv_cache_dtype="int8") is pipe
    assert pipe.precision == {"dtype": "float32", "kv_cache_dtype": "int8"}
    assert pipe("dog", seed=3).metadata[0]["kv_cache_dtype"] == "int8"
    pipe.quantize("int8")  # the cache stays as it is
    assert pipe.precision["quantization"] == pipe.precision["kv_cache_dtype"] == "int8"
    pipe.quantize(kv_cache_dtype="auto")
    assert pipe.precision == {"dtype": "float32", "quantization": "int8"}
    by_vllm = Pipeline(pipe.tokenizer, pipe.transformer, labels=pipe.labels, engine="vllm")
    with pytest.raises(InputError, match="goes with engine 'native'"):
        by_vllm.quantize(kv_cache_dtype="int8")


def test_moving(pipe):
    moved = tiny_pipeline().to("cpu", "float16")
    assert moved.dtype == torch.float16
    with pytest.raises(InputError, match="no precision"):
        moved.to(dtype="int3")


@pytest.mark.gpu
def test_on_the_gpu():
    pipe = tiny_pipeline()
    settings = {"num_images_per_prompt": 3, "seed": 4, "temperature": 0.0, "batch_size": 1}
    expected = pipe("dog", **settings)
    found = pipe.to("cuda")("dog", **settings)
    assert torch.equal(found.codes, expected.codes)
    assert all(map(same, found.images, pipe.decode(found.codes)))


def test_codes_alone():
    pipe = tiny_pipeline()
    whole, codes = pipe([0, 3], seed=4), pipe([0, 3], seed=4, output_type="codes")
    assert codes.images == []
    assert torch.equal(codes.codes, whole.codes)
    assert [im.tobytes() for im in pipe.decode(codes.codes)] == [
        im.tobytes() for im in whole.images
    ]
    (pixels,) = pipe.decode_in_parts(codes.codes)
    assert pixels.shape[:2] == (2, 3)


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (np.int64(1), {"seed": np.int64(3)}),
        (np.array([1]), {"seed": np.array([3])}),
        (torch.tensor(1), {"seed": torch.tensor(3)}),
        ([np.str_("dog")], {"seed": [np.uint8(3)]}),
        (1, {"seed": 3, "best_of": np.int64(1), "batch_size": torch.tensor(1)}),
        (1, {"seed": 3, "num_images_per_prompt": np.int64(1), "window": np.int32(1)}),
        (1, {"seed": 3, "top_k": np.int32(0), "temperature": np.float32(1)}),
        (1, {"seed": 3, "top_p": torch.tensor(1.0), "guidance_stop": torch.tensor(100)}),
    ],
)
def test_numbers_of_numpy_and_torch(pipe, prompt, settings):
    output = pipe(prompt, **settings)
    assert torch.equal(output.codes, pipe("dog", seed=3).codes)
    entry = output.metadata[0]
    assert (entry["class_index"], entry["seed"]) == (1, 3)
    assert json.loads(json.dumps(entry)) == entry


def test_metadata_stay_json(pipe):
    settings = {"blend": np.int64(2), "blend_share": np.float32(0.25), "best_of": np.int8(2)}
    entry = pipe(np.array(["dog"]), seed=3, **settings).metadata[0]
    assert json.loads(json.dumps(entry)) == entry
    assert (entry["blend"], entry["blend_share"], entry["best_of"]) == ("red fox", 0.25, 2)


@pytest.mark.parametrize("prompt", [1.0, b"dog", [["dog"]], [None], True, np.float32(1)])
def test_what_is_no_prompt(pipe, prompt):
    with pytest.raises(InputError, match="expected a text, or the name or index of a class"):
        pipe(prompt)


def test_forms_of_images(pipe):
    wanted = pipe(["dog", "cat"], seed=3)
    pixels = np.stack([np.asarray(image) for image in wanted.images])

    def images(output_type):
        return pipe(["dog", "cat"], seed=3, batch_size=1, output_type=output_type).images

    arrays = images("np")
    assert (arrays.shape, arrays.dtype) == ((2, 16, 16, 3), np.float32)
    assert np.array_equal(arrays, pixels.astype(np.float32) / 255)
    tensor = images("pt")
    assert torch.equal(tensor, torch.from_numpy(arrays).permute(0, 3, 1, 2))
    assert torch.equal(images("latent"), wanted.codes)
    assert images("codes") == []


@pytest.mark.parametrize("output_type", ["PIL", "numpy", "", None])
def test_rejects_other_forms_of_images(pipe, output_type):
    with pytest.raises(InputError, match="expected one of pil, np, pt, latent, codes"):
        pipe("dog", output_type=output_type)


@pytest.mark.parametrize("best_of", [1, 2])
def test_images_are_handed_over_as_they_are_drawn(pipe, best_of):
    settings = {"num_images_per_prompt": 5, "seed": 7, "best_of": best_of}
    whole, parts = pipe("dog", **settings), []
    rest = pipe("dog", **settings, batch_size=2 * best_of, on_images=parts.append)
    assert [len(part.images) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert [entry for part in parts for entry in part.metadata] == [*whole.metadata]
    assert all(map(same, [image for part in parts for image in part.images], whole.images))
    assert (rest.images, rest.seeds, len(rest.codes)) == ([], (), 0)


def test_images_handed_over_before_an_error_stay(pipe, monkeypatch):
    parts, steps, step = [], [], Batch.step

    def interrupted(batch):
        steps.append(1)
        if len(steps) > 20:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(Batch, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe("dog", num_images_per_prompt=9, seed=7, batch_size=1, window=1, on_images=parts.append)
    assert [part.seeds for part in parts] == [(7,)]


def test_images_that_are_there_are_not_drawn(pipe):
    whole = pipe("dog", num_images_per_prompt=4, seed=7, best_of=2)
    there = [whole.metadata[0], whole.metadata[2]]
    rest = pipe(
        "dog", num_images_per_prompt=4, seed=7, best_of=2, is_drawn=lambda entry: entry in there
    )
    assert rest.seeds == (whole.seeds[1], whole.seeds[3])
    assert torch.equal(rest.codes, whole.codes[[1, 3]])
    assert pipe("dog", seed=7, is_drawn=lambda entry: True).images == []


def test_fingerprints_tell_weights_apart(pipe):
    assert pipe.weight_sample() == tiny_pipeline().weight_sample()
    changed = tiny_pipeline()
    with torch.no_grad():
        next(changed.transformer.parameters()).mul_(1.01)
    others = [changed, Pipeline(tiny_tokenizer(seed=1), pipe.transformer, labels=pipe.labels)]
    others += [tiny_pipeline().quantize("int8"), tiny_text_pipeline(), tiny_text_pipeline(seed=1)]
    found = {pipe.weight_sample(), *(each.weight_sample() for each in others)}
    assert len(found) == 6
