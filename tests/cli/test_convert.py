import json
import os

import pytest
import torch

from llamagen.checkpoints import load_tokenizer, load_transformer
from llamagen.pipeline import Pipeline
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from tests.checkpoints.files import ARGUMENTS, same_weights, tokenizer, transformer


@pytest.fixture
def files(tmp_path):
    torch.save({"model": transformer().state_dict(), "args": ARGUMENTS}, tmp_path / "one.pt")
    torch.save({"ema": tokenizer().state_dict()}, tmp_path / "two.pt")
    return tmp_path / "one.pt", tmp_path / "two.pt"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("order", [1, -1])
def test_a_pipeline(run, files, tmp_path, order):
    result = run("convert", *files[::order], "--out", tmp_path / "model")
    assert result.status == 0, result.err
    assert "one.pt: transformer" in result.out
    assert f"{transformer().parameter_count():,} parameters in float32" in result.out
    assert "grid 4x4, 5 classes" in result.out
    assert "two.pt: image tokenizer" in result.out
    assert "64 codes, downsampling 4" in result.out
    assert names(tmp_path) == ["model", "one.pt", "two.pt"]
    pipe = Pipeline.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    assert same_weights(pipe.transformer, transformer())
    assert same_weights(pipe.tokenizer, tokenizer())
    assert pipe.name == "model"
    assert pipe.labels == Labels.numbered(5)
    assert (pipe.sampling.guidance_scale, pipe.sampling.top_k) == (4.0, 2000)
    assert len(pipe(3, seed=0).images) == 1


def test_labels_and_name(run, files, tmp_path):
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(["cat", "dog", "fox", "owl", "cow"]))
    options = ("--labels", labels, "--name", "farm", "--out", tmp_path / "model")
    assert run("convert", *files, *options).status == 0
    pipe = Pipeline.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    assert pipe.labels.find("owl") == 3
    assert pipe.name == "farm"


def test_imagenet_is_the_default_for_its_number_of_classes(run, files, tmp_path):
    torch.save(transformer(num_classes=1000).state_dict(), files[0])
    options = ("--heads", 4, "--grid", 4, 4, "--out", tmp_path / "model")
    assert run("convert", *files, *options).status == 0
    assert Labels.load(tmp_path / "model" / "labels.json") == Labels.imagenet()


def test_a_text_model(run, fails, files, tmp_path):
    torch.save(transformer(condition="text").state_dict(), files[0])
    options = ("--heads", 4, "--grid", 4, 4, "--out", tmp_path / "model")
    (tmp_path / "labels.json").write_text('["a"]')
    message = fails("convert", *files, *options, "--labels", tmp_path / "labels.json")
    assert "conditioned on text; leave --labels out" in message
    assert run("convert", *files, *options).status == 0
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["sampling"]["guidance_scale"] == 7.5
    assert not (tmp_path / "model" / "labels.json").exists()


def test_one_model(run, files, tmp_path):
    assert run("convert", files[0], "--out", tmp_path / "t", "--dtype", "bfloat16").status == 0
    assert same_weights(load_transformer(tmp_path / "t"), transformer().bfloat16())
    assert run("convert", files[1], "-o", tmp_path / "deep" / "v").status == 0
    assert same_weights(load_tokenizer(tmp_path / "deep" / "v"), tokenizer())
    # Folders are sources as well, also of what they hold themselves.
    options = ("--out", tmp_path / "t", "--overwrite", "--dtype", "float16")
    assert run("convert", tmp_path / "t", *options).status == 0
    assert load_transformer(tmp_path / "t").dtype == torch.float16
    assert names(tmp_path) == ["deep", "one.pt", "t", "two.pt"]


def test_converts_pipeline_to_another_precision(run, fails, tmp_path):
    made = run("convert", "emoji", "--quantization", "int8", "--out", tmp_path / "small")
    assert made.status == 0, made.err
    ours, theirs = (
        Pipeline.from_pretrained(source, device="cpu", dtype="float32")
        for source in (tmp_path / "small", "emoji")
    )
    assert ours.precision == {"dtype": "float32", "quantization": "int8"}
    assert (ours.name, ours.sampling) == (theirs.name, theirs.sampling)
    assert same_weights(ours.tokenizer, theirs.tokenizer)
    drawn = ours("red heart", seed=0)
    theirs.quantize("int8")
    assert torch.equal(drawn.codes, theirs("red heart", seed=0).codes)
    options = ("--dtype", "float32", "--name", "large", "--out", tmp_path / "large")
    assert run("convert", tmp_path / "small", *options).status == 0
    again = Pipeline.from_pretrained(tmp_path / "large", device="cpu", dtype="float32")
    assert (again.name, again.precision) == ("large", ours.precision)
    error = fails("convert", "emoji", "--grid", 4, 4, "--out", tmp_path / "other")
    assert "emoji is a pipeline" in error
    assert not (tmp_path / "other").exists()


