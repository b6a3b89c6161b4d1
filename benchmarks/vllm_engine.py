"""vLLM with our plugin against a plain loop, our own engine, and vLLM's Llama of the same shape.

Weights are random. An image with guidance is two rows of a batch elsewhere, so vLLM's own Llama
generates two sequences for it: the time of vLLM for this much work, without guidance and grids. All
of them use all processors.

    .venv-vllm/bin/python benchmarks/vllm_engine.py --images 1 4 16 32 --plain-at 16 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Both are read when vLLM is imported. On a machine with two processors vLLM takes one by itself.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from common import median_and_spread, print_table, record, time_in_turn
from plain_loop import plain_codes

from llamagen.config import TRANSFORMER_PRESETS, TransformerConfig, preset
from llamagen.evaluation.speed import SAMPLING
from llamagen.generation import GenerationRequest, generate_codes
from llamagen.models.transformer import Transformer
from llamagen.support.devices import find_device, find_dtype

CACHE_BYTES = 2**31
NAMES = ("plain loop", "llamagen", "vLLM, our plugin", "vLLM, its Llama")


def start_plugin(model: Transformer, max_num_seqs: int, compiled: bool) -> Any:
    """Our plugin with the weights of ``model``."""
    from llamagen.vllm_plugin.engine import VllmEngine

    return VllmEngine(
        model,
        dtype=model.dtype,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=CACHE_BYTES,
        enforce_eager=not compiled,
    )


def start_llama(config: TransformerConfig, max_num_seqs: int, dtype: str, compiled: bool) -> Any:
    """VLLM's own Llama of the same shape, with random weights."""
    from vllm import LLM

    folder = Path(tempfile.mkdtemp(prefix="llama-"))
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.codebook_size,
        "max_position_embeddings": config.num_codes + 1,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=CACHE_BYTES,
        enforce_eager=not compiled,
        enable_prefix_caching=False,
    )


def llama_run(llm: Any, config: TransformerConfig, rows: int) -> Callable[[], object]:
    """Generate as many sequences as guided images have rows, as long as an image's codes."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(
        temperature=1.0,
        top_k=SAMPLING.top_k,
        max_tokens=config.num_codes,
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [TokensPrompt(prompt_token_ids=[row]) for row in range(rows)]
    return lambda: llm.generate(prompts, params, use_tqdm=False)


def measure(
    model: Transformer, plugin: Any, llama: Any, images: int, *, plain: bool, repeats: int
) -> dict[str, list[float]]:
    """Seconds for ``images`` images with guidance, by each of them."""
    labels = torch.arange(images)
    seeds = range(1000)
    calls = 0

    def with_plugin() -> object:
        # Other seeds each time, so that vLLM's prefix cache does not help.
        nonlocal calls
        calls += images
        own = [calls + seed for seed in seeds[:images]]
        requests = [
            GenerationRequest(condition=label, seed=seed, sampling=SAMPLING)
            for label, seed in zip(labels, own, strict=True)
        ]
        return plugin.generate(requests)

    on_device = labels.to(model.device)
    candidates: dict[str, Callable[[], object]] = {}
    if plain:
        count = model.config.num_codes
        candidates["plain loop"] = lambda: plain_codes(model, on_device, count, SAMPLING)
    candidates["llamagen"] = lambda: generate_codes(
        model, on_device, seeds=seeds[:images], sampling=SAMPLING
    )
    candidates["vLLM, our plugin"] = with_plugin
    candidates["vLLM, its Llama"] = llama_run(llama, model.config, 2 * images)
    return time_in_turn(candidates, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="B")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--plain-at", type=int, nargs="*", default=[16])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    arguments = parser.parse_args()
    device = find_device("auto")
    config = preset(TRANSFORMER_PRESETS, arguments.preset)
    model = Transformer(config).to(device, find_dtype(arguments.dtype, device)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    max_num_seqs = 2 * max(arguments.images)
    plugin = start_plugin(model, max_num_seqs, not arguments.eager)
    llama = start_llama(config, max_num_seqs, arguments.dtype, not arguments.eager)
    # vLLM takes threads away from the process that asks it; the native engines run there.
    torch.set_num_threads(os.cpu_count() or 1)
    rows, results = [], []
    for images in arguments.images:
        found = measure(
            model,
            plugin,
            llama,
            images,
            plain=images in arguments.plain_at,
            repeats=arguments.repeats,
        )
        per_code = 1000 / config.num_codes
        theirs = statistics.median(found["vLLM, our plugin"])
        cells = [
            median_and_spread(found[name], unit=per_code) if name in found else "" for name in NAMES
        ]
        ratios = [
            f"{statistics.median(found[name]) / theirs:.2f}" if name in found else ""
            for name in ("plain loop", "llamagen", "vLLM, its Llama")
        ]
        rows.append([f"{images} ({2 * images} rows)", *cells, " / ".join(ratios)])
        results.append({"images": images, "seconds": found})
    header = [
        "images",
        *(f"{name}, ms/code" for name in NAMES),
        "plain / llamagen / Llama over plugin",
    ]
    print_table(header, rows)
    kind = "eager" if arguments.eager else "compiled"
    record(
        f"vllm-{arguments.preset}",
        {
            "preset": arguments.preset,
            "dtype": arguments.dtype,
            "vllm": kind,
            "threads_bind": os.environ["VLLM_CPU_OMP_THREADS_BIND"],
            "runs": results,
        },
    )
    plugin.close()


if __name__ == "__main__":
    main()
