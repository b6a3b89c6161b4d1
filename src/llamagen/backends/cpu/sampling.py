"""Sampling codes from logits in C, without sorting the vocabulary.

Shapes: D rows, one per code that is sampled, V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llamagen.backends.cpu import library
from llamagen.backends.cpu.library import Kernels, load_kernels
from llamagen.config import SamplingConfig, non_default_fields


@dataclass(slots=True)
class Rows:
    """Logits that decide each of D codes, and how guidance mixes them."""

    conditional: np.ndarray
    """(D,) int64, rows of the conditional logits."""
    unconditional: np.ndarray
    """(D,) int64, rows of the unconditional logits; -1 without guidance."""
    scales: np.ndarray
    """(D,) float32 guidance scales."""


class CpuSampler:
    """Samples codes of rows whose filters do not change from call to call.

    The same codes as the reference's, except where a uniform number falls between two codes to the
    last digit.
    """

    FIELDS = frozenset(
        {
            *("guidance_scale", "guidance_schedule", "guidance_start", "guidance_power"),
            *("guidance_stop", "temperature", "top_k", "top_p", "min_p", "steps"),
            "generation_order",
        }
    )
    """Fields of ``SamplingConfig`` that are implemented; those of guidance by the scales that are
    given for each call, and those of schedules by the codes that are asked for."""

    def __init__(
        self, settings: Sequence[SamplingConfig], *, kernels: Kernels | None = None
    ) -> None:
        """Prepare sampling with settings (D,) that ``supports`` accepts.

        ``kernels`` are by default those for this machine.
        """
        kernels = load_kernels() if kernels is None else kernels
        assert kernels is not None, "the kernels cannot be compiled here"
        self._kernels = kernels
        self._rows = np.zeros(len(settings), dtype=library.SAMPLING_ROW)
        for name in ("temperature", "top_p", "min_p"):
            self._rows[name] = [getattr(each, name) for each in settings]
        # More than all codes are all of them.
        self._rows["top_k"] = [max(0, min(each.top_k, library.MAX_CODES)) for each in settings]

    @classmethod
    def supports(
        cls, settings: Sequence[SamplingConfig], codebook_size: int, device: torch.device
    ) -> bool:
        """Whether there are kernels here, and they do what the settings say."""
        return (
            device.type == "cpu"
            and codebook_size % library.OUTPUTS == 0
            and codebook_size <= library.MAX_CODES
            and not any(non_default_fields(each, cls.FIELDS) for each in settings)
            and load_kernels() is not None
        )

    def __call__(
        self, conditional: Tensor, unconditional: Tensor, rows: Rows, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sample one code per row, with ``uniforms`` (D,) in [0, 1) and logits (R, V) and (R', V).

        Returns (D,) int64 codes, and (D,) bool, False where logits are not finite.
        """
        own, count, codes = self._rows, len(self._rows), conditional.shape[-1]
        if codes % library.OUTPUTS or not 0 < codes <= library.MAX_CODES:
            raise ValueError(f"logits of {codes} codes, expected a multiple of {library.OUTPUTS}")
        if rows.scales.shape != (count,) or uniforms.shape != (count,):
            raise ValueError(f"{len(uniforms)} numbers, expected one for each of {count} rows")
        # The addresses are of these, which are copies where they are not as the kernels take them.
        first, second = _float_rows(conditional), _float_rows(unconditional)
        own["conditional"] = _addresses(first, codes, rows.conditional, count)
        guided = (rows.unconditional >= 0) & (rows.scales != 1.0)
        others = np.where(guided, rows.unconditional, 0)
        own["unconditional"] = np.where(guided, _addresses(second, codes, others, count), 0)
        own["guidance_scale"] = rows.scales
        own["uniform"] = uniforms.numpy()
        self._kernels.sample_codes(own, codes, max(1, min(torch.get_num_threads(), count)))
        return torch.from_numpy(own["code"].copy()), torch.from_numpy(own["finite"] != 0)


def _float_rows(logits: Tensor) -> Tensor:
    logits = logits.float()
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _addresses(logits: Tensor, codes: int, rows: np.ndarray, count: int) -> np.ndarray:
    """Where rows of ``logits`` begin."""
    library.check_indices(rows, count, 0, len(logits), "rows of logits")
    return library.row_addresses(logits, torch.float32, codes)[rows]
