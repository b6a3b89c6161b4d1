"""``llamagen export``, and ``generate --adapter``."""

import pytest

from llamagen.config import TransformerConfig
from llamagen.pipeline import Pipeline
from llamagen.training import train_transformer
from llamagen.training.config import LoraConfig
from tests.images import write_digits
from tests.tiny_models import tiny_tokenizer
from tests.training.runs import transformer_recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a transformer, and one that adapts its result."""
    folder = tmp_path_factory.mktemp("runs")
    digits = write_digits(folder / "digits")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    base = train_transformer(
        # Fast: the output layer begins as zeros, and then nothing before it matters.
        transformer_recipe(
            digits, folder / "tokenizer", folder / "base", ema_decay=0.5, lr=0.1, steps=8
        ),
        quiet=True,
    )
    train_transformer(
        transformer_recipe(
            digits, folder / "tokenizer", folder / "adapted", init=str(base.model),
            lora=LoraConfig(lora_rank=2), lr=0.5, model=TransformerConfig(), export=False,
        ),
        quiet=True,
    )  # fmt: skip
    return folder


def test_any_checkpoint_becomes_a_model(run, runs, tmp_path):
    out = tmp_path / "model"
    result = run("export", runs / "base", "--out", out, "--step", 6, "--weights", "trained")
    assert (result.status, result.out.strip()) == (0, str(out))
    assert Pipeline.from_pretrained(out).labels.names == ("0", "1", "2")
    picture = tmp_path / "one.png"
    generated = run("generate", "--model", out, "--class", "1", "--seed", 0, "--out", picture)
    assert generated.status == 0, generated


def test_rejects_other_folders_than_runs(fails, runs, tmp_path):
    assert "is no run" in fails("export", tmp_path, "--out", tmp_path / "out")
    line = fails("export", runs / "base", "--out", tmp_path / "out", "--step", 3)
    assert "there is no checkpoint of step 3" in line


def test_adapters_change_samples(run, runs, tmp_path):
    model, adapter = runs / "base" / "pipeline", runs / "adapted" / "adapter"
    pictures = []
    for name, more in (("plain", []), ("adapted", ["--adapter", adapter])):
        out = tmp_path / f"{name}.png"
        result = run(
            *("generate", "--model", model, "--class", "2", "--num-images", 2, "--seed", 3),
            *("--out", out, *more),
        )
        assert result.status == 0, result
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]
