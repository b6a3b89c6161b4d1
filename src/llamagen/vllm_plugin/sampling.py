"""From the logits of both streams to the next code of every request.

Knows torch only; ``processor`` connects it to vLLM's batches. Shapes: B requests, V codes,
I ids of vLLM's vocabulary, T codes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llamagen.config import SamplingConfig
from llamagen.generation.sampling import Rows, Sampler, fastest_sampler, guidance_scale_at
from llamagen.generation.seeds import uniform_draws


@dataclass(frozen=True, eq=False)
class Request:
    """Settings and random numbers of one image."""

    sampling: SamplingConfig
    uniforms: tuple[float, ...]
    """One number in [0, 1) per code."""

    @classmethod
    def of(cls, sampling: SamplingConfig, seed: int, codes: int) -> Request:
        """Return the request for an image of ``codes`` codes."""
        return cls(sampling, tuple(uniform_draws([seed], codes)[0].tolist()))


class CodeSampling:
    """Samples for batches whose requests come, go and change rows.

    Only the settings of the last batch are kept, which usually are those of the next one too.
    """

    def __init__(self, *, codebook_size: int, first_code: int) -> None:
        """For a vocabulary in which code c has the id ``first_code`` + c, and the id before the
        codes ends a sequence.
        """
        self.codebook_size = codebook_size
        self.first_code = first_code
        self._settings: list[SamplingConfig] = []
        self._sampler: Sampler | None = None

    def __call__(
        self, logits: Tensor, requests: Sequence[Request | None], indices: Sequence[int]
    ) -> Tensor:
        """Leave one id per row that can be sampled.

        Args:
            logits: (B, I) float32; the first V are those of the conditional stream, the next V
                those of the unconditional one, if there is one. Overwritten.
            requests: one per row; None for a request that cannot be served. Guided ones need both
                streams.
            indices: which code of its image each row is about to sample.

        Returns:
            (B, I), by ids: 0 for the chosen code, -inf for everything else. A request that cannot
            be served, has all its codes or has logits that are not finite gets the id that ends it.
        """
        count, codes = len(requests), self.codebook_size
        settings, uniforms, served = [_GREEDY] * count, [0.0] * count, [False] * count
        scales = np.ones(count, dtype=np.float32)
        for row, (request, index) in enumerate(zip(requests, indices, strict=True)):
            if request is not None and 0 <= index < len(request.uniforms):
                settings[row], uniforms[row] = request.sampling, request.uniforms[index]
                scales[row] = guidance_scale_at(request.sampling, index, len(request.uniforms))
                served[row] = True
        if self._sampler is None or settings != self._settings:
            self._settings = settings
            self._sampler = fastest_sampler(settings, codes, logits.device)
        each = np.arange(count, dtype=np.int64)
        rows = Rows(each, np.where(scales == 1.0, -1, each), scales)
        start = codes if (scales != 1.0).any() else 0
        conditional, unconditional = logits[:, :codes], logits[:, start : start + codes]
        # Whether all is finite is not asked: that would synchronise with the device at every step.
        drawn, finite = self._sampler(
            conditional, unconditional, rows, _to_device(logits.device, uniforms)
        )
        if not all(served):
            finite &= _to_device(logits.device, served)
        ids = torch.where(finite, drawn + self.first_code, self.first_code - 1)
        return logits.fill_(-torch.inf).scatter_(1, ids.unsqueeze(-1), 0.0)


_GREEDY = SamplingConfig(guidance_scale=1.0, temperature=0.0)


def _to_device(device: torch.device, values: list[float] | list[bool]) -> Tensor:
    """Copy a few numbers to the device, without waiting for it."""
    dtype = torch.bool if isinstance(values[0], bool) else torch.float32
    pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
