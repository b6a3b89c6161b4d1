"""Training on captions: with a text encoder that is trained along, or with one that stays."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from llamagen.config import TransformerConfig
from llamagen.data.captions import Caption
from llamagen.data.columns import SourceConfig
from llamagen.data.extraction import extract_store
from llamagen.data.live_codes import MemoryCodes
from llamagen.data.sources import open_images
from llamagen.data.views import Views
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.pipeline import Pipeline
from llamagen.support.errors import InputError
from llamagen.text.features import extract_text
from llamagen.training import train_transformer
from llamagen.training.config import ImageConfig, LoraConfig, TextTraining
from llamagen.training.data import CodeSplits
from llamagen.training.dry_run import dry_run
from llamagen.training.export import export_run
from llamagen.training.loop import fit
from llamagen.training.next_code import TokenConditioning
from llamagen.training.transformer_start import find_start
from llamagen.training.transformer_task import TransformerTask, make_task
from tests.tiny_models import tiny_text_encoder, tiny_tokenizer
from tests.training.runs import assert_same_state, state, transformer_recipe

SMALL = TextTraining(text_dim=16, text_layers=1, text_heads=2, text_length=30)
WORDS = ("nought", "one", "two")


@pytest.fixture(scope="module")
def captioned(digits, tmp_path_factory):
    """The digits with a table of captions, one of them without."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = []
    for path in sorted(digits.rglob("*.png")):
        name = f"{path.parent.name}-{path.name}"
        (folder / name).write_bytes(path.read_bytes())
        rows.append((name, f"the digit {WORDS[int(path.parent.name)]}", path.parent.name))
    rows[::4] = [(name, "", "") for name, _, _ in rows[::4]]
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text", "aliases"), *rows])
    return folder


def text_recipe(data, tokenizer, out, **changes):
    return transformer_recipe(
        data, tokenizer, out, **{"condition": "text", "text": SMALL, **changes}
    )


def test_folder_of_the_run(captioned, tokenizer_folder, tmp_path):
    out = tmp_path / "out"
    recipe = text_recipe(captioned, tokenizer_folder, out, ema_decay=0.5)
    result = train_transformer(recipe, quiet=True)
    assert result.validation["bits_per_code"] > 0
    assert 0 < result.train["without_caption"] < 0.6
    assert (out / "samples" / "step-0000004.png").exists()
    pipe = Pipeline.from_pretrained(result.model, device="cpu", dtype="float32")
    assert pipe.labels is None
    assert pipe("the digit two", seed=0).images[0].size == (16, 16)
    assert pipe.text_encoder.config.max_length == 30
    # Any checkpoint, the trained weights and the mean, become the same kind of folder.
    trained = export_run(out, tmp_path / "trained", step=4, weights="trained")
    mean = export_run(out, tmp_path / "mean", step=4)
    features = [
        Pipeline.from_pretrained(folder, dtype="float32").text_encoder.encode(["two"])[0]
        for folder in (trained, mean, result.model)
    ]
    assert torch.equal(features[1], features[2])
    assert not torch.equal(features[0], features[1])


def test_resumes_exactly(captioned, tokenizer_folder, tmp_path):
    def train(name, steps):
        recipe = text_recipe(captioned, tokenizer_folder, tmp_path / name, steps=steps)
        train_transformer(recipe, quiet=True)

    train("whole", 4)
    for steps in (2, 4):
        train("parts", steps)
    assert_same_state(state(tmp_path / "parts", 4), state(tmp_path / "whole", 4))


def test_samples_follow_prompts(tmp_path):
    """Four sequences, known by their captions only: each prompt gives its own."""
    rng = np.random.default_rng(0)
    captions = [((Caption(text, 1.0),)) for text in ("red heart", "blue heart", "cat", "red cat")]
    store = MemoryCodes(rng.integers(0, 64, (4, 1, 4, 4)), texts=captions)
    recipe = text_recipe(
        None, "", tmp_path, condition_dropout=0.1, sample_images=1,
        text=dataclasses.replace(SMALL, text_dropout=0.0, text_dim=32),
        model=TransformerConfig(
            dim=32, layers=2, heads=2, hidden_dim=64,
            token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0,
        ),
        steps=400, batch_size=16, lr=1e-2, log_every=100, validate_every=0, save_every=0,
    )  # fmt: skip
    task = make_text_task(recipe, store)
    result = fit(task, recipe.loop, tmp_path, quiet=True)
    assert result.validation["bits_per_code"] < 0.1
    pipe = Pipeline.from_pretrained(result.model, device="cpu", dtype="float32")
    drawn = pipe([each[0].text for each in captions], temperature=0.0, guidance_scale=1.5)
    np.testing.assert_array_equal(drawn.codes.numpy(), store.codes[:, 0])


