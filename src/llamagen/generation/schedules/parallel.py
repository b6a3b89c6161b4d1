"""Several codes per pass, in any order (RandAR, 2412.01827, section 3.4).

Each code has a query, a token of its cell whose logits predict the code there. A pass feeds the
queries of a group of cells and samples all of them at once: query j sees the queries before it, but
no code of its group. The next pass brings what the cache holds into the order of training, which
has every code right behind its query: of the last group only the first query stays, and its codes
are fed with the other queries between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from llamagen.config import Grid
from llamagen.generation.schedules.base import Pass

_MAX_KNOWN = 64
"""Known codes fed in one pass."""
_REPULSION = (4, 3, 2)
"""Cells of a group are this far from each other in rows or in columns, if they can (2507.01957)."""
_MIN_PROXIMITY = 1.0
"""Sum of 1 / distance to the neighbours drawn before, from which a cell counts as near."""


def default_steps(total: int) -> int:
    """Return the passes for ``total`` codes by default: 88 for 256, as published."""
    return max(1, round(total * 88 / 256))


def group_sizes(total: int, steps: int) -> list[int]:
    """Return the number of codes of each of ``steps`` passes, few at first: ``total`` in all.

    After pass s of S, counted from 0, 1 - cos(pi / 2 * (s + 1) / S) of the codes are drawn (and one
    more, rounded down), but a single one by the first pass, and at least one by each.
    """
    drawn = [0, 1 if steps > 1 else total]
    for step in range(1, steps):
        share = 1.0 - math.cos(math.pi / 2 * (step + 1) / steps)
        drawn.append(min(total, max(drawn[-1] + 1, int(share * total + 1))))
    return [after - before for before, after in pairwise(drawn)]


def sizes_after(known: int, total: int, steps: int) -> list[int]:
    """Return the sizes of the groups that are left where ``known`` codes are given beforehand."""
    ends = [end for end in accumulate(group_sizes(total, steps)) if end > known]
    return [end - start for start, end in pairwise([known, *ends])]


def random_order(known: Sequence[bool], priority: np.ndarray) -> list[int]:
    """Return all cells, those known first; the others by ``priority`` (T,), random numbers."""
    return np.lexsort((priority, np.logical_not(known))).tolist()


def local_order(
    grid: Grid, known: Sequence[bool], sizes: Sequence[int], priority: np.ndarray
) -> list[int]:
    """Return all cells, those known first, in groups near to what is drawn and far from each other.

    Locality-aware (2507.01957, section 3.3): codes of one group are drawn independently of each
    other, so they should depend on what is drawn already, and not on each other.

    Args:
        grid: rows and columns.
        known: (T,) the cells that are drawn already.
        sizes: cells of each group of the others.
        priority: (T,) random numbers, which decide between cells that are as good.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    down, right = np.abs(rows[:, None] - rows), np.abs(columns[:, None] - columns)
    apart, distance = np.maximum(down, right), down**2 + right**2
    nearness = np.where(apart == 1, 1.0 / np.sqrt(np.maximum(distance, 1)), 0.0)
    is_drawn = np.array(known, dtype=bool)
    order = np.flatnonzero(is_drawn).tolist()
    for size in sizes:
        # Rounded: what is equal must be so on every processor.
        proximity = nearness[:, is_drawn].sum(axis=1).round(6)
        near = np.flatnonzero(~is_drawn & (proximity >= _MIN_PROXIMITY))
        near = near[np.lexsort((priority[near], -proximity[near]))]
        group: list[int] = []
        for repulsion in _REPULSION:
            for cell in near:
                if len(group) < size and (apart[cell, group] >= repulsion).all():
                    group.append(int(cell))
        is_free = ~is_drawn
        is_free[group] = False
        while len(group) < size:
            # The cell that is farthest from the group, or any where there is none yet.
            gap = distance[:, group].min(axis=1) if group else np.zeros(len(is_free))
            free = np.flatnonzero(is_free)
            farthest = int(free[np.lexsort((priority[free], -gap[free]))[0]])
            group.append(farthest)
            is_free[farthest] = False
        is_drawn[group] = True
        order += group
    return order


class ParallelSchedule:
    """Samples groups of codes, each in one pass; known codes are fed first."""

    needs_codes = False

    def __init__(self, order: Sequence[int], sizes: Sequence[int]) -> None:
        """Start an image whose cells come in ``order``: known ones, then groups of ``sizes``."""
        self.order = order
        self.final = len(order) - sum(sizes)
        self._ends = accumulate(sizes, initial=self.final)
        self._end = next(self._ends)
        self._fed = 0
        """Codes in the cache, each behind its query."""
        self._is_asked = False
        """Whether the cache also holds the query of the next code."""

    def first_pass(self) -> Pass:
        """See ``Schedule``."""
        return self._pass()

    def next_pass(self, max_tokens: int) -> Pass:
        """See ``Schedule``."""
        del max_tokens
        return self._pass()

    def _pass(self) -> Pass:
        waiting = self.final - self._fed
        # A group that this image has drawn is fed as a whole: it counts as one of the passes.
        count = waiting if self._is_asked else min(waiting, _MAX_KNOWN)
        fed = self.order[self._fed : self._fed + count]
        pairs = [cell for cell in fed for _ in range(2)][self._is_asked :]
        self._fed += len(fed)
        self._tokens = len(pairs)
        if self._fed == self.final:
            self._end = next(self._ends, self.final)
        group = self.order[self.final : self._end]
        asking = range(len(pairs), len(pairs) + len(group))
        queries = [*range(self._is_asked, len(pairs), 2), *asking]
        return Pass((*pairs, *group), group, asking, queries=queries, drawn=self.final)

    def accept(self, codes: Sequence[int]) -> int:
        """See ``Schedule``."""
        del codes
        self._is_asked = self._end > self.final
        self.final = self._end
        return self._tokens + self._is_asked
