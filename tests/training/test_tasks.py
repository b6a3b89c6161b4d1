"""What is particular to each of the two trainings."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen.config import SamplingConfig
from llamagen.data.codes import CodeSet
from llamagen.data.images import SkippedFiles
from llamagen.errors import InputError
from llamagen.labels import Labels
from llamagen.pipeline import Pipeline
from llamagen.tokenizer import ImageTokenizer
from llamagen.training import train_tokenizer, train_transformer
from llamagen.training.config import AugmentationConfig, ImageConfig, TokenizerLossConfig
from llamagen.training.loop import fit
from llamagen.training.losses import tokenizer_terms
from llamagen.training.tokenizer_task import init_codebook
from llamagen.training.transformer_task import TransformerTask
from llamagen.transformer import Transformer
from tests.images import write_digits
from tests.models import tiny_tokenizer, tiny_transformer
from tests.training.runs import records, tokenizer_recipe, transformer_recipe


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

    def test_folder_of_the_run(self, digits, tmp_path):
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

    def test_ema_is_what_is_exported(self, digits, tmp_path):
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
        recipe = tokenizer_recipe(digits, tmp_path / "out", lr=1e30, clip_norm=0.0, log_every=2)
        with pytest.raises(InputError, match="at or shortly before step"):
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
    def test_folder_of_the_run(self, digits, tokenizer_folder, tmp_path):
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

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"num_classes": 2},
                "num_classes is 2, but .* has 3 classes; raise it or leave it out",
            ),
            ({"images": ImageConfig(size=18)}, "multiples of the tokenizer's downsampling 4"),
            ({"tokenizer": None}, "no image tokenizer was named; give --tokenizer"),
            ({"data": None}, "no images were named; give --data"),
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
        codes = CodeSet(
            codes=rng.integers(0, 64, (4, 1, 4, 4)).astype(np.uint16),
            labels=np.arange(4),
            class_names=tuple("abcd"),
            codebook_size=64,
            origin="made up",
        )
        config = dataclasses.replace(
            tiny_transformer().config,
            num_classes=4, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0,
        )  # fmt: skip
        recipe = transformer_recipe(
            None, "", tmp_path, class_dropout=0.0, sample_images=1,
            steps=120, lr=1e-2, log_every=60, validate_every=0, save_every=0,
        )  # fmt: skip
        torch.manual_seed(0)
        pipeline = Pipeline(tiny_tokenizer(), Transformer(config), labels=Labels(tuple("abcd")))
        task = TransformerTask(
            recipe, pipeline, codes, codes, data={}, skipped=SkippedFiles(tmp_path / "skipped.txt")
        )
        result = fit(task, recipe.loop, tmp_path, quiet=True)
        assert result.validation["bits_per_code"] < 0.1

    def test_batches_draw_labels_and_views(self, tmp_path):
        numbers = np.arange(5 * 3).reshape(5, 3, 1, 1).astype(np.uint16)
        codes = CodeSet(
            codes=numbers, labels=np.arange(5) * 10, class_names=(), codebook_size=64, origin=""
        )
        recipe = transformer_recipe(None, "", tmp_path, batch_size=5)
        pipeline = Pipeline(tiny_tokenizer(), tiny_transformer())
        skipped = SkippedFiles(tmp_path / "skipped.txt")
        task = TransformerTask(recipe, pipeline, codes, None, data={}, skipped=skipped)
        seen = set()
        for batch in task.batches(0, 20):
            rows = zip(batch["codes"].tolist(), batch["labels"].tolist(), strict=True)
            for (code,), label in rows:
                assert code // 3 == label // 10
                seen.add(code)
        assert seen == set(range(15))
        later = list(task.batches(7, 9))
        again = list(task.batches(0, 9))[7:]
        assert all(torch.equal(a["codes"], b["codes"]) for a, b in zip(later, again, strict=True))

    def test_class_dropout_reaches_the_model(self, tmp_path):
        recipe = transformer_recipe(None, "", tmp_path, class_dropout=0.5)
        pipeline = Pipeline(tiny_tokenizer(), tiny_transformer())
        codes = CodeSet(
            codes=np.zeros((1, 1, 4, 4), np.uint16),
            labels=np.zeros(1, np.int64), class_names=("a",), codebook_size=64, origin="",
        )  # fmt: skip
        skipped = SkippedFiles(tmp_path / "skipped.txt")
        task = TransformerTask(recipe, pipeline, codes, None, data={}, skipped=skipped)
        dropped = []

        def model(codes, labels, *, drop_condition):
            dropped.append(drop_condition)
            return torch.zeros(*codes.shape[:1], 16, 64, requires_grad=True)

        batch = {"codes": torch.zeros(400, 16, dtype=torch.int64), "labels": torch.zeros(400)}
        losses = task.losses(model, batch)
        assert losses.total.item() == pytest.approx(math.log(64))
        assert 100 < int(dropped[0].sum()) < 300


def test_bfloat16_trains(digits, tmp_path):
    recipe = tokenizer_recipe(digits, tmp_path / "out", precision="bfloat16", steps=2)
    result = train_tokenizer(recipe, quiet=True)
    assert ImageTokenizer.from_pretrained(result.model).dtype == torch.float32
