"""A decoding step of llama.cpp against one of ours, in milliseconds, by rows and precision.

A Llama of the preset's shape with random weights is written as GGUF, in bfloat16 and in q8_0
(beside which ours has int8), and decoded with ``llama-batched-bench``: ``llama-bench`` itself knows
one sequence only. Both compute logits of as many sequences as there are rows (a guided image is
two), from one position up to an image's codes, and neither samples from them. All run in turn, with
as many threads.

Needs llama.cpp's program, on the path or given, and ``pip install gguf``. So far this has run only
with a stand-in for that program: sixty lines that take its arguments, call llama.cpp's library (of
llama-cpp-python 0.3.36, compiled for the machine) as it does, and print the same numbers.

    python benchmarks/llama_cpp.py --batched-bench llama.cpp/build/bin/llama-batched-bench
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import median_and_spread, print_table, record
from torch import Tensor

from llamagen.backends import fastest_step
from llamagen.config import TRANSFORMER_PRESETS, TransformerConfig, preset
from llamagen.models.transformer import NO_CELL, Tokens, Transformer
from llamagen.models.transformer.quantization import quantize

PROGRAM = "llama-batched-bench"
PRECISIONS = {"bf16": "bfloat16", "q8_0": "int8"}
"""llama.cpp's names, and ours."""

Seconds = dict[int, float]
"""Of a step, by the number of rows."""


