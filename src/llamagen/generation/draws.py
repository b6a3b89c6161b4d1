"""Drawing a code of each image of a batch from the logits of its sequences.

What ``filters`` does for one image or ``row_sampling`` for several, behind one face: on a CPU the
kernels do it without sorting the vocabulary, elsewhere torch does; on a GPU that is recorded as a
CUDA graph. Made when a batch changes; then called at every code.

Shapes: B images, R sequences, V codes of the codebook.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llamagen.backends import cuda_graphs
from llamagen.backends.cpu import Kernels, library, load_kernels
from llamagen.backends.cuda_graphs import CudaTape, Recorder
from llamagen.config import SamplingConfig
from llamagen.generation.row_sampling import RowSettings, guide_rows, next_codes_of_rows

_AFTER = 16
"""Draws before they are recorded, which takes as long as a few dozen of them: a server's batch may
have changed by then."""
_MOST_GRAPHS = 4

_idle: dict[torch.device, list[Recorder]] = {}
_numbers = itertools.count()


class Draws(Protocol):
    """Draws for images whose settings do not change."""

    def __call__(
        self, conditional: Tensor, unconditional: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A code of each image.

        Args:
            conditional: (R, V) logits, among them a row of each image.
            unconditional: (R', V) logits, among them a row of each image with guidance; may be
                the same.
            uniforms: (B,) in [0, 1).

        Returns:
            (B,) int64 codes, and (B,) bool, False where an image's logits are not finite.
        """
        ...


def draws_for(
    sampling: Sequence[SamplingConfig],
    conditional: Sequence[int],
    unconditional: Sequence[int | None],
    *,
    codebook_size: int,
    device: torch.device,
) -> Draws:
    """The fastest way to draw on a device.

    Args:
        sampling: of each image.
        conditional: of each image, its row of the conditional logits.
        unconditional: of each image, its row of the unconditional logits; None without guidance.
        codebook_size: V.
        device: where the logits are.
    """
    fits = codebook_size % library.OUTPUTS == 0 and codebook_size <= library.MOST_CODES
    kernels = load_kernels() if device.type == "cpu" and fits else None
    if kernels is not None:
        return KernelDraws(sampling, conditional, unconditional, kernels)
    draws = TorchDraws(sampling, conditional, unconditional, device)
    return GraphDraws(draws, len(sampling), device) if cuda_graphs.wanted(device) else draws


class TorchDraws:
    """Draws with torch's operations, on any device and without waiting for it."""

    def __init__(
        self,
        sampling: Sequence[SamplingConfig],
        conditional: Sequence[int],
        unconditional: Sequence[int | None],
        device: torch.device,
    ) -> None:
        guided = [index for index, row in enumerate(unconditional) if row is not None]
        others = [row for row in unconditional if row is not None]
        self._conditional = _index(conditional, device)
        self._guided = _index(guided, device)
        self._unconditional = _index(others, device)
        scales = [sampling[index].guidance_scale for index in guided]
        self._scales = torch.tensor(scales, dtype=torch.float32, device=device)
        self._settings = RowSettings.of(sampling, device)

    def __call__(
        self, conditional: Tensor, unconditional: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Draws``."""
        mixed = conditional[self._conditional].float()
        if len(self._scales):
            other = unconditional[self._unconditional].float()
            guided = guide_rows(mixed[self._guided], other, self._scales)
            if len(guided) == len(mixed):
                mixed = guided
            else:
                mixed = mixed.clone()
                mixed[self._guided] = guided
        return next_codes_of_rows(mixed, self._settings, uniforms), mixed.isfinite().all(-1)


class GraphDraws:
    """``TorchDraws``, recorded once the same logits' memory has been drawn from a few times."""

    def __init__(
        self, draws: TorchDraws, images: int, device: torch.device, recorder: Recorder | None = None
    ) -> None:
        """Takes over a recorder that nobody uses.

        Args:
            draws: what to record.
            images: B.
            device: where the logits are.
            recorder: one to record with instead, on any device.
        """
        self._draws = draws
        if recorder is None:
            recorder = cuda_graphs.lend(_idle, device, self, lambda: _new_recorder(device))
        self._recorder = recorder
        # Others may have recorded draws with it that are no more, where these are in memory.
        self._number = next(_numbers)
        # Memory made while sampling could not be written to in any other mode.
        with torch.inference_mode(False):
            self._uniforms = torch.zeros(images, device=device)
            self._codes = torch.zeros(images, dtype=torch.int64, device=device)
            self._finite = torch.ones(images, dtype=torch.bool, device=device)

    def __call__(
        self, conditional: Tensor, unconditional: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Draws``."""
        self._uniforms.copy_(uniforms, non_blocking=True)

        def work() -> None:
            codes, finite = self._draws(conditional, unconditional, self._uniforms)
            self._codes.copy_(codes)
            self._finite.copy_(finite)

        places = (_place(conditional), _place(unconditional))
        self._recorder.run((self._number, places), work)
        return self._codes.clone(), self._finite.clone()


class KernelDraws:
    """Draws with the kernels, on a CPU.

    The same codes as torch's, but where a number falls between two codes to the last digit.
    """

    def __init__(
        self,
        sampling: Sequence[SamplingConfig],
        conditional: Sequence[int],
        unconditional: Sequence[int | None],
        kernels: Kernels,
    ) -> None:
        self._kernels = kernels
        self._conditional = np.array(conditional, dtype=np.uintp)
        self._guided = np.array([row is not None for row in unconditional])
        self._unconditional = np.array([row or 0 for row in unconditional], dtype=np.uintp)
        self._draws = np.zeros(len(sampling), dtype=library.DRAW)
        for name, field in (
            ("scale", "guidance_scale"),
            ("temperature", "temperature"),
            ("top_p", "top_p"),
            ("top_k", "top_k"),
        ):
            self._draws[name] = [getattr(each, field) for each in sampling]

    def __call__(
        self, conditional: Tensor, unconditional: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Draws``."""
        conditional, unconditional = _rows_of_floats(conditional), _rows_of_floats(unconditional)
        draws = self._draws
        draws["conditional"] = _addresses(conditional, self._conditional)
        rows = _addresses(unconditional, self._unconditional)
        draws["unconditional"] = np.where(self._guided, rows, 0)
        draws["uniform"] = uniforms.numpy()
        self._kernels.draw_codes(draws, conditional.shape[-1])
        codes = torch.from_numpy(draws["code"].copy())
        return codes, torch.from_numpy(draws["finite"] != 0)


def _new_recorder(device: torch.device) -> Recorder:
    return Recorder(CudaTape(device), most=_MOST_GRAPHS, after=_AFTER)


def _place(x: Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    """Where in memory a tensor is, and how it lies there."""
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _index(rows: Sequence[int], device: torch.device) -> Tensor | slice:
    """How rows are taken out: without a copy where they follow each other."""
    first = rows[0] if rows else 0
    if list(rows) == list(range(first, first + len(rows))):
        return slice(first, first + len(rows))
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _rows_of_floats(logits: Tensor) -> Tensor:
    logits = logits.float()
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _addresses(logits: Tensor, rows: np.ndarray) -> np.ndarray:
    """Where rows of ``logits`` begin."""
    return logits.data_ptr() + rows * np.uintp(logits.stride(0) * logits.itemsize)
