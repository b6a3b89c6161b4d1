"""Training on images from everywhere, and on the odd ones among them."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen.data import SourceConfig, open_images
from llamagen.data.extraction import extract_store
from llamagen.data.views import Views
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.pipeline import Pipeline
from llamagen.support.errors import InputError
from llamagen.training import train_tokenizer, train_transformer
from llamagen.training.config import ImageConfig
from llamagen.training.data import find_codes
from tests.data.sets import NAMES, scans, write_parquet, write_tars
from tests.tiny_models import tiny_tokenizer
from tests.training.runs import (
    assert_same_state,
    records,
    state,
    tokenizer_recipe,
    transformer_recipe,
)

STREAMED = SourceConfig(
    streaming=True, shuffle_buffer=8, stream_parts=2, validation_split="validation"
)


@pytest.fixture
def parquet(own_cache, tmp_path):
    folder = write_parquet(tmp_path / "set", scans(20), files=3)
    return write_parquet(folder, scans(26)[20:], split="validation")


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_training_resumes_exactly(parquet, tmp_path, workers):
    def train(out, steps):
        recipe = tokenizer_recipe(
            parquet, out, source=STREAMED, codebook_init="data", steps=steps, save_every=0
        )
        images = dataclasses.replace(recipe.images, workers=workers)
        return train_tokenizer(dataclasses.replace(recipe, images=images), quiet=True)

    # Beyond the first epoch, of five steps.
    result = train(tmp_path / "whole", 6)
    assert set(result.validation) >= {"psnr", "ssim"}
    assert any((tmp_path / "whole" / "samples").iterdir())
    for steps in (2, 3, 6):
        train(tmp_path / "parts", steps)
    assert_same_state(state(tmp_path / "parts", 6), state(tmp_path / "whole", 6))
    assert records(tmp_path / "parts")[-1] == records(tmp_path / "whole")[-1]


def test_rejects_unusable_streaming(parquet, digits, tokenizer_folder, tmp_path):
    plain = dataclasses.replace(STREAMED, validation_split=None)
    for data, source, message in (
        (parquet, plain, "give `validation_split` or `validation_data`"),
        (digits, STREAMED, "cannot be streamed"),
    ):
        with pytest.raises(InputError, match=message):
            train_tokenizer(tokenizer_recipe(data, tmp_path / "out", source=source), quiet=True)
    with pytest.raises(InputError, match="only image tokenizers train on streamed data"):
        train_transformer(
            transformer_recipe(parquet, tokenizer_folder, tmp_path / "out", source=STREAMED),
            quiet=True,
        )


def test_validation_of_a_stream_from_a_folder(parquet, digits, tmp_path):
    source = dataclasses.replace(STREAMED, validation_split=None)
    recipe = tokenizer_recipe(parquet, tmp_path / "run", source=source, validation_data=str(digits))
    assert "psnr" in train_tokenizer(recipe, quiet=True).validation


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_transformer_on_tables(own_cache, kind, tokenizer_folder, tmp_path):
    write = write_parquet if kind == "parquet" else write_tars
    folder = write(tmp_path / "set", scans(20), files=2)
    result = train_transformer(
        transformer_recipe(folder, tokenizer_folder, tmp_path / "run"), quiet=True
    )
    names = Pipeline.from_pretrained(result.model).labels.names
    assert list(names) == (NAMES if kind == "parquet" else ["0", "1", "2"])


def classes_of_validation(recipe, tokenizer_folder):
    """Names of the classes of held-out images, as the model numbers them."""
    codes = find_codes(recipe, ImageTokenizer.from_pretrained(tokenizer_folder))
    names = codes.training.class_names
    return [names[codes.validation.labels[row]] for row in codes.val_rows]


def test_validation_classes_are_found_by_name(digits, tokenizer_folder, tmp_path):
    # Three training classes, of which the validation lacks the first.
    other = tmp_path / "other"
    for name in ("1", "2"):
        shutil.copytree(digits / name, other / name)
    table = tmp_path / "table"
    shutil.copytree(digits / "2", table)
    rows = "".join(f"{path.name},2\n" for path in sorted(table.iterdir()))
    (table / "metadata.csv").write_text(f"file_name,label\n{rows}")
    for data, expected in ((other, ["1"] * 8 + ["2"] * 8), (table, ["2"] * 8)):
        recipe = transformer_recipe(
            digits, tokenizer_folder, tmp_path / f"{data.name}-run", validation_data=str(data)
        )
        assert classes_of_validation(recipe, tokenizer_folder) == expected
    stores = {}
    for data in (digits, other):
        stores[data] = tmp_path / f"{data.name}-codes"
        tokenizer = ImageTokenizer.from_pretrained(tokenizer_folder)
        images, views = open_images(data), Views(height=16, width=16)
        extract_store(tokenizer, images, views, stores[data], progress=False)
    recipe = transformer_recipe(
        None, tokenizer_folder, tmp_path / "store-run",
        codes=stores[digits], validation_codes=stores[other],
    )  # fmt: skip
    assert classes_of_validation(recipe, tokenizer_folder) == ["1"] * 8 + ["2"] * 8
    recipe = dataclasses.replace(
        recipe, codes=stores[other], validation_codes=stores[digits], out=tmp_path / "refused"
    )
    with pytest.raises(InputError, match="a class '0' that the training codes do not have"):
        classes_of_validation(recipe, tokenizer_folder)
    assert not (tmp_path / "refused").exists()


def odd_images(folder):
    """One image of each kind that trips readers up, and the names of those that are damaged."""
    folder.mkdir()
    random = np.random.default_rng(0)

    def pixels(*shape, top=256, dtype=np.uint8):
        return random.integers(0, top, shape).astype(dtype)

    colours = Image.fromarray(pixels(24, 40, 3))
    colours.save(folder / "plain.jpg")
    colours.convert("CMYK").save(folder / "cmyk.jpg")
    colours.convert("P").save(folder / "palette.png")
    colours.convert("1").save(folder / "bilevel.tif")
    Image.fromarray(pixels(24, 40, 4)).save(folder / "transparent.png")
    Image.fromarray(pixels(24, 40, top=65536, dtype=np.uint16)).save(folder / "deep.png")
    frames = [Image.fromarray(pixels(24, 40, 3)) for _ in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.save(folder / "turned.jpg", exif=exif)
    colours.resize((3, 2)).save(folder / "tiny.png")
    colours.resize((900, 5)).save(folder / "wide.png")
    name = os.fsdecode(b"not utf-8 \xff\xfe.png")
    (folder / name).write_bytes((folder / "palette.png").read_bytes())
    whole = (folder / "plain.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("this is no image")
    return {"truncated.jpg", "empty.png", "text.jpg"}


def test_odd_images_are_trained_on_and_damaged_ones_listed(tmp_path):
    damaged = odd_images(tmp_path / "images")
    recipe = tokenizer_recipe(
        tmp_path / "images", tmp_path / "run", steps=12,
        images=ImageConfig(size=16, validation_fraction=0.3, workers=2),
    )  # fmt: skip
    result = train_tokenizer(recipe, quiet=True)
    assert result.skipped == len(damaged)
    listed = (tmp_path / "run" / "skipped.txt").read_text(errors="surrogateescape")
    assert {line.split("\t")[0].rpartition("/")[2] for line in listed.splitlines()} == damaged
    for tensor in ImageTokenizer.from_pretrained(result.model).state_dict().values():
        assert torch.isfinite(tensor).all()


def test_odd_images_are_extracted_and_damaged_ones_listed(tmp_path):
    damaged = odd_images(tmp_path / "images")
    images = open_images(tmp_path / "images")
    views = Views(height=16, width=16, kind="ten-crop")
    done = extract_store(tiny_tokenizer(), images, views, tmp_path / "codes", progress=False)
    store = done.store
    assert len(store) == len(images) - len(damaged)
    assert {key for key, _ in store.skipped()} == damaged
    assert set(store.keys(range(len(store)))) == {images.key(i) for i in range(14)} - damaged
    # Turned upright: portrait, so its crops are not those of the same pixels lying down.
    keys = list(store.keys(range(len(store))))
    codes = store.rows(
        np.array([keys.index("plain.jpg"), keys.index("turned.jpg")]), np.zeros(2, np.int64)
    )
    assert not np.array_equal(codes[0], codes[1])
