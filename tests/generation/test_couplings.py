"""Couplings of the kernels: those that torch makes, window by window."""

import itertools

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation.couplings import (
    KernelCouplings,
    Pass,
    TorchCouplings,
    couplings_for,
)
from tests.kernels.variants import VARIANTS, kernels_of

CODES, WINDOW = 512, 6
SETTINGS = [
    SamplingConfig(guidance_scale=scale, temperature=temperature, top_k=top_k, top_p=top_p)
    for scale, temperature, top_k, top_p in itertools.product(
        (1.0, 3.0), (0.0, 0.7, 1.0), (0, 20), (1.0, 0.8)
    )
]


def windows(couplings, sampling, passes=8, images=5):
    """The codes of some passes over random logits, whose windows move and whose images end."""
    generator = torch.Generator().manual_seed(0)
    drafts = torch.zeros(images, 1, dtype=torch.int64)
    found = []
    for number in range(passes):
        length = drafts.shape[1]
        rows = 2 * images if sampling.guided else images
        logits = torch.randn(rows, length, CODES, generator=generator) * 2
        # Most of a pass is like the one before, as a model's are.
        logits[:, :, :8] += 6
        unconditional = range(images, rows) if sampling.guided else [None] * images
        guided = [length - row % 3 for row in range(images)]
        uniforms = torch.rand(images, length, 2, generator=generator)
        given = Pass(logits, range(images), list(unconditional), guided)
        codes, finite = couplings(given, drafts, uniforms)
        assert finite.all()
        found.append(codes)
        advances = [1 + (row + number) % length for row in range(images)]
        couplings.move(advances)
        places = torch.arange(WINDOW) + torch.tensor(advances).unsqueeze(1)
        drafts = codes.gather(1, places.clamp(max=length - 1))
        if number == 4:
            kept = [0, 2, 4]
            couplings.keep(kept)
            drafts, images = drafts[kept], 3
        if number == 6:
            drafts = drafts[:, :3]  # near the end of the images
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_codes(variant):
    same = []
    for sampling in SETTINGS:
        ours = KernelCouplings(sampling, 5, CODES, kernels_of(variant))
        theirs = TorchCouplings(sampling, 5, WINDOW, CODES, torch.device("cpu"))
        for a, b in zip(windows(ours, sampling), windows(theirs, sampling), strict=True):
            same.append((a == b).flatten())
    # A number can fall between two codes to the last digit, and the window then goes on from there.
    assert torch.cat(same).float().mean() > 0.99


def test_logits_that_are_not_finite_are_named():
    sampling = SamplingConfig(guidance_scale=1.0)
    logits = torch.zeros(2, 3, CODES)
    logits[1, 1, 7] = torch.nan
    given = Pass(logits, range(2), [None] * 2, [3, 3])
    for couplings in (
        KernelCouplings(sampling, 2, CODES, kernels_of("native")),
        TorchCouplings(sampling, 2, 3, CODES, torch.device("cpu")),
    ):
        drafts, uniforms = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3, 2), 0.5)
        codes, finite = couplings(given, drafts, uniforms)
        assert finite.tolist() == [[True] * 3, [True, False, True]]
        assert 0 <= codes.min()
        assert codes.max() < CODES
        # What is not known is not kept in the next pass, whatever comes.
        couplings.move([0, 0])
        sure = torch.zeros(2, 3, CODES)
        sure[:, :, 9] = 100.0
        codes, finite = couplings(Pass(sure, range(2), [None] * 2, [3, 3]), codes, uniforms)
        assert finite.all()
        assert (codes == 9).all()


def test_small_codebooks_are_left_to_torch():
    sampling = SamplingConfig()
    assert isinstance(couplings_for(sampling, 1, 4, 6, torch.device("cpu")), TorchCouplings)
