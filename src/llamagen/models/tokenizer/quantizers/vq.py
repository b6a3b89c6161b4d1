"""Vector quantisation: the nearest vector of a trained codebook (paper section 3.1).

Shapes: B images, E codebook dimension, K codebook size, h x w grid, N = B h w vectors.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.config import TokenizerConfig
from llamagen.models.tokenizer.layers import per_image
from llamagen.models.tokenizer.quantizers import Quantized, Quantizer

_MAX_DISTANCES = 2**25
"""Distances held at once while searching (128 MiB in float32); larger searches go in slices."""
_ENTROPY_TEMPERATURE = 0.01


class VectorQuantizer(Quantizer):
    """A codebook of ``codebook_size`` vectors of length ``codebook_dim``."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.dim = config.codebook_dim
        self.l2_norm = config.codebook_l2_norm
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        weight, limit = self.embedding.weight, 1.0 / config.codebook_size
        nn.init.uniform_(weight, -limit, limit)
        # Normalised if distances are, so that no code starts favoured. Without memory there is
        # nothing to normalise, and torch would import its compiler for it.
        if self.l2_norm and not weight.is_meta:
            with torch.no_grad():
                weight.copy_(F.normalize(weight, dim=-1))

    def codebook(self) -> Tensor:
        """Return the vectors (K, E) as they are compared and looked up, in float32."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.l2_norm else weight

    def compared(self, latents: Tensor) -> Tensor:
        """See ``Quantizer``."""
        latents = latents.float()
        return F.normalize(latents, dim=1) if self.l2_norm else latents

    def forward(self, latents: Tensor) -> Quantized:
        """See ``Quantizer``. In bfloat16 nearby codes would be indistinguishable."""
        with torch.autocast(latents.device.type, enabled=False):
            z, codebook = per_image(self.compared, latents), self.codebook()
            nearest = functools.partial(_nearest, codebook=codebook.detach())
            codes = per_image(nearest, z.detach().movedim(1, -1))
            vectors = F.embedding(codes, codebook).movedim(-1, 1)
            return Quantized(vectors, z, codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """See ``Quantizer``."""
        vectors = F.embedding(codes, self.codebook()).movedim(-1, 1)
        return vectors.to(self.embedding.weight.dtype)

    def losses(self, quantized: Quantized, *, entropy: bool = False) -> dict[str, Tensor]:
        """See ``Quantizer``; the entropy term is MaskGIT's."""
        vectors, z, _ = quantized
        found = {
            "codebook": F.mse_loss(vectors, z.detach()),
            "commitment": F.mse_loss(z, vectors.detach()),
        }
        if entropy:
            with torch.autocast(z.device.type, enabled=False):
                rows = z.movedim(1, -1).reshape(-1, z.shape[1])
                found["entropy"] = _assignment_entropy(rows, self.codebook())
        return found

    @torch.no_grad()
    def replace_codes(self, codes: Tensor, latents: Tensor) -> None:
        """See ``Quantizer``."""
        weight = self.embedding.weight
        weight[codes.to(weight.device)] = latents.to(weight)


def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the row of ``codebook`` (K, E) nearest to each vector of ``z`` (..., E)."""
    rows = z.reshape(-1, z.shape[-1])
    squared = codebook.square().sum(-1)
    step = max(1, _MAX_DISTANCES // codebook.shape[0])
    # |z|^2 is the same for every code, so it is left out of the comparison.
    found = [
        torch.addmm(squared, part, codebook.T, alpha=-2.0).argmin(-1) for part in rows.split(step)
    ]
    return torch.cat(found).view(z.shape[:-1])


def _assignment_entropy(rows: Tensor, codebook: Tensor) -> Tensor:
    """Mean entropy of the soft assignments of latents (N, E), minus that of the mean assignment."""
    squared = rows.square().sum(-1, keepdim=True) + codebook.square().sum(-1)
    distances = squared - 2 * rows @ codebook.T
    log_p = F.log_softmax(-distances / _ENTROPY_TEMPERATURE, dim=-1)
    p = log_p.exp()
    mean_p = p.mean(0)
    return (mean_p * (mean_p + 1e-5).log()).sum() - (p * log_p).sum(-1).mean()
