"""Drafts of codes that become draws from the model: the step of parallel decoding that draws.

A window's drafts, what they were drawn from, and one pass's logits make its codes. On a CPU the
kernels do it, position by position and without sorting; elsewhere torch does.

Shapes: A images that run, R sequences, W positions of a window, T of them in a pass, V codes of the
codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen.config import SamplingConfig
from llamagen.generation.filters import code_probabilities, draw_weighted, guide
from llamagen.kernels import Kernels, library, load_kernels


class Pass(NamedTuple):
    """What a forward pass says of the windows of the running images."""

    logits: Tensor
    """(R, T, V)."""
    conditional: Sequence[int]
    """Of each image, its conditional sequence."""
    unconditional: Sequence[int | None]
    """Of each image, its unconditional sequence, if it still has one."""
    guided: Sequence[int]
    """Of each image, how many of the T positions are guided, the first ones."""


class Couplings(Protocol):
    """Windows of drafts, with what each draft was drawn from."""

    def __call__(self, given: Pass, drafts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Turns drafts into draws from what a pass predicts, changing as few as can be.

        Args:
            given: the pass.
            drafts: (A, T) int64 codes.
            uniforms: (A, T, 2) in [0, 1), which nothing else depends on.

        Returns:
            (A, T) int64 codes, and (A, T) bool, False where the logits are not finite.
        """
        ...

    def move(self, advances: Sequence[int]) -> None:
        """The windows of the images go on by so many positions each.

        What enters them is a guess: a draft that nothing was drawn from.
        """
        ...

    def keep(self, images: Sequence[int]) -> None:
        """Goes on with some of the images."""
        ...


def couplings_for(
    sampling: SamplingConfig, images: int, window: int, codebook_size: int, device: torch.device
) -> Couplings:
    """The fastest way to couple on a device, for windows that hold no drafts yet."""
    fits = codebook_size % library.OUTPUTS == 0 and codebook_size <= library.MOST_CODES
    kernels = load_kernels() if device.type == "cpu" and fits else None
    if kernels is None:
        return TorchCouplings(sampling, images, window, codebook_size, device)
    return KernelCouplings(sampling, images, codebook_size, kernels)


def couple(drafts: Tensor, drawn_from: Tensor, wanted: Tensor, uniforms: Tensor) -> Tensor:
    """Turns draws from one distribution into draws from another, changing as few as can be.

    Args:
        drafts: (A, T) int64 codes.
        drawn_from: (A, T, V) float32, the probabilities they were drawn with; a row of zeros
            where a draft is no draw, and is not to be kept.
        wanted: (A, T, V) float32, the probabilities that the codes shall have.
        uniforms: (A, T, 2) in [0, 1), which nothing else depends on.

    Returns:
        (A, T) int64 codes.
    """
    index = drafts.unsqueeze(-1)
    before = drawn_from.gather(-1, index).squeeze(-1)
    after = wanted.gather(-1, index).squeeze(-1)
    rejected = ~((uniforms[..., 0] * before < after) & (before > 0))
    other, target = drawn_from[rejected], wanted[rejected]  # (rejected, V)
    missing = (target - other).clamp_(min=0)
    # Where the two are the same, rounding may reject a draft and leave nothing to draw from.
    missing = torch.where(missing.sum(-1, keepdim=True) > 0, missing, target)
    codes = drafts.clone()
    codes[rejected] = draw_weighted(missing, uniforms[..., 1][rejected])
    return codes


