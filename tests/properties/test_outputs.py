"""What is drawn and written: images in any company, their metadata, files and folders."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example
from hypothesis import strategies as st
from PIL import Image

import llamagen.support.storage as storage
from llamagen.cli.main import main
from llamagen.config import sampling_settings
from llamagen.generation.request import GenerationRequest
from llamagen.pipeline.saving import plan_images
from llamagen.support.artifact import Artifact, Format
from llamagen.support.errors import InputError
from llamagen.support.pictures import image_grid, read_metadata, save_png
from tests.properties.checking import JSON, TEXTS, answer, attempt, holds_for, new_folder
from tests.properties.test_settings import SAMPLINGS, SEEDS
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline

CLASSES = st.integers(0, 4)
PROMPTS = st.sampled_from(
    [
        "!!!",
        "???",
        "!",
        "犬",
        "猫",
        "🦊",
        "a b",
        "a-b",
        "A B",
        "a/b",
        "..",
        ".",
        "con",
        "x" * 80,
        "x" * 81,
        "é",
    ]
)
"""Texts that leave little for the name of a file."""


ORDERS = st.sampled_from(["raster", "random"])


def suited(sampling, order):
    """The settings, with passes that a model of this order takes."""
    if order == "raster":
        return dataclasses.replace(sampling, steps=None, generation_order="random")
    return dataclasses.replace(sampling, steps=sampling.steps and 1 + sampling.steps % 16)


@functools.cache
def class_pipeline(dtype=None, order="raster"):
    pipeline = tiny_pipeline(order=order)
    return pipeline if dtype is None else pipeline.to(dtype=dtype)


@functools.cache
def text_pipeline(dtype=None):
    pipeline = tiny_text_pipeline(clean=False)
    return pipeline if dtype is None else pipeline.to(dtype=dtype)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "model"
    text_pipeline().save_pretrained(folder)
    return folder


@holds_for(
    cost=2,
    images=st.lists(
        st.tuples(CLASSES, SEEDS, SAMPLINGS, st.integers(0, 16)), min_size=2, max_size=5
    ),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    order=ORDERS,
)
def test_codes_of_an_image_do_not_depend_on_its_company(images, dtype, order):
    engine = class_pipeline(dtype, order).code_engine
    requests = []
    for label, seed, sampling, known in images:
        codes = torch.arange(16).where(torch.arange(16) < known, torch.tensor(-1)).view(4, 4)
        requests.append(
            GenerationRequest(
                condition=torch.tensor(label),
                seed=seed,
                sampling=suited(sampling, order),
                known_codes=codes,
            )
        )
    together = engine.generate(requests)
    for request, codes in zip(requests, together, strict=True):
        assert torch.equal(engine.generate([request])[0], codes)
        known = request.known_codes >= 0
        assert torch.equal(codes[known], request.known_codes[known])


@holds_for(
    cost=8,
    prompts=st.lists(PROMPTS, min_size=2, max_size=5),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**31),
    negative=st.none() | PROMPTS,
)
def test_the_image_of_a_prompt_does_not_depend_on_other_prompts(prompts, dtype, seed, negative):
    pipe = text_pipeline(dtype)
    together = pipe(prompts, seed=seed, negative_prompt=negative, output_type="codes").codes
    for number, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=seed + number, negative_prompt=negative, output_type="codes")
        assert torch.equal(alone.codes[0], together[number])


@holds_for(
    cost=4, label=CLASSES, seed=SEEDS, train=st.booleans(), window=st.sampled_from([None, 1, 4])
)
def test_dropout_never_draws(label, seed, train, window):
    pipe = tiny_pipeline(token_dropout=0.5, residual_dropout=0.5, ffn_dropout=0.5)
    expected = pipe(label, seed=seed)
    pipe.transformer.train(train)
    pipe.tokenizer.train(train)
    found = pipe(label, seed=seed, window=window)
    assert torch.equal(found.codes, expected.codes)
    assert found.images == expected.images
    assert pipe.transformer.training == pipe.tokenizer.training == train


@holds_for(
    cost=2, label=CLASSES, seed=SEEDS, given=SAMPLINGS, best_of=st.integers(1, 2), order=ORDERS
)
def test_metadata_make_the_image_again(label, seed, given, best_of, order):
    assume(seed < 2**63 - 2)
    pipe, sampling = class_pipeline(order=order), suited(given, order)
    names = [setting.name for setting in sampling_settings()]
    first = pipe(label, seed=seed, best_of=best_of, **{n: getattr(sampling, n) for n in names})
    with new_folder() as folder:
        save_png(first.images[0], folder / "image.png", metadata=first.metadata[0])
        about = read_metadata(folder / "image.png")
        assert np.array_equal(
            np.asarray(Image.open(folder / "image.png")), np.asarray(first.images[0])
        )
    # The model's default where none was asked for: its own is none, too.
    again = pipe(about["class"], seed=about["seed"], **{n: about[n] for n in names})
    assert torch.equal(again.codes, first.codes)


@holds_for(
    cost=4,
    kind=st.sampled_from(["pil", "np", "pt", "latent", "codes"]) | TEXTS,
    count=st.integers(1, 2),
)
def test_a_type_of_output_is_known_or_refused(kind, count):
    pipe = class_pipeline()
    found = answer(lambda: pipe("dog", seed=1, num_images_per_prompt=count, output_type=kind))
    assert (found is not None) == (kind in ("pil", "np", "pt", "latent", "codes"))
    if found is None:
        return
    expected = pipe("dog", seed=1, num_images_per_prompt=count)
    assert torch.equal(found.codes, expected.codes)
    pixels = np.stack([np.asarray(image) for image in expected.images])
    if kind == "pil":
        assert np.array_equal(np.stack(list(map(np.asarray, found.images))), pixels)
    elif kind in ("np", "pt"):
        shares = found.images if kind == "np" else found.images.movedim(1, -1).numpy()
        assert shares.shape == pixels.shape
        assert shares.min() >= 0
        assert shares.max() <= 1
        assert np.abs(shares * 255 - pixels).max() <= 1


def generate(*words):
    """Run the command; return whether it worked."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            main(["generate", *map(str, words)])
        except SystemExit as stopped:
            assert "Traceback" not in err.getvalue()
            return not stopped.code