def test_images_without_captions_weigh_nothing(tmp_path):
    store = MemoryCodes(np.arange(64).reshape(4, 1, 4, 4), texts=[(Caption("a", 1.0),), (), (), ()])
    task = make_text_task(text_recipe(None, "", tmp_path), store)
    task.prepare()
    torch.nn.init.normal_(task.module.transformer.output.weight)
    task.module.eval()

    def loss(rows):
        batch = task._conditioning.batch(store, np.array(rows), None)
        codes = torch.from_numpy(store.rows(np.array(rows), 0).reshape(len(rows), -1))
        batch |= {"codes": codes, "input": codes[:, :-1]}
        return task._loss(task.module, batch)

    torch.testing.assert_close(loss([0, 1, 2, 3]), loss([0]))
    assert loss([1, 2]).item() == 0
    some = task._conditioning.batch(store, np.array([0, 1, 2, 3]), None)
    codes = torch.from_numpy(store.rows(np.arange(4), 0).reshape(4, -1))
    some |= {"codes": codes, "input": codes[:, :-1]}
    losses = task.losses(task.module, some, step=0, adversary=None)
    assert losses.metrics["without_caption"].item() == 0.75
    empty = MemoryCodes(store.codes, texts=[()] * 4)
    with pytest.raises(InputError, match="of 4 images in memory, none"):
        make_text_task(text_recipe(None, "", tmp_path), empty)


def test_captions_are_sampled_by_weight(tmp_path):
    store = MemoryCodes(
        np.zeros((1, 1, 4, 4)), texts=[(Caption("long", 0.7), Caption("short", 0.3))]
    )
    task = make_text_task(text_recipe(None, "", tmp_path, batch_size=400), store)
    batch = next(task.batches(0, 1))
    lengths = batch["mask"].sum(1)
    assert set(lengths.tolist()) == {5, 6}
    assert 90 < int((lengths == 6).sum()) < 150
    again = next(task.batches(0, 1))
    assert all(torch.equal(batch[name], again[name]) for name in batch)


class TestFrozenEncoder:
    @pytest.fixture(scope="class")
    @classmethod
    def encoder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("encoder") / "t5"
        tiny_text_encoder().save_pretrained(folder)
        return folder

    def frozen(self, encoder, **changes):
        return TextTraining(text_encoder=str(encoder), text_length=30, **changes)

    @pytest.mark.parametrize("lora", [0, 2])
    def test_run(self, captioned, tokenizer_folder, encoder, tmp_path, lora):
        out = tmp_path / "out"
        recipe = text_recipe(captioned, tokenizer_folder, out, text=self.frozen(encoder))
        result = train_transformer(recipe, quiet=True)
        pipe = Pipeline.from_pretrained(result.model, device="cpu", dtype="float32")
        # It is the one that there was, and goes with the pipeline.
        expected = tiny_text_encoder().encode(["the digit one"])[0]
        found = pipe.text_encoder.encode(["the digit one"])[0]
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
        tuned = text_recipe(
            captioned, tokenizer_folder, tmp_path / "tuned", init=str(result.model),
            text=self.frozen(encoder), lora=LoraConfig(lora_rank=lora), model=TransformerConfig(),
        )  # fmt: skip
        result = train_transformer(tuned, quiet=True)
        assert Pipeline.from_pretrained(result.model)("two", seed=0).images
        longer = dataclasses.replace(tuned, loop=dataclasses.replace(tuned.loop, steps=6))
        assert train_transformer(longer, quiet=True).steps == 6

    def test_another_encoder_under_its_name(self, captioned, tokenizer_folder, tmp_path):
        tiny_text_encoder().save_pretrained(tmp_path / "t5")

        def train(steps):
            text = self.frozen(tmp_path / "t5")
            recipe = text_recipe(
                captioned, tokenizer_folder, tmp_path / "out", text=text, steps=steps
            )
            return train_transformer(recipe, quiet=True)

        train(1)
        tiny_text_encoder(seed=1).save_pretrained(tmp_path / "t5")
        with pytest.raises(InputError, match="the text encoder is not what the run"):
            train(2)
        # Older runs do not say which one it was.
        (path,) = (tmp_path / "out").glob("checkpoints/step-*/about.json")
        about = json.loads(path.read_text())
        del about["data"]["the text encoder"]
        path.write_text(json.dumps(about))
        assert train(2).steps == 2

    def test_features_are_the_encoder_s(self, captioned, tokenizer_folder, encoder, tmp_path):
        recipe = text_recipe(
            captioned, tokenizer_folder, tmp_path / "out", text=self.frozen(encoder)
        )
        task = make_task(recipe)
        assert isinstance(task._conditioning, TokenConditioning)
        assert task.module.transformer.config.text_dim == 16
        batch = next(task.batches(0, 1))
        seen = {}

        def model(codes, features, targets, *, condition_mask, **_):
            seen.update(features=features, mask=condition_mask)
            return torch.tensor(1.0)

        task.losses(model, batch, step=0, adversary=None)
        assert seen["features"].shape == (*batch["condition"].shape, 16)
        assert not seen["features"].requires_grad