def write_gguf(path: Path, config: TransformerConfig, kind: str) -> None:
    """A Llama of the shape of ``config`` with random weights and no tokenizer."""
    import gguf

    precision = {
        "bf16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }[kind]
    files = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(files[kind])
    writer.add_context_length(config.num_codes)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.codebook_size)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)

    def add_matrix(name: str, outputs: int, inputs: int) -> None:
        weight = rng.standard_normal((outputs, inputs), dtype=np.float32) * np.float32(0.02)
        packed = gguf.quants.quantize(weight, precision)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=precision)

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(config.dim, dtype=np.float32))

    kv_width = config.num_kv_heads * config.head_dim
    add_matrix("token_embd", config.codebook_size, config.dim)
    for layer in range(config.layers):
        block = f"blk.{layer}"
        add_norm(f"{block}.attn_norm")
        add_matrix(f"{block}.attn_q", config.dim, config.dim)
        add_matrix(f"{block}.attn_k", kv_width, config.dim)
        add_matrix(f"{block}.attn_v", kv_width, config.dim)
        add_matrix(f"{block}.attn_output", config.dim, config.dim)
        add_norm(f"{block}.ffn_norm")
        add_matrix(f"{block}.ffn_gate", config.ffn_dim, config.dim)
        add_matrix(f"{block}.ffn_up", config.ffn_dim, config.dim)
        add_matrix(f"{block}.ffn_down", config.dim, config.ffn_dim)
    add_norm("output_norm")
    add_matrix("output", config.codebook_size, config.dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_seconds(program: str, model: Path, codes: int, rows: Sequence[int]) -> Seconds:
    """Time of a step of llama.cpp, in the mean over an image's codes."""
    threads = str(torch.get_num_threads())
    given = {
        "-m": model,
        "-c": max(rows) * codes,
        "-npp": 1,
        "-ntg": codes - 1,
        "-npl": ",".join(map(str, rows)),
        "-t": threads,
        "-tb": threads,
        "-ngl": 0,
        "--output-format": "jsonl",
    }
    command = [program, *(str(part) for pair in given.items() for part in pair)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"{program} cannot be run: {error.strerror}") from error
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    seconds = {line["pl"]: line["t_tg"] / line["tg"] for line in lines}
    if done.returncode or any(count not in seconds for count in rows):
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise SystemExit(f"{program} ended with {done.returncode} and said {said!r}")
    return seconds


@torch.inference_mode()
def own_seconds(model: Transformer, rows: Sequence[int]) -> Seconds:
    """Time of a step of ours, in the mean over an image's codes."""
    config = model.config
    count = config.num_codes - 1
    compute = fastest_step(model)
    seconds = {}
    for number in rows:
        cache = model.new_cache(number, 1 + config.num_codes)
        cache.add(number)
        classes = torch.arange(number) % config.num_classes + config.codebook_size
        compute(tokens_of(classes, 0, NO_CELL), cache, config.grid)
        codes = torch.randint(config.codebook_size, (count, number))
        start = time.perf_counter()
        for index, step in enumerate(codes):
            cache.lengths = [index + 1] * number
            compute(tokens_of(step, index + 1, index), cache, config.grid)
        seconds[number] = (time.perf_counter() - start) / count
    return seconds


def tokens_of(ids: Tensor, position: int, cell: int) -> Tokens:
    """One token of each sequence."""
    rows = np.arange(len(ids))
    return Tokens(
        ids=ids,
        sequences=rows.astype(np.int32),
        positions=np.full(len(ids), position, np.int32),
        cells=np.full(len(ids), cell, np.int32),
        wanted=rows,
    )


def own_model(config: TransformerConfig, precision: str) -> Transformer:
    """A model with random weights, in bfloat16 or int8."""
    torch.manual_seed(0)
    model = Transformer(config).bfloat16().eval()
    if precision == "int8":
        quantize(model, precision)
    return model


def find_program(given: str | None) -> str:
    """Return the path of llama.cpp's program.

    Raises:
        SystemExit: it is not there, or the package gguf is not.
    """
    found = shutil.which(given or PROGRAM)
    if found is None:
        where = f"there is no program {given}" if given else f"{PROGRAM} is not on the path"
        raise SystemExit(f"{where}; build llama.cpp and give --batched-bench its {PROGRAM}")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise SystemExit("the package gguf is not installed; pip install gguf") from error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batched-bench", help=f"llama.cpp's {PROGRAM}; by default on the path")
    parser.add_argument("--preset", default="B", choices=TRANSFORMER_PRESETS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 16, 64])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if min(arguments.rows) < 1 or arguments.repeats < 1:
        parser.error("--rows and --repeats must be at least 1")
    program = find_program(arguments.batched_bench)
    config = preset(TRANSFORMER_PRESETS, arguments.preset)
    times: dict[str, list[Seconds]] = {}
    with tempfile.TemporaryDirectory(prefix="llama-") as folder:
        files = {kind: Path(folder) / f"{kind}.gguf" for kind in arguments.precisions}
        models = {kind: own_model(config, PRECISIONS[kind]) for kind in files}
        for kind, path in files.items():
            write_gguf(path, config, kind)
        for _ in range(arguments.repeats):
            for kind, path in files.items():
                theirs = llama_seconds(program, path, config.num_codes, arguments.rows)
                times.setdefault(f"llama.cpp, {kind}", []).append(theirs)
                own = own_seconds(models[kind], arguments.rows)
                times.setdefault(f"llamagen, {PRECISIONS[kind]}", []).append(own)
    print(f"preset {arguments.preset}, {config.num_codes} codes, ms for a step without sampling")
    names = list(times)
    rows: list[list[str]] = []
    results: list[dict[str, Any]] = []
    for number in arguments.rows:
        seconds = {name: [found[number] for found in times[name]] for name in names}
        medians = [statistics.median(values) for values in seconds.values()]
        ratios = [f"{a / b:.2f}" for a, b in zip(medians[0::2], medians[1::2], strict=True)]
        cells = [median_and_spread(values, unit=1000) for values in seconds.values()]
        rows.append([str(number), *cells, " / ".join(ratios)])
        results.append({"rows": number, "seconds_per_step": seconds})
    print_table(["rows", *names, "llama.cpp / llamagen"], rows)
    record(f"llama-cpp-{arguments.preset}", results)


if __name__ == "__main__":
    main()