@holds_for(
    cost=16,
    calls=st.lists(
        st.tuples(
            st.lists(PROMPTS, min_size=1, max_size=3, unique=True),
            st.integers(0, 1),
            st.sampled_from([0.5, 1.0]),
        ),
        min_size=2,
        max_size=3,
        unique_by=str,
    ),
)
def test_nothing_drawn_is_overwritten(text_folder, calls):
    expected, before = set(), {}
    with new_folder() as folder:
        for prompts, seed, temperature in calls:
            given = [f"--model={text_folder}", f"--seed={seed}", f"--temperature={temperature}"]
            assert generate(*given, "--out", folder, "--prompt", *prompts)
            expected |= {(p, seed + n, temperature) for n, p in enumerate(prompts)}
            files = {path: path.read_bytes() for path in folder.rglob("*.png")}
            assert all(files[path] == content for path, content in before.items())
            assert all(len(path.name.encode()) <= 255 for path in files)
            found = set()
            for path in files:
                with contextlib.suppress(InputError):
                    about = read_metadata(path)
                    found.add((about["prompt"], about["seed"], about["temperature"]))
            assert found == expected
            before = {path: content for path, content in files.items() if "sheet" not in path.name}


@holds_for(
    values=st.dictionaries(TEXTS, JSON, max_size=4),
    seed=st.sampled_from([np.int64, np.uint8, np.float32, torch.tensor, np.array]),
)
def test_metadata_come_back_from_an_image(values, seed):
    with new_folder() as folder:
        given = values | {"seed": seed(3)}
        save_png(Image.new("RGB", (2, 2)), folder / "image.png", metadata=given)
        assert read_metadata(folder / "image.png") == values | {"seed": 3}