class TestStoredFeatures:
    @pytest.fixture
    def features(self, captioned, tmp_path):
        captions = [each.text for each in sum(open_images(captioned).captions, ())]
        encoder = tiny_text_encoder()
        encoder.save_pretrained(tmp_path / "t5")
        encoder.config = dataclasses.replace(encoder.config, encoder=str(tmp_path / "t5"))
        # One of the three is left out.
        kept = [text for text in captions if "one" not in text]
        return extract_text(encoder, kept, tmp_path / "features").store

    def test_run(self, captioned, tokenizer_folder, features, tmp_path):
        out = tmp_path / "out"
        text = TextTraining(text_features=features.folder)
        recipe = text_recipe(captioned, tokenizer_folder, out, text=text)
        result = train_transformer(recipe, quiet=True)
        assert 0.2 < result.train["without_caption"] < 0.9
        longer = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, steps=6))
        result = train_transformer(longer, quiet=True)
        pipe = Pipeline.from_pretrained(result.model, device="cpu", dtype="float32")
        assert pipe("the digit two", seed=0).images
        assert export_run(out, tmp_path / "model", step=6).is_dir()

    def test_other_content(self, captioned, tokenizer_folder, features, tmp_path):
        text = TextTraining(text_features=features.folder)
        recipe = text_recipe(captioned, tokenizer_folder, tmp_path / "out", text=text, steps=1)
        train_transformer(recipe, quiet=True)
        path = features.folder / "shard-00000.npy"
        content = path.read_bytes()
        path.write_bytes(content[:-2] + b"\x00\x3f")
        longer = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, steps=2))
        with pytest.raises(InputError, match="the text features is not what the run"):
            train_transformer(longer, quiet=True)

    def test_the_loss_is_the_encoder_s(self, captioned, tokenizer_folder, features, tmp_path):
        losses = []
        for name, text in (
            ("stored", TextTraining(text_features=features.folder)),
            ("made", TextTraining(text_encoder=features.text.encoder, text_length=30)),
        ):
            recipe = text_recipe(captioned, tokenizer_folder, tmp_path / name, text=text)
            task = make_task(recipe)
            task.prepare()
            torch.manual_seed(0)
            torch.nn.init.normal_(task.module.transformer.output.weight)
            store = task._codes.training
            told = [str(each) for each in store.captions(range(len(store)))]
            rows = [row for row, text in enumerate(told) if "two" in text]
            batch = task._conditioning.batch(task._codes.training, np.array(rows), None)
            codes = torch.from_numpy(store.rows(np.array(rows), 0).astype(np.int64)).flatten(1)
            batch |= {"codes": codes, "input": codes[:, :-1]}
            task.module.eval()
            losses.append(task._loss(task.module, batch))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-2)

    def test_rejects_mismatched_settings(self, captioned, tokenizer_folder, features, tmp_path):
        text = TextTraining(text_features=features.folder, text_encoder="google/flan-t5-xl")
        recipe = text_recipe(captioned, tokenizer_folder, tmp_path / "out", text=text)
        with pytest.raises(InputError, match="not by google/flan-t5-xl"):
            train_transformer(recipe, quiet=True)


def test_from_a_smaller_grid_to_a_larger_one(captioned, tokenizer_folder, tmp_path):
    first = train_transformer(
        text_recipe(captioned, tokenizer_folder, tmp_path / "small"), quiet=True
    )
    recipe = text_recipe(
        captioned, tokenizer_folder, tmp_path / "large", init=str(first.model),
        images=ImageConfig(size=32, validation_fraction=0.2), model=TransformerConfig(),
        text=TextTraining(text_length=30, text_dropout=0.0), steps=2, save_every=1,
    )  # fmt: skip
    task = make_task(recipe)
    task.prepare()
    before = Pipeline.from_pretrained(first.model, dtype="float32")
    assert torch.equal(
        task.module.encoder.encode(["two"])[0], before.text_encoder.encode(["two"])[0]
    )
    second = train_transformer(recipe, quiet=True)
    assert Pipeline.from_pretrained(second.model)("two", seed=0).images[0].size == (32, 32)
    # Once begun, it needs its source no more.
    first.model.rename(tmp_path / "gone")
    longer = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, steps=3))
    assert train_transformer(longer, quiet=True).steps == 3