def test_rejects_existing_folders(run, fails, files, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    assert run("convert", files[1], "--out", out).status == 0
    assert "give --overwrite to replace it" in fails("convert", *files, "--out", out)
    assert load_tokenizer(out) is not None
    assert run("convert", *files, "--out", out, "--overwrite").status == 0
    assert "model_index.json" in names(out)
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("years of work")
    for target in (thesis, thesis / "chapter1.tex"):
        message = fails("convert", *files, "--out", target, "--overwrite")
        assert "is no model folder; choose another --out" in message
    assert (thesis / "chapter1.tex").read_text() == "years of work"
    message = fails("convert", *files, "--out", thesis / "chapter1.tex" / "model")
    assert "cannot write to" in message


def test_a_failure_leaves_nothing_behind(fails, files, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28), "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr("llamagen.models.pretrained.save_file", full)
        message = fails("convert", *files, "--out", tmp_path / "model", status=1)
    assert "the disk is full" in message
    content = files[0].read_bytes()
    files[0].write_bytes(content[: len(content) // 2])
    message = fails("convert", *files, "--out", tmp_path / "model")
    assert "one.pt is truncated" in message
    assert names(tmp_path) == ["one.pt", "two.pt"]


def test_sources_that_do_not_fit(fails, files, tmp_path):
    out = ("--out", tmp_path / "model")
    one, two = files
    assert "0 sources were given" in fails("convert", *out)
    assert "3 sources were given" in fails("convert", one, two, one, *out)
    assert "two models of one kind (transformer)" in fails("convert", one, one, *out)
    assert "did you mean c2i-B-256" in fails("convert", "c2i-b-265", *out)
    assert "trained with grid 4x4, not 8x8" in fails("convert", one, "--grid", 8, 8, *out)
    assert "none was given" in fails("convert", two, "--grid", 8, 8, *out)
    assert "belong to a pipeline" in fails("convert", one, "--name", "x", *out)
    labels = tmp_path / "labels.json"
    labels.write_text('["a", "b"]')
    assert "2 class names" in fails("convert", one, two, "--labels", labels, *out)
    torch.save(tokenizer(codebook_size=32).state_dict(), two)
    assert "32 codes but the transformer predicts 64" in fails("convert", one, two, *out)
    torch.save(transformer().state_dict(), one)
    assert "give it with --heads" in fails("convert", one, two, *out)
    assert not (tmp_path / "model").exists()


def test_quantized(run, fails, files, tmp_path):
    torch.save({"model": transformer(dim=64).state_dict(), "args": ARGUMENTS}, files[0])
    out = tmp_path / "model"
    result = run("convert", *files, "--quantization", "int8", "--out", out)
    assert result.status == 0, result.err
    assert "matrices in int8" in result.out
    count = transformer(dim=64).parameter_count()
    assert f"{count:,} parameters" in result.out
    pipe = Pipeline.from_pretrained(out, device="cpu", dtype="bfloat16")
    assert pipe.transformer.config.quantization == "int8"
    assert pipe.transformer.parameter_count() == count
    assert len(pipe(3, seed=0).images) == 1
    assert pipe.precision == {"dtype": "bfloat16", "quantization": "int8"}
    error = fails("convert", files[1], "--quantization", "int8", "--out", tmp_path / "x")
    assert "--quantization is for a transformer, but none was given" in error
    with pytest.raises(InputError, match="cannot take an adapter"):
        pipe.load_adapter(tmp_path)


def test_quantized_models_are_not_trained_or_exported(run, fails, files, tmp_path):
    run("convert", *files, "--quantization", "int8", "--out", tmp_path / "model")
    error = fails("export-vllm", tmp_path / "model", "--out", tmp_path / "v")
    assert "a transformer in int8 cannot be exported for vLLM; use the one that it was" in error
    assert not (tmp_path / "v").exists()
