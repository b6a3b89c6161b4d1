"""From the logits of both streams to the next code of every request.

Knows torch only; ``processor`` connects it to vLLM's batches. Shapes: B requests, V codes,
I ids of vLLM's vocabulary, T codes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamagen.config import SamplingConfig
from llamagen.generation.draws import Draws, draws_for
from llamagen.generation.seeds import uniform_draws


@dataclass(frozen=True, eq=False)
class Request:
    """What decides the codes of one image, apart from its logits."""

    sampling: SamplingConfig
    uniforms: tuple[float, ...]
    """One number in [0, 1) per code."""

    @classmethod
    def of(cls, sampling: SamplingConfig, seed: int, codes: int) -> Request:
        """The request for an image of ``codes`` codes."""
        return cls(sampling, tuple(uniform_draws([seed], codes)[0].tolist()))

    def scale(self, index: int) -> float:
        """Guidance scale of the code with this index; 1 where it is not guided."""
        stop = self.sampling.guidance_stop
        return self.sampling.guidance_scale if stop is None or index < stop else 1.0


class CodeDraw:
    """Draws for batches whose requests come, go and change places.

    Nothing about a request is remembered but the settings of the last batch, which usually is the
    next one too.
    """

    def __init__(self, *, codebook_size: int, first_code: int) -> None:
        """For a vocabulary in which code c has the id ``first_code`` + c, and the id before the
        codes ends a sequence.
        """
        self.codebook_size = codebook_size
        self.first_code = first_code
        self._drawn: list[tuple[SamplingConfig, bool]] = []
        self._draws: Draws | None = None

    def __call__(
        self, logits: Tensor, requests: Sequence[Request | None], indices: Sequence[int]
    ) -> Tensor:
        """Leaves one id per row that can be drawn.

        Args:
            logits: (B, I) float32; the first V are those of the conditional stream, the next V
                those of the unconditional one, if there is one. Overwritten.
            requests: one per row; None for a request that cannot be served. Guided ones need both
                streams.
            indices: which code of its image each row is about to draw.

        Returns:
            (B, I), by ids: 0 for the chosen code, -inf for everything else. A request that cannot
            be served, has all its codes or has logits that are not finite gets the id that ends it.
        """
        serving = [
            request is not None and 0 <= index < len(request.uniforms)
            for request, index in zip(requests, indices, strict=True)
        ]
        sampled, uniforms = [], []
        for request, index, served in zip(requests, indices, serving, strict=True):
            if served and request is not None:
                sampled.append((request.sampling, request.scale(index) != 1.0))
                uniforms.append(request.uniforms[index])
            else:
                sampled.append((_GREEDY, False))
                uniforms.append(0.0)
        conditional = logits[:, : self.codebook_size]
        unconditional = logits[:, self.codebook_size : 2 * self.codebook_size]
        draw = self._draws_of(sampled, logits.device)
        # Whether all is finite is not looked at: that would wait for the device at every step.
        codes, usable = draw(conditional, unconditional, _on(logits.device, uniforms))
        if not all(serving):
            usable &= _on(logits.device, serving)
        ids = torch.where(usable, codes + self.first_code, self.first_code - 1)
        return logits.fill_(-torch.inf).scatter_(1, ids.unsqueeze(-1), 0.0)

    def _draws_of(self, sampled: list[tuple[SamplingConfig, bool]], device: torch.device) -> Draws:
        if self._draws is None or sampled != self._drawn:
            self._drawn = sampled
            self._draws = draws_for(
                [sampling for sampling, _ in sampled],
                range(len(sampled)),
                [row if guided else None for row, (_, guided) in enumerate(sampled)],
                codebook_size=self.codebook_size,
                device=device,
            )
        return self._draws


_GREEDY = SamplingConfig(guidance_scale=1.0, temperature=0.0)


def _on(device: torch.device, values: list[float] | list[bool]) -> Tensor:
    """A few numbers on the device, without waiting for it."""
    on_host = torch.tensor(values)
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)
