"""On a CPU, codes and pixels of an image do not depend on the other images of its batch."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamagen.backends.cpu.convolution import accelerate
from llamagen.config import TokenizerConfig
from llamagen.models.tokenizer import ImageTokenizer, model
from llamagen.models.tokenizer.layers import per_image
from tests.backends.variants import processor_flags

# Channels with and without kernels, an odd codebook dimension, vectors compared as they are.
CONFIGS = (
    TokenizerConfig(
        base_channels=32, channel_multipliers=(1, 2, 4), z_channels=128, norm_groups=8,
        codebook_size=1024, encoder_blocks=1, decoder_blocks=1,
    ),
    TokenizerConfig(
        base_channels=16, channel_multipliers=(1, 2), z_channels=16, norm_groups=8,
        codebook_size=64, codebook_dim=5, codebook_l2_norm=False, encoder_blocks=1,
        decoder_blocks=1,
    ),
    TokenizerConfig(
        base_channels=24, channel_multipliers=(1, 1, 3), z_channels=40, norm_groups=4,
        codebook_size=300, codebook_dim=3, encoder_blocks=1, decoder_blocks=1,
    ),
)  # fmt: skip

LIMITS = (
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "LLAMAGEN_KERNELS": "off"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "LLAMAGEN_KERNELS": "off"},
)
"""Limits of the instruction sets that the libraries use."""


@functools.cache
def tokenizer(number: int, dtype: torch.dtype, fast: bool) -> ImageTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(number)
        made = ImageTokenizer(CONFIGS[number]).to(dtype).eval()
    return accelerate(made) if fast else made


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    number=st.integers(0, len(CONFIGS) - 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    fast=st.booleans(),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    count=st.integers(2, 9),
    threads=st.integers(1, 3),
    large=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_image_does_not_depend_on_its_batch(number, dtype, fast, grid, count, threads, large, seed):
    tested = tokenizer(number, dtype, fast)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(tested.config.codebook_size, (count, *grid), generator=generator)
    sides = [side * tested.config.downsampling for side in grid]
    images = torch.rand(count, 3, *sides, generator=generator) * 2 - 1
    before, limit = torch.get_num_threads(), model._LARGE_MAP
    torch.set_num_threads(threads)
    # However large an image is, each way of computing a batch is to give the same.
    model._LARGE_MAP = 0 if large else 2**62
    try:
        for compute, batch in (
            (tested.decode, codes),
            (tested.encode, images),
            (torch.no_grad()(tested.encode_latents), images),
            (torch.inference_mode()(tested.decoder.conv_in), _latents(tested, codes)),
        ):
            together = compute(batch)
            model._LARGE_MAP = 2**62
            alone = torch.cat([compute(image) for image in batch.split(1)])
            assert torch.equal(together, alone), compute
    finally:
        torch.set_num_threads(before)
        model._LARGE_MAP = limit


@torch.inference_mode()
def _latents(tested: ImageTokenizer, codes: torch.Tensor) -> torch.Tensor:
    return tested.post_quant_conv(tested._laid_out(tested.quantize.lookup(codes)))


@pytest.mark.slow
@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: " ".join(limits.values()))
def test_image_does_not_depend_on_its_batch_on_other_processors(limits):
    # A limit above what the processor has: torch alone believes it, and crashes.
    if limits.get("ATEN_CPU_CAPABILITY") == "avx512" and "avx512vl" not in processor_flags():
        pytest.skip("this processor has no AVX-512")
    if limits.get("ATEN_CPU_CAPABILITY") == "avx2" and "avx512f" not in processor_flags():
        pytest.skip("this processor has no more, so the test above is the same")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "test_image_does_not_depend_on_its_batch"],
        env={**os.environ, **limits},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_per_image_has_the_strides_of_one_image():
    x = torch.zeros(3, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert per_image(torch.exp, x)[:1].stride() == per_image(torch.exp, x[:1]).stride()


def test_per_image_keeps_training_and_empty_batches_together():
    calls = []

    def count(x):
        calls.append(len(x))
        return x + 1

    assert per_image(count, torch.zeros(3, 2, requires_grad=True)).requires_grad
    with torch.no_grad():
        assert per_image(count, torch.zeros(0, 2)).shape == (0, 2)
        assert per_image(count, torch.zeros(3, 2, device="meta")).shape == (3, 2)
        per_image(count, torch.zeros(3, 2))
    assert calls == [3, 0, 3, 1, 1, 1]
