"""How a codebook is used."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class CodebookUse(NamedTuple):
    """Of the codes that a set of images became."""

    usage: float
    """Share of the codebook that occurs at all, from 0 to 1."""
    perplexity: float
    """exp of the entropy of the codes' frequencies: as if so many codes were used equally."""


def codebook_use(counts: np.ndarray) -> CodebookUse:
    """Usage and perplexity.

    Args:
        counts: (codebook size,) how often each code occurs, as ``np.bincount`` with ``minlength``
            counts them.

    Raises:
        ValueError: no code occurs.
    """
    total = counts.sum()
    if total == 0:
        raise ValueError("there are no codes")
    frequencies = counts[counts > 0].astype(np.float64) / total
    entropy = -(frequencies * np.log(frequencies)).sum()
    return CodebookUse(usage=float((counts > 0).mean()), perplexity=float(np.exp(entropy)))