class TorchCouplings:
    """Couples with torch's operations, on any device."""

    def __init__(
        self,
        sampling: SamplingConfig,
        images: int,
        window: int,
        codebook_size: int,
        device: torch.device,
    ) -> None:
        self._sampling = sampling
        self._window = window
        # (A, W, V); a row of zeros is no distribution.
        self._drawn_from = torch.zeros(images, window, codebook_size, device=device)
        self._codes = torch.zeros(images, window, dtype=torch.int64, device=device)

    def __call__(self, given: Pass, drafts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Couplings``."""
        logits = self._guided(given)
        wanted = code_probabilities(logits, self._sampling)
        codes = couple(drafts, self._drawn_from[:, : drafts.shape[1]], wanted, uniforms)
        # A draft whose distribution is not known is not to be kept.
        self._drawn_from, self._codes = wanted.nan_to_num(0.0), codes
        return codes, logits.isfinite().all(-1)

    def move(self, advances: Sequence[int]) -> None:
        """See ``Couplings``."""
        device, last = self._codes.device, self._codes.shape[1] - 1
        numbers = torch.arange(len(advances), device=device).unsqueeze(1)
        places = torch.arange(self._window, device=device) + _indices(advances, device).unsqueeze(1)
        drafts = self._codes[numbers, places.clamp(max=last)]
        drawn_from = self._drawn_from[numbers, places.clamp(max=last)]
        guessed = places > last
        certain = F.one_hot(drafts[guessed], drawn_from.shape[-1])
        drawn_from[guessed] = certain.to(drawn_from.dtype)
        self._drawn_from = drawn_from

    def keep(self, images: Sequence[int]) -> None:
        """See ``Couplings``."""
        index = _indices(images, self._drawn_from.device)
        self._drawn_from, self._codes = self._drawn_from[index], self._codes[index]

    def _guided(self, given: Pass) -> Tensor:
        """(A, T, V) float32."""
        device = given.logits.device
        own = given.logits[_indices(given.conditional, device)].float()
        guided = [n for n, row in enumerate(given.unconditional) if row is not None]
        if not guided:
            return own
        others = _indices([row for row in given.unconditional if row is not None], device)
        numbers = _indices(guided, device)
        plain = own[numbers]
        mixed = guide(plain, given.logits[others].float(), self._sampling.guidance_scale)
        counts = _indices([given.guided[number] for number in guided], device)
        before = torch.arange(own.shape[1], device=device) < counts.unsqueeze(1)
        own[numbers] = torch.where(before.unsqueeze(-1), mixed, plain)
        return own


class KernelCouplings:
    """Couples with the kernels, on a CPU."""

    def __init__(
        self, sampling: SamplingConfig, images: int, codebook_size: int, kernels: Kernels
    ) -> None:
        self._sampling = sampling
        self._codebook_size = codebook_size
        self._kernels = kernels
        self._started = False
        # Of each image, its rows among what the last pass was drawn with, and where its window is.
        self._numbers = np.arange(images)
        self._offsets = np.zeros(images, dtype=np.int64)
        self._after = torch.empty(0, 0, codebook_size)
        self._spare = torch.empty(0, 0, codebook_size)

    def __call__(self, given: Pass, drafts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Couplings``."""
        logits = given.logits.float().contiguous()
        images, length = drafts.shape
        work = np.zeros((images, length), dtype=library.COUPLING)
        positions = np.arange(length)
        conditional = np.array(given.conditional)[:, None]
        work["conditional"] = _row_addresses(logits, conditional, positions)
        others = np.array([row or 0 for row in given.unconditional])[:, None]
        guided = np.array([row is not None for row in given.unconditional])[:, None]
        guided = guided & (positions < np.array(given.guided)[:, None])
        work["unconditional"] = np.where(guided, _row_addresses(logits, others, positions), 0)
        work["scale"] = self._sampling.guidance_scale
        work["temperature"] = self._sampling.temperature
        work["top_p"], work["top_k"] = self._sampling.top_p, self._sampling.top_k
        places = self._offsets[:, None] + positions
        known = places < self._after.shape[1]
        before = _row_addresses(self._after, self._numbers[:, None], places)
        work["before"] = np.where(known, before, 0)
        work["draft"] = drafts.numpy() if self._started else -1
        if self._spare.shape[0] < images or self._spare.shape[1] != length:
            self._spare = torch.empty(images, length, self._codebook_size)
        work["after"] = _row_addresses(self._spare, np.arange(images)[:, None], positions)
        work["uniforms"] = uniforms.numpy()
        self._kernels.couple_codes(work.reshape(-1), self._codebook_size)
        self._after, self._spare = self._spare, self._after
        self._numbers = np.arange(images)
        self._started = True
        codes = torch.from_numpy(work["code"].copy())
        return codes, torch.from_numpy(work["finite"] != 0)

    def move(self, advances: Sequence[int]) -> None:
        """See ``Couplings``."""
        self._offsets = np.array(advances, dtype=np.int64)

    def keep(self, images: Sequence[int]) -> None:
        """See ``Couplings``."""
        self._numbers, self._offsets = self._numbers[list(images)], self._offsets[list(images)]


def _row_addresses(x: Tensor, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where the rows x[first, second] of a contiguous (N, T, V) tensor begin."""
    rows = (first * x.shape[1] + second) * x.shape[2]
    return (x.data_ptr() + rows * x.itemsize).astype(np.uintp)


def _indices(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