@holds_for(
    count=st.integers(1, 12),
    columns=st.none() | st.integers(-3, 14),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    gap=st.integers(0, 3),
)
def test_a_sheet_shows_every_image_in_its_place(count, columns, size, gap):
    images = [Image.new("RGB", size, (number, 7, 255 - number)) for number in range(count)]
    sheet = answer(lambda: image_grid(images, columns=columns, gap=gap))
    assert (sheet is not None) == (columns is None or columns >= 1)
    if sheet is None:
        return
    across = min(count, math.ceil(math.sqrt(count)) if columns is None else columns)
    colours = {}
    for y in range(sheet.height):
        for x in range(sheet.width):
            colours.setdefault(sheet.getpixel((x, y)), []).append((x, y))
    for number in range(count):
        row, column = divmod(number, across)
        left, top = gap + column * (size[0] + gap), gap + row * (size[1] + gap)
        inside = [(left + x, top + y) for y in range(size[1]) for x in range(size[0])]
        assert colours.pop((number, 7, 255 - number)) == inside
    assert set(colours) <= {(255, 255, 255)}


@holds_for(
    contents=st.lists(st.tuples(st.binary(max_size=9), st.booleans()), min_size=1, max_size=5),
    whole=st.booleans(),
)
def test_a_file_or_folder_is_written_whole_or_not_at_all(contents, whole):
    writer = storage.atomic_folder if whole else storage.atomic_file
    expected = None
    with new_folder() as folder:
        for content, fails in contents:
            with contextlib.suppress(KeyError), writer(folder / "kept") as temporary:
                (temporary / "part" if whole else temporary).write_bytes(content)
                if fails:
                    raise KeyError
            expected = expected if fails else content
            path = folder / "kept" / "part" if whole else folder / "kept"
            assert (path.read_bytes() if path.is_file() else None) == expected
            assert [each.name for each in folder.iterdir()] == ["kept"] * (expected is not None)


@holds_for(values=st.dictionaries(st.text(), JSON | st.text(), max_size=4))
def test_json_comes_back_from_its_file(values):
    with new_folder() as folder:
        storage.write_json(folder / "values.json", values)
        assert storage.read_json(folder / "values.json") == values


@holds_for(content=st.binary(max_size=30) | JSON.map(json.dumps).map(str.encode))
@example(content=b"[" * 100_000)
def test_a_json_file_holds_an_object_or_is_refused(content):
    with new_folder() as folder:
        (folder / "values.json").write_bytes(content)
        found, refusal = attempt(lambda: storage.read_json(folder / "values.json"))
    assert isinstance(found, dict) if refusal == "" else "values.json" in refusal


VALUES = st.integers() | st.floats(allow_nan=False) | st.lists(st.integers(), max_size=2) | TEXTS
SETTINGS = st.dictionaries(
    st.sampled_from("abc"),
    VALUES | st.dictionaries(st.sampled_from("de"), VALUES, min_size=1),
    max_size=3,
)
"""Without null, which is the same as none."""


@holds_for(first=SETTINGS, second=SETTINGS, free=st.sets(st.sampled_from("ab")))
def test_a_folder_goes_on_with_the_same_settings_only(first, second, free):
    form = Format(name="toys", version=1, noun="toys", free=tuple(sorted(free)))
    same = {n: v for n, v in first.items() if n not in free} == {
        n: v for n, v in second.items() if n not in free
    }
    with new_folder() as folder:
        with Artifact(folder, form, first).begin():
            pass
        artifact = Artifact(folder, form, second)
        with contextlib.ExitStack() as begun:
            _, refusal = attempt(lambda: begun.enter_context(artifact.begin()))
        assert (refusal == "") == same
        assert artifact.settings == (first if same else second)


@holds_for(
    prompts=st.lists(TEXTS, max_size=5), images=st.integers(1, 4), seed=st.integers(0, 2**62)
)
def test_images_of_a_file_have_names_and_seeds_of_their_own(prompts, images, seed):
    planned = plan_images([(text, {}) for text in prompts], images_per_prompt=images, seed=seed)
    assert [each.prompt for each in planned] == [text for text in prompts for _ in range(images)]
    assert [each.seed for each in planned] == [*range(seed, seed + len(planned))]
    assert len({each.file for each in planned}) == len(planned)
