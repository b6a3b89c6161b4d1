"""One image to be generated, in one value: everything that decides its codes.

Pipeline, editing, server, evaluation and engines make these and pass them on unopened.

Shapes: C condition length, T codes of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from llamagen.config import SamplingConfig

UNKNOWN = -1
"""Stands in known codes where a code is to be sampled."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """One image's condition, seed and settings. An image's codes depend on its request only."""

    condition: Tensor
    """A label (), or text features (C, text_dim) without padding."""
    seed: int
    """Decides, with everything else here, the image's codes; from 0 to 2^63 - 1."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How codes are sampled."""
    negative: Tensor | None = None
    """The condition that guidance leads away from (text features may have another length); by
    default the model's own "no class" or "no text"."""
    blend: Tensor | None = None
    """A second condition, like ``condition``, whose logits are mixed with those of the first:
    probabilities are in proportion to p1^(1 - share) p2^share."""
    blend_share: float = 0.5
    """How much the second condition counts, from 0 to 1."""
    known_codes: Tensor | None = None
    """(T,) or (rows, columns) int64 codes that stay, ``UNKNOWN`` where one is to be sampled."""
    window: int | None = None
    """Codes that a forward pass predicts (``schedules.jacobi``), which changes no code: 1 samples
    them one by one; by default more where that is faster."""

    @property
    def conditions(self) -> list[Tensor]:
        """Those of its conditions that are given."""
        return [each for each in (self.condition, self.negative, self.blend) if each is not None]

    @property
    def condition_length(self) -> int:
        """Positions of the longest condition; a negative one of the model's own is as long."""
        return max(len(each) if each.ndim else 1 for each in self.conditions)

    @property
    def sequences(self) -> int:
        """Sequences of the transformer that it needs, at most."""
        return 1 + self.sampling.guided + (self.blend is not None)
