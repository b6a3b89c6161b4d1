"""The same seeds sample the same codes as in the first edition.

``seeded_codes.json`` was written by the first edition, in float32 on a CPU. Codes in int8 are left
out: some processors quantise activations too, so they depend on the machine by design. Write the
table anew only when a change of codes is intended:

    python -m tests.parity.test_seeded_codes
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen import Editor, Pipeline

TABLE = Path(__file__).with_name("seeded_codes.json")
KNOWN = torch.full((8, 8), -1)
KNOWN[:3] = torch.arange(24).view(3, 8)
KNOWN[5, 5] = 7

CIFAR10 = {
    "several classes": (["horse", "ship"], {"num_images_per_prompt": 2}),
    "no guidance": ("cat", {"guidance_scale": 1.0}),
    "guidance stop": ("cat", {"guidance_scale": 3.0, "guidance_stop": 20}),
    "greedy": ("cat", {"temperature": 0.0}),
    "top-k and top-p": ("dog", {"top_k": 50, "top_p": 0.9, "num_images_per_prompt": 2}),
    "negative class": ("dog", {"negative_prompt": "cat", "guidance_scale": 3.0}),
    "blend": ("dog", {"blend": "cat", "blend_share": 0.3}),
    "window": ("dog", {"window": 4}),
    "best of three": ("dog", {"best_of": 3}),
    "known codes": ("dog", {"known_codes": KNOWN}),
}
EMOJI = {
    "texts of different lengths": (["red apple", "a cat", "grinning face with big eyes"], {}),
    "negative prompt": (["red apple"], {"negative_prompt": "green", "guidance_scale": 3.0}),
}
EDITS = {"vary": {"keep": 0.4}, "outpaint": {"below": 4, "right": 4}}


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text())


@pytest.fixture(scope="module")
def cifar10():
    return Pipeline.from_pretrained("cifar10", dtype="float32", device="cpu")


def codes_of(pipe, prompt, settings):
    return pipe(prompt, seed=3, output_type="codes", **settings).codes.flatten().tolist()


def edited_codes(pipe, name):
    slopes = np.indices((32, 32)).sum(0)[..., None] * np.array([3, 2, 1])
    image = Image.fromarray((slopes % 256).astype(np.uint8))
    edit = getattr(Editor(pipe), name)
    output = edit(image, "dog", seed=1, output_type="codes", **EDITS[name])
    return output.codes.flatten().tolist()


@pytest.mark.parametrize("name", CIFAR10)
def test_classes(name, cifar10, table):
    assert codes_of(cifar10, *CIFAR10[name]) == table[name]


@pytest.mark.parametrize("name", EDITS)
def test_edits(name, cifar10, table):
    assert edited_codes(cifar10, name) == table[name]


@pytest.mark.parametrize("name", EMOJI)
def test_texts(name, table):
    pipe = Pipeline.from_pretrained("emoji", dtype="float32", device="cpu")
    assert codes_of(pipe, *EMOJI[name]) == table[name]


def write_table() -> None:
    classes, texts = (
        Pipeline.from_pretrained(name, dtype="float32", device="cpu")
        for name in ("cifar10", "emoji")
    )
    found = {name: codes_of(classes, *case) for name, case in CIFAR10.items()}
    found |= {name: edited_codes(classes, name) for name in EDITS}
    found |= {name: codes_of(texts, *case) for name, case in EMOJI.items()}
    TABLE.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    write_table()
