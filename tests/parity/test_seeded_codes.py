"""Seeds draw the codes that they drew before: ``seeded_codes.json`` has a row for each case.

A row that changes means that users get other images for the seeds they know. All cases are drawn
in float32 on the CPU, where codes depend on the processor and its libraries only through
floating-point ties. The table holds codes that the C kernels, torch's operations and those of
other processors agree on. Only when a change of codes is intended, write it anew with ::

    python tests/parity/test_seeded_codes.py --write

That draws every case in each of ``VARIANTS``, names the cases on which they differ, and writes
nothing while there are any: such a case needs another seed. Other uses of the script:
``--print [CASE ...]`` prints rows without comparing them, ``--check`` compares all variants.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llamagen import (
    Editor,
    ImageTokenizer,
    Pipeline,
    TokenizerConfig,
    Transformer,
    TransformerConfig,
)

TABLE = Path(__file__).with_name("seeded_codes.json")
FIXTURES = Path(__file__).parent.parent / "fixtures"

Row = dict[str, Any]
"""Of a case: "seeds" of its images, and "codes" (images, rows, columns) as lists."""

VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "kernels, one thread": {"OMP_NUM_THREADS": "1"},
    "kernels, torch for any processor": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "no kernels": {"LLAMAGEN_KERNELS": "off"},
    "no kernels, torch for AVX2": {
        "LLAMAGEN_KERNELS": "off",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "no kernels, torch for any processor": {
        "LLAMAGEN_KERNELS": "off",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "no kernels, MKL for any processor": {
        "LLAMAGEN_KERNELS": "off",
        "MKL_CBWR": "COMPATIBLE",
    },
}
"""What the environment says of the code that computes; the same codes are expected of all."""


# Models


@functools.cache
def pipeline(
    model: str, quantization: str | None = None, kv_cache_dtype: str | None = None
) -> Pipeline:
    """A shipped model or one with a fixture's weights, in float32 on the CPU."""
    if model in ("cifar10", "emoji"):
        pipe = Pipeline.from_pretrained(model, device="cpu", dtype="float32")
    else:
        pipe = fixture_pipeline(model)
    if quantization is not None or kv_cache_dtype is not None:
        pipe.quantize(quantization, kv_cache_dtype=kv_cache_dtype)
    return pipe


def fixture_pipeline(model: str) -> Pipeline:
    """A small transformer; images are not asked of it, so its tokenizer is an untrained one."""
    fixture = {"class": "gpt_c2i_tiny", "grouped": "gpt_c2i_gqa_tiny", "text": "gpt_t2i_tiny"}[
        model
    ]
    info = json.loads((FIXTURES / f"{fixture}.json").read_text())
    public, shapes = info["config"], info["shapes"]
    heads, kv_heads = public["n_head"], None
    if model == "grouped":
        # The fixture has as many key and value heads as query heads; here three queries share one.
        kv_heads = heads // 3
        width = public["dim"] // heads
        for name, shape in shapes.items():
            if name.endswith("wqkv.weight"):
                shape[0] = (heads + 2 * kv_heads) * width
    side = round(public["block_size"] ** 0.5)
    config = TransformerConfig(
        dim=public["dim"],
        layers=public["n_layer"],
        heads=heads,
        kv_heads=kv_heads,
        hidden_dim=shapes["layers.0.feed_forward.w1.weight"][0],
        codebook_size=public["vocab_size"],
        grid=(side, side),
        condition="text" if public["model_type"] == "t2i" else "class",
        num_classes=public.get("num_classes", 1000),
        text_length=public["cls_token_num"],
        text_dim=public.get("caption_dim", 2048),
    )
    weights = seeded().seeded_state_dict(shapes, info["seed"], info["std"])
    transformer = Transformer(config)
    transformer.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    tokenizer = ImageTokenizer(
        TokenizerConfig(
            codebook_size=config.codebook_size,
            codebook_dim=4,
            base_channels=8,
            channel_multipliers=(1, 1),
            encoder_blocks=1,
            decoder_blocks=1,
            z_channels=8,
            norm_groups=4,
        )
    )
    return Pipeline(tokenizer.eval(), transformer.eval(), name=model)


