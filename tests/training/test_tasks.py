"""What is particular to each of the two trainings."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen.config import SamplingConfig, TransformerConfig
from llamagen.data.extraction import extract_store
from llamagen.data.images import ImageFolder
from llamagen.data.live_codes import MemoryCodes
from llamagen.data.views import Views
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.pipeline import Pipeline
from llamagen.support.errors import InputError
from llamagen.training import train_tokenizer, train_transformer, transformer_task
from llamagen.training.checkpoint import latest_checkpoint
from llamagen.training.config import (
    AugmentationConfig,
    ImageConfig,
    TokenizerLossConfig,
)
from llamagen.training.data import CodeSplits
from llamagen.training.loop import fit
from llamagen.training.losses import tokenizer_terms
from llamagen.training.tokenizer_task import init_codebook
from llamagen.training.transformer_start import find_start
from llamagen.training.transformer_task import TransformerTask
from tests.images import write_digits
from tests.tiny_models import tiny_tokenizer
from tests.training.runs import (
    assert_same_state,
    records,
    state,
    tokenizer_recipe,
    transformer_recipe,
)


class TestTokenizer:
    def test_learns(self, digits, tmp_path):
        recipe = tokenizer_recipe(
            digits,
            tmp_path / "out",
            codebook_init="data",
            augmentation=AugmentationConfig(crop_scale=1.0, flip=False),
            dropout=0.0,
            steps=40,
            lr=5e-3,
            log_every=10,
            validate_every=0,
            save_every=0,
        )
        result = train_tokenizer(recipe, quiet=True)
        train = [r for r in records(recipe.out) if r["split"] == "train"]
        assert train[-1]["reconstruction"] < 0.5 * train[0]["reconstruction"]
        assert train[-1]["psnr"] > train[0]["psnr"] + 2
        assert 0 < result.validation["codebook_usage"] <= 1
        assert result.validation["psnr"] > 8

    def test_folder_of_the_run(self, digits, tmp_path, curves):
        out = tmp_path / "out"
        result = train_tokenizer(tokenizer_recipe(digits, out), quiet=True)
        assert {path.name for path in out.iterdir()} == {
            *("recipe.yaml", "metrics.jsonl", "curves.png"),
            *("checkpoints", "samples", "tokenizer"),
        }
        assert result.model == out / "tokenizer"
        tokenizer = ImageTokenizer.from_pretrained(result.model)
        assert tokenizer.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 4)
        with Image.open(out / "samples" / "step-0000004.png") as sheet:
            assert sheet.width > 4 * 64

    def test_exports_ema(self, digits, tmp_path):
        results = [
            train_tokenizer(
                tokenizer_recipe(digits, tmp_path / str(decay), ema_decay=decay), quiet=True
            )
            for decay in (0.0, 0.9)
        ]
        plain, mean = (ImageTokenizer.from_pretrained(r.model).state_dict() for r in results)
        assert not torch.equal(plain["encoder.conv_in.weight"], mean["encoder.conv_in.weight"])
        # The mean follows the same training.
        assert results[0].train["loss"] == results[1].train["loss"]

    def test_oblong_images(self, digits, tmp_path):
        recipe = tokenizer_recipe(
            digits, tmp_path / "out", images=ImageConfig(size=8, width=16), steps=1
        )
        assert train_tokenizer(recipe, quiet=True).steps == 1

    def test_without_validation_images(self, digits, tmp_path):
        recipe = tokenizer_recipe(
            digits, tmp_path / "out", images=ImageConfig(size=16, validation_fraction=0.0), steps=1
        )
        result = train_tokenizer(recipe, quiet=True)
        assert result.validation == {}
        assert (recipe.out / "samples" / "step-0000001.png").exists()

    def test_corrupt_images_are_counted_and_named(self, tmp_path):
        data = write_digits(tmp_path / "data")
        for name in ("0/001.png", "2/003.png"):
            (data / name).write_bytes((data / name).read_bytes()[:40])
        result = train_tokenizer(tokenizer_recipe(data, tmp_path / "out", steps=8), quiet=True)
        assert result.skipped == 2
        listed = (tmp_path / "out" / "skipped.txt").read_text()
        assert "001.png" in listed
        assert "003.png" in listed

    def test_a_loss_that_is_not_finite(self, digits, tmp_path):
        recipe = tokenizer_recipe(
            digits, tmp_path / "out", lr=1e30, clip_norm=0.0, max_skipped_steps=0
        )
        with pytest.raises(InputError, match="were infinite or not a number"):
            train_tokenizer(recipe, quiet=True)
        assert not (tmp_path / "out" / "tokenizer").exists()

    def test_size_that_does_not_fit(self, digits, tmp_path):
        with pytest.raises(InputError, match="multiples of the tokenizer's downsampling 4"):
            tokenizer_recipe(digits, tmp_path / "out", images=ImageConfig(size=18))


class TestTokenizerTerms:
    @pytest.mark.parametrize("entropy_weight", [0.0, 0.1])
    @pytest.mark.parametrize("reconstruction", ["l1", "l2"])
    def test_weights(self, reconstruction, entropy_weight):
        tokenizer = tiny_tokenizer()
        images = torch.rand(2, 3, 16, 16) * 2 - 1
        output = tokenizer(images)
        config = TokenizerLossConfig(
            reconstruction=reconstruction, codebook_weight=0.5, entropy_weight=entropy_weight
        )
        terms = tokenizer_terms(output, images, tokenizer.quantize, config)
        error = output.reconstruction - images
        expected = error.abs().mean() if reconstruction == "l1" else error.square().mean()
        assert terms["reconstruction"].value.item() == pytest.approx(expected.item())
        weights = {name: term.weight for name, term in terms.items()}
        entropy = {"entropy": 0.05} if entropy_weight else {}
        assert weights == {
            "reconstruction": 1.0, "codebook": 0.5, "commitment": 0.125, **entropy
        }  # fmt: skip


def test_codebook_from_data():
    tokenizer = tiny_tokenizer(codebook_size=16)
    latents = torch.randn(40, 4)
    init_codebook(tokenizer, latents)
    rows = {tuple(row) for row in tokenizer.quantize.embedding.weight.tolist()}
    assert len(rows) == 16
    assert rows <= {tuple(row) for row in latents.tolist()}


class TestTransformer:
    def test_folder_of_the_run(self, digits, tokenizer_folder, tmp_path, curves):
        out = tmp_path / "out"
        sampling = SamplingConfig(guidance_scale=2.0, top_k=5)
        result = train_transformer(
            transformer_recipe(digits, tokenizer_folder, out, sampling=sampling), quiet=True
        )
        assert {path.name for path in out.iterdir()} == {
            *("recipe.yaml", "metrics.jsonl", "curves.png"),
            *("checkpoints", "samples", "codes", "pipeline"),
        }
        assert result.validation["bits_per_code"] == pytest.approx(
            result.validation["loss"] / math.log(2)
        )
        pipe = Pipeline.from_pretrained(result.model, device="cpu", dtype="float32")
        assert pipe.labels.names == ("0", "1", "2")
        assert pipe.sampling == sampling
        assert pipe("2", seed=0).images[0].size == (16, 16)
        assert (out / "samples" / "step-0000004.png").exists()

    def test_more_classes_than_the_data_has(self, digits, tokenizer_folder, tmp_path):
        recipe = transformer_recipe(
            digits, tokenizer_folder, tmp_path / "out", steps=1, num_classes=5
        )
        model = train_transformer(recipe, quiet=True).model
        labels = Pipeline.from_pretrained(model, device="cpu", dtype="float32").labels
        assert labels.names == ("0", "1", "2", "class 3", "class 4")

    def test_fewer_classes_than_the_data_has(self, digits, tokenizer_folder, tmp_path):
        recipe = transformer_recipe(digits, tokenizer_folder, tmp_path / "out", num_classes=2)
        with pytest.raises(InputError, match=r"num_classes is 2, but .* has 3 classes; raise it"):
            train_transformer(recipe, quiet=True)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"images": ImageConfig(size=18)}, "multiples of the tokenizer's downsampling 4"),
            ({"tokenizer": None}, "no image tokenizer was named; give `tokenizer`"),
            ({"data": None}, "no images were named; give `data`"),
        ],
    )
    def test_bad_recipes(self, digits, tokenizer_folder, tmp_path, changes, message):
        recipe = transformer_recipe(digits, tokenizer_folder, tmp_path / "out")
        with pytest.raises(InputError, match=message):
            train_transformer(dataclasses.replace(recipe, **changes), quiet=True)
        assert not (tmp_path / "out").exists()

    def test_images_without_classes(self, digits, tokenizer_folder, tmp_path):
        recipe = transformer_recipe(digits / "0", tokenizer_folder, tmp_path / "out")
        with pytest.raises(InputError, match="have no classes; put the images of each class"):
            train_transformer(recipe, quiet=True)

    def test_overfits(self, tmp_path):
        """Four sequences are learnt by heart: the codes are the only thing to go by."""
        rng = np.random.default_rng(0)
        store = MemoryCodes(rng.integers(0, 64, (4, 1, 4, 4)), np.arange(4), tuple("abcd"))
        recipe = transformer_recipe(
            None, "", tmp_path, condition_dropout=0.0, sample_images=1, model=TransformerConfig(
                dim=32, layers=2, heads=2, hidden_dim=64,
                token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0,
            ),
            steps=120, lr=1e-2, log_every=60, validate_every=0, save_every=0,
        )  # fmt: skip
        task = make_transformer_task(recipe, store)
        result = fit(task, recipe.loop, tmp_path, quiet=True)
        assert result.validation["bits_per_code"] < 0.1

    def test_batches_sample_labels_and_views(self, tmp_path):
        numbers = np.arange(5 * 3).reshape(5, 3, 1, 1)
        store = MemoryCodes(numbers, np.arange(5) * 10, ())
        recipe = transformer_recipe(None, "", tmp_path, batch_size=5)
        task = make_transformer_task(recipe, store)
        seen = set()
        for batch in task.batches(0, 20):
            rows = zip(batch["codes"].tolist(), batch["condition"].tolist(), strict=True)
            for (code,), label in rows:
                assert code // 3 == label // 10
                seen.add(code)
        assert seen == set(range(15))
        later = list(task.batches(7, 9))
        again = list(task.batches(0, 9))[7:]
        assert all(torch.equal(a["codes"], b["codes"]) for a, b in zip(later, again, strict=True))

    def test_condition_dropout_reaches_the_model(self, tmp_path):
        recipe = transformer_recipe(None, "", tmp_path, condition_dropout=0.5, batch_size=400)
        store = MemoryCodes(np.zeros((1, 1, 4, 4)), np.zeros(1, np.int64), ("a",))
        task = make_transformer_task(recipe, store)
        batch = next(task.batches(0, 1))
        assert 150 < int(batch["drop"].sum()) < 250
        dropped = []

        def model(codes, labels, targets, *, drop_condition, **_):
            dropped.append(drop_condition)
            assert targets.shape == (400, 16)
            return torch.tensor(math.log(2.0))

        losses = task.losses(model, batch, step=0, adversary=None)
        assert losses.metrics["bits_per_code"].item() == pytest.approx(1.0)
        assert torch.equal(dropped[0], batch["drop"])

    def test_a_store_of_codes(self, digits, tokenizer_folder, tmp_path):
        tokenizer = ImageTokenizer.from_pretrained(tokenizer_folder)
        views = Views(height=16, width=16, kind="flip")
        extract_store(tokenizer, ImageFolder.scan(digits), views, tmp_path / "store")
        recipe = transformer_recipe(
            None, tokenizer_folder, tmp_path / "out", codes=tmp_path / "store", steps=2
        )
        result = train_transformer(recipe, quiet=True)
        assert result.validation["bits_per_code"] > 0
        assert not (tmp_path / "out" / "codes").exists()
        task = transformer_task.make_task(recipe)
        codes = task._codes
        assert len(codes.train_rows) + len(codes.val_rows) == 24
        assert not set(codes.train_rows) & set(codes.val_rows)

    def test_a_store_of_another_tokenizer(self, digits, tokenizer_folder, tmp_path):
        views = Views(height=16, width=16)
        extract_store(tiny_tokenizer(seed=1), ImageFolder.scan(digits), views, tmp_path / "store")
        recipe = transformer_recipe(
            None, tokenizer_folder, tmp_path / "out", codes=tmp_path / "store"
        )
        with pytest.raises(InputError, match="tokenizer"):
            train_transformer(recipe, quiet=True)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("file", "changes", "message"),
        [
            ("shard-00001.npy", None, "shard-00001.npy"),
            ("manifest.json", {"version": 1}, "version 1"),
            ("shard-00000.json", {"labels": [0, 1, 7, 0, 0, 0, 0, 0, 0, 0]}, "7"),
        ],
        ids=["missing shard", "another version", "label outside the range"],
    )
    def test_rejects_incomplete_store(
        self, digits, tokenizer_folder, tmp_path, file, changes, message
    ):
        tokenizer = ImageTokenizer.from_pretrained(tokenizer_folder)
        store, views = tmp_path / "store", Views(height=16, width=16)
        extract_store(tokenizer, ImageFolder.scan(digits), views, store, shard_size=10)
        if changes is None:
            (store / file).unlink()
        else:
            values = json.loads((store / file).read_text())
            (store / file).write_text(json.dumps(values | changes))
        recipe = transformer_recipe(None, tokenizer_folder, tmp_path / "out", codes=store)
        with pytest.raises((InputError, FileNotFoundError), match=message) as caught:
            train_transformer(recipe, quiet=True)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_recomputed_blocks_change_nothing(self, digits, tokenizer_folder, tmp_path):
        for kind in ("none", "blocks"):
            recipe = transformer_recipe(
                digits, tokenizer_folder, tmp_path / kind, activation_checkpointing=kind
            )
            train_transformer(recipe, quiet=True)
        assert_same_state(state(tmp_path / "blocks", 4), state(tmp_path / "none", 4))


def make_transformer_task(recipe, store):
    names = store.class_names or tuple(map(str, range(50)))
    rows = np.arange(len(store))
    start = find_start(recipe, codebook_size=64, grid=store.grid, class_names=names)
    return TransformerTask(start, tiny_tokenizer(), CodeSplits(store, rows, store, rows))


def test_steps_without_gradients_are_skipped(digits, tokenizer_folder, tmp_path, monkeypatch):
    """One bad batch changes nothing; too many in a row end the run with its checkpoint whole."""
    losses = TransformerTask.losses
    bad = {3}

    def sometimes_infinite(self, model, batch, *, step, adversary):
        found = losses(self, model, batch, step=step, adversary=adversary)
        if step in bad:
            found = dataclasses.replace(found, total=found.total * torch.inf)
        return found

    monkeypatch.setattr(TransformerTask, "losses", sometimes_infinite)
    recipe = transformer_recipe(
        digits, tokenizer_folder, tmp_path / "out", steps=6, log_every=1, max_skipped_steps=2
    )
    result = train_transformer(recipe, quiet=True)
    assert result.train["skipped_steps"] == 1
    assert all(math.isfinite(record["loss"]) for record in records(recipe.out) if "loss" in record)
    bad |= set(range(6, 100))
    longer = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, steps=20))
    with pytest.raises(InputError, match="gradients of 3 steps in a row, up to 9, were infinite"):
        train_transformer(longer, quiet=True)
    assert latest_checkpoint(tmp_path / "out" / "checkpoints").step == 8


def test_bfloat16_trains(digits, tmp_path):
    recipe = tokenizer_recipe(digits, tmp_path / "out", precision="bfloat16", steps=2)
    result = train_tokenizer(recipe, quiet=True)
    assert ImageTokenizer.from_pretrained(result.model).dtype == torch.float32


def test_encoding_always_is_encoding_once(digits, tokenizer_folder, tmp_path):
    for encode in ("once", "always"):
        recipe = transformer_recipe(digits, tokenizer_folder, tmp_path / encode, encode=encode)
        train_transformer(recipe, quiet=True)
    assert records(tmp_path / "always") == records(tmp_path / "once")
    assert not (tmp_path / "always" / "codes" / "training").exists()
    # An interrupted run goes on, and not with the other's codes.
    recipe = transformer_recipe(digits, tokenizer_folder, tmp_path / "always", encode="always")
    longer = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, steps=6))
    assert train_transformer(longer, quiet=True).steps == 6
    with pytest.raises(InputError, match="encode"):
        train_transformer(dataclasses.replace(longer, encode="once"), quiet=True)
