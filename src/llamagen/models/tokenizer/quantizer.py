"""Vector quantisation: latents to the nearest codebook vectors, and the losses that train it.

Shapes: B images, E codebook dimension, K codebook size, h x w grid, N = B h w vectors.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.models.tokenizer.operations import per_image

_MAX_DISTANCES = 2**25
"""Distances held at once while searching (128 MiB in float32); larger searches go in slices."""


class Quantized(NamedTuple):
    """What the quantiser makes of latents."""

    vectors: Tensor
    """(B, E, h, w) chosen codebook vectors, before the straight-through gradient."""
    latents: Tensor
    """(B, E, h, w) latents as they were compared (normalised if the codebook is)."""
    codes: Tensor
    """(B, h, w) int64 codes."""


class QuantizerLosses(NamedTuple):
    """Scalar losses, unweighted (paper section 3.1; entropy term as in MaskGIT)."""

    codebook: Tensor
    """mean((vectors - sg(latents))^2), which moves the codebook."""
    commitment: Tensor
    """mean((sg(vectors) - latents)^2), which moves the encoder."""
    entropy: Tensor
    """Mean entropy of each latent's soft assignment minus the entropy of the mean assignment."""


class VectorQuantizer(nn.Module):
    """A codebook of ``size`` vectors of length ``dim``."""

    def __init__(self, size: int, dim: int, *, l2_norm: bool) -> None:
        super().__init__()
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(size, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/K, then normalised if distances are, so that no code starts favoured."""
        size, weight = self.embedding.num_embeddings, self.embedding.weight
        nn.init.uniform_(weight, -1.0 / size, 1.0 / size)
        # Without memory there is nothing to normalise, and torch would import its compiler for it.
        if self.l2_norm and not weight.is_meta:
            with torch.no_grad():
                weight.copy_(F.normalize(weight, dim=-1))

    def codebook(self) -> Tensor:
        """(K, E) vectors as they are compared and looked up, in float32."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.l2_norm else weight

    def compared(self, latents: Tensor) -> Tensor:
        """Latents (B, E, h, w) as they are compared with the codebook, in float32."""
        latents = latents.float()
        return F.normalize(latents, dim=1) if self.l2_norm else latents

    def forward(self, latents: Tensor) -> Quantized:
        """Quantises ``latents`` (B, E, h, w). Always computed in float32, autocast or not:
        in bfloat16 nearby codes become indistinguishable.
        """
        with torch.autocast(latents.device.type, enabled=False):
            z = per_image(self.compared, latents)
            codebook = self.codebook()
            nearest = functools.partial(self._nearest, codebook=codebook.detach())
            codes = per_image(nearest, z.detach().movedim(1, -1))
            vectors = F.embedding(codes, codebook).movedim(-1, 1)
            return Quantized(vectors, z, codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) to codebook vectors (B, E, h, w), in the codebook's dtype."""
        vectors = F.embedding(codes, self.codebook()).movedim(-1, 1)
        return vectors.to(self.embedding.weight.dtype)

    @staticmethod
    def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
        """Index of the row of ``codebook`` (K, E) nearest to each vector of ``z`` (..., E)."""
        rows = z.reshape(-1, z.shape[-1])
        squared = codebook.square().sum(-1)
        step = max(1, _MAX_DISTANCES // codebook.shape[0])
        # |z|^2 is the same for every code, so it is left out of the comparison.
        found = [
            torch.addmm(squared, part, codebook.T, alpha=-2.0).argmin(-1)
            for part in rows.split(step)
        ]
        return torch.cat(found).view(z.shape[:-1])

    def losses(
        self, quantized: Quantized, *, entropy: bool = False, temperature: float = 0.01
    ) -> QuantizerLosses:
        """The losses of one batch, in float32; the entropy term is 0 unless asked for."""
        vectors, z, _ = quantized
        codebook_loss = F.mse_loss(vectors, z.detach())
        commitment_loss = F.mse_loss(z, vectors.detach())
        entropy_loss = z.new_zeros(())
        if entropy:
            with torch.autocast(z.device.type, enabled=False):
                rows = z.movedim(1, -1).reshape(-1, z.shape[1])
                entropy_loss = _assignment_entropy(rows, self.codebook(), temperature)
        return QuantizerLosses(codebook_loss, commitment_loss, entropy_loss)


def _assignment_entropy(rows: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Entropy term over latents (N, E): confident assignments that use the whole codebook."""
    squared = rows.square().sum(-1, keepdim=True) + codebook.square().sum(-1)
    distances = squared - 2 * rows @ codebook.T
    log_p = F.log_softmax(-distances / temperature, dim=-1)
    p = log_p.exp()
    sample_entropy = -(p * log_p).sum(-1).mean()
    mean_p = p.mean(0)
    mean_entropy = -(mean_p * (mean_p + 1e-5).log()).sum()
    return sample_entropy - mean_entropy