def test_rejects_mismatched_settings(digits, captioned, tokenizer_folder, tmp_path):
    out = tmp_path / "out"
    for changes, message in (
        ({"data": str(digits)}, "have no captions; add a metadata.csv"),
        ({"source": SourceConfig(caption_columns=("alt",))}, "no column 'alt' for the caption"),
    ):
        recipe = dataclasses.replace(text_recipe(captioned, tokenizer_folder, out), **changes)
        with pytest.raises(InputError, match=message) as caught:
            train_transformer(recipe, quiet=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="heads 3 must divide"):
        TextTraining(text_dim=10, text_heads=3)
    with pytest.raises(InputError, match="condition is 'colour'"):
        text_recipe(captioned, tokenizer_folder, out, condition="colour")
    # Codes of images that had no captions.
    tokenizer = ImageTokenizer.from_pretrained(tokenizer_folder)
    views = Views(height=16, width=16)
    extract_store(tokenizer, open_images(digits), views, tmp_path / "codes")
    recipe = text_recipe(None, tokenizer_folder, out, codes=tmp_path / "codes")
    with pytest.raises(InputError, match="have no captions"):
        train_transformer(recipe, quiet=True)


def test_dry_run(captioned, tokenizer_folder, tmp_path, capsys):
    dry_run(text_recipe(captioned, tokenizer_folder, tmp_path / "out"))
    assert "2 steps taken" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def make_text_task(recipe, store):
    rows = np.arange(len(store))
    start = find_start(recipe, codebook_size=64, grid=store.grid, class_names=())
    return TransformerTask(start, tiny_tokenizer(), CodeSplits(store, rows, store, rows))


def test_captions_of_like_lengths_share_a_batch(tmp_path):
    lengths = [3, 20, 4, 19, 5, 21, 2, 18]
    store = MemoryCodes(
        np.zeros((8, 1, 4, 4), dtype=np.int64),
        texts=[(Caption("x" * length, 1.0),) for length in lengths],
    )
    recipe = text_recipe(None, "", tmp_path, batch_size=4)
    recipe = dataclasses.replace(
        recipe, text=dataclasses.replace(recipe.text, length_group=2, text_length=30)
    )
    task = make_text_task(recipe, store)
    widths = sorted(batch["mask"].shape[1] for batch in task.batches(0, 2))
    # One more: the end of the text.
    assert widths == [6, 22]


def test_code_noise(tmp_path):
    store = MemoryCodes(
        np.full((50, 1, 10, 10), 7), texts=[(Caption("a", 1.0),) for _ in range(50)]
    )
    recipe = text_recipe(None, "", tmp_path, batch_size=50, code_noise=0.8)
    task = make_text_task(recipe, store)
    (batch,) = task.batches(0, 1)
    assert (batch["codes"] == 7).all()
    assert batch["input"].shape == (50, 99)
    noisy = (batch["input"] != 7).float().mean(1)
    # Each image has its own part, from none to the largest.
    assert noisy.min() < 0.2
    assert 0.6 < noisy.max() < 0.9
    assert noisy.mean() == pytest.approx(0.4, abs=0.08)
    assert batch["input"].max() < task.module.transformer.config.codebook_size
    (again,) = task.batches(0, 1)
    assert torch.equal(batch["input"], again["input"])
    plain = make_text_task(dataclasses.replace(recipe, code_noise=0.0), store)
    (batch,) = plain.batches(0, 1)
    assert torch.equal(batch["input"], batch["codes"][:, :-1])


def test_captions_learn_which_codes_an_image_has(tmp_path):
    """With random codes shown for all, so that only the caption can tell."""
    captions = [(Caption(f"number {index}", 1.0),) for index in range(4)]
    codes = np.stack([np.full((1, 4, 4), 10 * index) for index in range(4)])
    codes[:, :, 0] += 1
    store = MemoryCodes(codes, texts=captions)

    def trained(weight):
        recipe = text_recipe(None, "", tmp_path, batch_size=4)
        text = dataclasses.replace(recipe.text, code_set_weight=weight)
        task = make_text_task(dataclasses.replace(recipe, text=text), store)
        task.prepare()
        return task

    task = trained(1.0)
    (batch,) = task.batches(0, 1)
    losses = task.losses(task.module.train(), batch, step=0, adversary=None)
    expected = float(losses.metrics["code_set_loss"]) + float(losses.metrics["bits_per_code"]) * (
        np.log(2)
    )
    assert losses.total.item() == pytest.approx(expected, rel=1e-5)
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-2)
    for _ in range(150):
        losses = task.losses(task.module, batch, step=0, adversary=None)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    # Two codes an image, both as likely.
    assert float(losses.metrics["code_set_loss"]) == pytest.approx(np.log(2), abs=0.2)
    # What is exported and validated knows nothing of it.
    task.module.eval()
    with torch.no_grad():
        assert task.validate().keys() == {"loss", "bits_per_code"}
    assert "code_head" not in "".join(task.module.transformer.state_dict())
    assert trained(0.0).module.code_head is None