@functools.cache
def seeded() -> ModuleType:
    """The fixtures' module that draws weights."""
    spec = importlib.util.spec_from_file_location("seeded", FIXTURES / "seeded.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def text_features() -> dict[str, Tensor]:
    """Prompts of the text-conditional fixture, padded in front to one length."""
    with np.load(FIXTURES / "gpt_t2i_tiny.npz") as arrays:
        return {
            "prompt_embeds": torch.from_numpy(arrays["caption_features"]),
            "prompt_attention_mask": torch.from_numpy(arrays["caption_mask"]).bool(),
        }


# Requests


@dataclasses.dataclass(frozen=True)
class Case:
    """One call."""

    model: str
    settings: Mapping[str, Any]
    """What the pipeline, or the editor's method, is called with."""
    edit: str | None = None
    """The method of ``Editor``; None for the pipeline itself."""
    quantization: str | None = None
    kv_cache_dtype: str | None = None

    def draw(self, **changes: Any) -> Row:
        """The row of the table, if some settings were other ones."""
        pipe = pipeline(self.model, self.quantization, self.kv_cache_dtype)
        settings = {"output_type": "codes", **self.settings, **changes}
        if self.model == "text":
            settings |= text_features()
        call = pipe if self.edit is None else getattr(Editor(pipe), self.edit)
        output = call(**settings)
        return {"seeds": list(output.seeds), "codes": output.codes.tolist()}


def some_codes(grid: tuple[int, int], codes: int, *, seed: int) -> Tensor:
    """Codes (rows, columns) that no model has drawn."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, codes, grid))


def known(grid: tuple[int, int], codes: int, *, keep: str, seed: int) -> Tensor:
    """Codes (rows, columns) of which some are to be drawn, and therefore -1."""
    found = some_codes(grid, codes, seed=seed)
    rows, columns = grid
    kept = torch.zeros(grid, dtype=torch.bool)
    if keep == "mask":
        kept = torch.from_numpy(np.random.default_rng(seed + 1).random(grid) < 0.4)
    elif keep == "prefix":
        kept.view(-1)[: rows * columns // 2 - columns // 2] = True
    else:
        assert keep == "rows"
        kept[: rows - 1] = True
    return torch.where(kept, found, -1)


def picture(side: int) -> Image.Image:
    """A disc in front of colours that go over into each other; as large as a model's images."""
    y, x = np.mgrid[:side, :side]
    pixels = np.stack([x * 255 // side, y * 255 // side, np.full_like(x, 144)], axis=-1)
    disc = (3 * x - side) ** 2 + (2 * y - side) ** 2 < (side * 2 // 3) ** 2
    pixels[disc] = (236, 196, 70)
    return Image.fromarray(pixels.astype(np.uint8))


def mask(side: int) -> Image.Image:
    """White in the middle."""
    marked = Image.new("L", (side, side))
    marked.paste(255, (side // 4, side // 4, side * 3 // 4, side * 5 // 8))
    return marked


CACHE_SEEDS: dict[str, tuple[list[int], ...]] = {
    "cifar10": ([1005], [1003, 1007]),
    "emoji": ([1000, 1004],),
    "class": ([1012, 1023], [1016, 1027]),
    "grouped": ([1002, 1004], [1002, 1008]),
    "text": ([1000, 1000, 1002, 1000], [1001, 1001, 1001, 1001]),
}
"""Of each model, seeds for a cache in int8, and for weights in int8 with it.

Keys and values are rounded to whole numbers: what the last bit of a float decides there is much
more than that bit, and changes some codes between processors. It changes none of these images.
"""


def cifar10_cases() -> dict[str, Case]:
    """Class-conditional, 8 x 8 of 1024 codes; by default guidance 2.5."""
    classes = ["ship", 3]
    grid, codes = (8, 8), 1024
    raster = {"prompt": classes, "window": 1}

    def case(**settings: Any) -> Case:
        return Case("cifar10", settings)

    def edit(method: str, **settings: Any) -> Case:
        return Case("cifar10", {"image": picture(32), **settings}, edit=method)

    both = {"quantization": "int8", "kv_cache_dtype": "int8"}
    # Draws that hardly differ in probability are rarer at a lower temperature: see CACHE_SEEDS.
    cached = {"prompt": "ship", "window": 1, "temperature": 0.5}
    return {
        "default": case(**raster, seed=0),
        "large seeds": case(prompt="horse", window=1, seed=[2**63 - 1]),
        "guidance 1": case(**raster, seed=10, guidance_scale=1.0),
        "guidance 3": case(**raster, seed=20, guidance_scale=3.0),
        "guidance stop": case(**raster, seed=30, guidance_scale=3.0, guidance_stop=27),
        "greedy": case(**raster, seed=40, temperature=0.0),
        "top-k, top-p": case(**raster, seed=50, temperature=1.2, top_k=100, top_p=0.9),
        "negative": case(**raster, seed=60, negative_prompt="airplane"),
        "blend": case(**raster, seed=70, blend="deer", blend_share=0.3),
        "known mask": case(**raster, seed=80, known_codes=known(grid, codes, keep="mask", seed=1)),
        "known prefix": case(
            **raster, seed=1090, known_codes=known(grid, codes, keep="prefix", seed=2)
        ),
        "known rows": case(**raster, seed=100, known_codes=known(grid, codes, keep="rows", seed=3)),
        "best of 3": case(prompt="dog", seed=110, best_of=3),
        "best of 3 by condition": case(prompt="dog", seed=120, best_of=3, rank_by="condition"),
        "images of each": case(
            prompt=["deer", "bird"], seed=[7, 3, 7, 2**40], num_images_per_prompt=2, window=1
        ),
        "int8": Case("cifar10", {**raster, "seed": 140}, quantization="int8"),
        "int8 cache": Case(
            "cifar10", {**cached, "seed": CACHE_SEEDS["cifar10"][0]}, kv_cache_dtype="int8"
        ),
        "int8, int8 cache": Case(
            "cifar10",
            {**cached, "seed": CACHE_SEEDS["cifar10"][1], "num_images_per_prompt": 2},
            **both,
        ),
        "complete": edit("complete", prompt=classes, seed=170),
        "complete 2 rows": edit("complete", prompt="bird", seed=180, keep_rows=2),
        "inpaint": edit("inpaint", mask=mask(32), prompt="frog", seed=190),
        "inpaint by condition": edit(
            "inpaint", mask=mask(32), prompt="frog", seed=200, best_of=3, rank_by="condition"
        ),
        "outpaint": edit("outpaint", prompt="airplane", seed=210, below=3, right=5),
        "vary": edit("vary", prompt="truck", seed=230, num_images_per_prompt=2),
        "vary, keep 0.2": edit("vary", prompt="truck", seed=240, keep=0.2, best_of=2),
    }


def emoji_cases() -> dict[str, Case]:
    """Text-conditional, 8 x 8 of 4096 codes; by default guidance 2.25 and temperature 0.2."""
    texts = ["red heart", "smiling face with sunglasses and a party hat"]
    grid, codes = (8, 8), 4096
    raster = {"prompt": texts, "window": 1}

    def case(**settings: Any) -> Case:
        return Case("emoji", settings)

    def edit(method: str, **settings: Any) -> Case:
        return Case("emoji", {"image": picture(64), **settings}, edit=method)

    return {
        "default": case(prompt=[*texts, "a dog"], window=1, seed=[4, 1, 2**33]),
        "guidance 1": case(**raster, seed=1010, guidance_scale=1.0, temperature=1.0),
        "guidance stop": case(**raster, seed=20, guidance_scale=3.0, guidance_stop=13),
        "greedy": case(prompt="green apple", window=1, seed=30, temperature=0.0),
        "top-k, top-p": case(**raster, seed=40, temperature=1.0, top_k=200, top_p=0.9),
        "negative": case(**raster, seed=50, negative_prompt="a yellow face"),
        "blend": case(**raster, seed=60, blend="blue circle", blend_share=0.3),
        "blends, negatives": case(
            **raster,
            seed=70,
            temperature=1.0,
            blend=["orange", "an old woman"],
            blend_share=0.3,
            negative_prompt=["heart", "flag: France"],
        ),
        "known mask": case(
            **raster, seed=80, temperature=1.0, known_codes=known(grid, codes, keep="mask", seed=1)
        ),
        "best of 3": case(prompt=texts[0], seed=90, temperature=0.5, best_of=3),
        "images of each": case(
            prompt=texts, seed=[9, 8, 7, 6], num_images_per_prompt=2, window=1, temperature=1.0
        ),
        "int8": Case("emoji", {**raster, "seed": 100}, quantization="int8"),
        "int8 cache": Case(
            "emoji", {**raster, "seed": CACHE_SEEDS["emoji"][0]}, kv_cache_dtype="int8"
        ),
        "complete": edit("complete", prompt=texts[1], seed=120),
        "inpaint": edit("inpaint", mask=mask(64), prompt=texts[0], seed=130, best_of=2),
        "vary": edit("vary", prompt=texts[1], seed=140),
    }


def fixture_cases(model: str) -> dict[str, Case]:
    """Untrained: class-conditional 6 x 6, grouped-query 4 x 4, text-conditional 5 x 5 codes.

    They are drawn in no time, so here are most of the combinations.
    """
    side, codes = {"class": (6, 128), "grouped": (4, 64), "text": (5, 128)}[model]
    grid, images = (side, side), PROMPTS[model]
    prompts: dict[str, Any] = {} if model == "text" else {"prompt": [1, 4, 0]}

    def case(seed: int | list[int], **settings: Any) -> Case:
        return Case(model, {**prompts, "window": 1, "seed": seed, **settings})

    def edited(seed: int, keep: str, **settings: Any) -> Case:
        return case(seed, known_codes=known(grid, codes, keep=keep, seed=seed), **settings)

    def cached(seeds: list[int], **kinds: Any) -> Case:
        same = {} if model == "text" else {"prompt": 1, "num_images_per_prompt": len(seeds)}
        return Case(model, {**same, "window": 1, "seed": seeds}, kv_cache_dtype="int8", **kinds)

    cache_seeds = CACHE_SEEDS[model]
    own_codes = [known(grid, codes, keep=keep, seed=1) for keep in ("mask", "prefix", "rows")]
    own_codes += [torch.full(grid, -1)]
    cases = {
        "default": case(0),
        "guidance 1": case(10, guidance_scale=1.0),
        "guidance 0": case(20, guidance_scale=0.0),
        "guidance stop": case(30, guidance_scale=3.0, guidance_stop=side + 1),
        "guidance stop 0": case(1040, guidance_scale=3.0, guidance_stop=0),
        "greedy": case(50, temperature=0.0, guidance_scale=1.5),
        "greedy, guidance 1": case(60, temperature=0.0, guidance_scale=1.0),
        "temperature": case(70, temperature=0.7),
        "top-k": case(80, guidance_scale=1.5, top_k=20),
        "top-p": case(90, guidance_scale=1.5, top_p=0.7),
        "top-k, top-p": case(100, guidance_scale=1.5, top_k=40, top_p=0.9, temperature=1.3),
        "images of each": case(
            [110 + 3 * index for index in range(2 * images)], num_images_per_prompt=2
        ),
        "known mask": edited(120, "mask"),
        "known prefix": edited(130, "prefix", guidance_scale=1.0),
        "known rows": edited(140, "rows", guidance_stop=3),
        "known of each": case(150, known_codes=torch.stack(own_codes[-images:])),
        "best of 3": case(160, best_of=3),
        "best of 3 by condition": case(170, best_of=3, rank_by="condition"),
        "best of 3, known mask": edited(180, "mask", best_of=3),
        "int8": dataclasses.replace(case(200), quantization="int8"),
        "int8 cache": cached(cache_seeds[0]),
        "int8, int8 cache": cached(cache_seeds[1], quantization="int8"),
    }
    if model != "text":
        blend = {"blend": [2, 3, 3], "blend_share": 0.3}
        cases |= {
            "negative": case(1240, negative_prompt=3),
            "negatives": case(1250, negative_prompt=[2, 2, 3]),
            "blend": case(260, **blend),
            "blend, guidance 1": case(270, **blend, guidance_scale=1.0),
            "blend, negative": case(280, **blend, negative_prompt=2, guidance_stop=side * 2),
            "blend, known mask": edited(290, "mask", **blend),
            "blend, best of 3": case(300, **blend, best_of=3, rank_by="condition"),
        }
    return cases


PROMPTS = {"class": 3, "grouped": 3, "text": 4}
"""Conditions of a call of a fixture's model."""

CASES: dict[str, Case] = {
    f"{model}: {name}": case
    for model, cases in {
        "cifar10": cifar10_cases(),
        "emoji": emoji_cases(),
        **{model: fixture_cases(model) for model in PROMPTS},
    }.items()
    for name, case in cases.items()
}


# Of the models that take longer, some.
IN_PARALLEL = [
    *("cifar10: default", "cifar10: guidance stop", "emoji: default", "emoji: top-k, top-p"),
    *(
        f"{model}: {name}"
        for model in PROMPTS
        for name in (
            *("default", "guidance 1", "guidance stop", "greedy", "top-k, top-p"),
            *("images of each", "int8", "int8 cache"),
        )
    ),
]
WITHOUT_KERNELS = [
    *("cifar10: default", "cifar10: greedy", "cifar10: best of 3", "cifar10: inpaint"),
    *("cifar10: int8, int8 cache", "cifar10: known mask"),
    *("emoji: default", "emoji: top-k, top-p", "emoji: blends, negatives"),
    *(name for name, case in CASES.items() if case.model in PROMPTS),
]


# Tests


@functools.cache
def table() -> dict[str, Row]:
    """What was drawn before, by case."""
    rows: dict[str, Row] = json.loads(TABLE.read_text())
    return rows


def assert_same(row: Row, expected: Row) -> None:
    """Compares a row with the table's, and says where codes differ first."""
    assert row["seeds"] == expected["seeds"]
    codes, before = np.array(row["codes"]), np.array(expected["codes"])
    assert codes.shape == before.shape
    differ = np.argwhere(codes != before)
    places = f"{len(differ)} of {codes.size} codes differ"
    assert not len(differ), f"{places}, the first at (image, row, column) {differ[0].tolist()}"


def test_cases_of_the_table():
    assert list(table()) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_codes(name: str):
    assert_same(CASES[name].draw(), table()[name])


@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("name", IN_PARALLEL)
def test_codes_in_parallel(name: str, window: int | None):
    """Several codes per pass are those that are drawn one by one."""
    assert_same(CASES[name].draw(window=window), table()[name])


@pytest.mark.parametrize(
    "name", ["cifar10: known prefix", "emoji: default", "text: default", "grouped: known of each"]
)
def test_codes_in_batches(name: str):
    """Images are the same alone and among others."""
    assert_same(CASES[name].draw(batch_size=1), table()[name])


@pytest.mark.parametrize("name", ["cifar10: best of 3 by condition", "text: best of 3"])
def test_codes_of_the_best_alone(name: str):
    """The seed of the candidate that was kept draws it again."""
    expected = table()[name]
    assert_same(CASES[name].draw(best_of=1, seed=expected["seeds"]), expected)


def test_codes_without_kernels():
    """Torch's operations draw what the kernels draw; a process chooses when it starts."""
    for name, row in rows_of_variant("no kernels", WITHOUT_KERNELS).items():
        assert row == table()[name], name


# Writing the table


def rows_of_variant(variant: str, names: Iterable[str]) -> dict[str, Row]:
    """Rows that another process draws."""
    environment = {**os.environ, **VARIANTS[variant]}
    command = [sys.executable, __file__, "--print", *names]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows: dict[str, Row] = json.loads(done.stdout)
    return rows


def as_json(rows: Mapping[str, Row]) -> str:
    """One line for each row."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}"
        for name, row in rows.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def disagreements(rows: Mapping[str, Row], expected: Mapping[str, Row]) -> list[str]:
    """Cases that differ, and in how many codes."""
    found = []
    for name, row in rows.items():
        if row != expected[name]:
            codes, before = np.array(row["codes"]), np.array(expected[name]["codes"])
            count = int((codes != before).sum()) if codes.shape == before.shape else codes.size
            found.append(f"{name}: {count} of {codes.size} codes, seeds {row['seeds']}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write the table anew")
    action.add_argument("--check", action="store_true", help="compare all variants with the table")
    action.add_argument("--print", nargs="*", metavar="CASE", help="print rows; by default all")
    options = parser.parse_args()
    if options.print is not None:
        names = options.print or list(CASES)
        print(as_json({name: CASES[name].draw() for name in names}), end="")
        return 0
    expected = table() if options.check else rows_of_variant("default", CASES)
    failed = False
    for variant in VARIANTS:
        if options.write and variant == "default":
            continue
        found = disagreements(rows_of_variant(variant, CASES), expected)
        failed = failed or bool(found)
        print(f"{variant}: {len(found)} of {len(CASES)} cases differ", *found, sep="\n  ")
    if options.write and not failed:
        TABLE.write_text(as_json(expected))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
