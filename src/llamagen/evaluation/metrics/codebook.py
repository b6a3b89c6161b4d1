"""Use of a codebook."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class CodebookUse(NamedTuple):
    """Use of a codebook by the codes of a set of images."""

    usage: float
    """Share of the codes that occur, from 0 to 1."""
    perplexity: float
    """exp of the entropy of the codes' frequencies: the effective number of codes."""


def codebook_use(counts: np.ndarray) -> CodebookUse:
    """Return usage and perplexity.

    Args:
        counts: (codebook size,) occurrences of each code, by ``np.bincount`` with ``minlength``.

    Raises:
        ValueError: no code occurs.
    """
    total = counts.sum()
    if total == 0:
        raise ValueError("there are no codes")
    frequencies = counts[counts > 0].astype(np.float64) / total
    entropy = -(frequencies * np.log(frequencies)).sum()
    return CodebookUse(usage=float((counts > 0).mean()), perplexity=float(np.exp(entropy)))
