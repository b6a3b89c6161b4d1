"""Several rows of an image at the same time: fewer forward passes, and approximately the image.

After Parallel Jacobi Decoding (2606.05703), which drafts several rows of the grid at once under a
row-causal mask. Here rows run as a wavefront: each is ``lag`` columns behind the row above it, and
a pass draws one code of every row that runs, from the condition, its own row so far and the rows
above. Of the row just above, it sees ``lag`` columns further than of its own.

What a row has yet to draw when the next one begins is drafted, all of it in one pass. At each place
whose code is missing, the nearest code above it is fed instead, and the code that this predicts is
the draft of the next place. So something stands at all places before a code, as the model is used
to, and the first code of a row is drawn behind a draft of the row above's last one. Codes take
the places of their drafts as they are drawn, and are not drawn again. With missing places hidden
instead, images were worse (docs/decisions.md).

Nothing is missing with a lag of a whole row; then the codes are those of ``generate_codes``. The
random numbers are always the same ones.

Shapes: B images, R sequences of these, T codes fed in a pass, D codes drawn in it, V codes of the
codebook. Cells are places of the grid, numbered in raster order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.backends.decoder import decoder_for
from llamagen.config import Grid, SamplingConfig
from llamagen.generation.decode import RowCallback, check_finite
from llamagen.generation.draws import Draws
from llamagen.generation.seeds import uniform_draws
from llamagen.generation.sequences import Sequences, sequences_of
from llamagen.generation.slotted import SlottedSequences
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError


class RowParallelCodes(NamedTuple):
    """What ``generate_codes_row_parallel`` has drawn."""

    codes: Tensor
    """(B, rows, columns) int64."""
    passes: int
    """Forward passes, the condition's included: ``generate_codes`` takes one per code."""


@torch.inference_mode()
def generate_codes_row_parallel(
    model: Transformer,
    condition: Tensor,
    *,
    lag: int,
    seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    condition_mask: Tensor | None = None,
    unconditional: Tensor | None = None,
    unconditional_mask: Tensor | None = None,
    grid: Grid | None = None,
    on_row: RowCallback | None = None,
) -> RowParallelCodes:
    """Draws one image's codes per row of ``condition``, several rows of each at the same time.

    Approximate: a code is drawn before some of those in front of it are there. The codes of an
    image depend on its own condition, seed and settings only (up to floating-point ties), and on
    ``lag``.

    Args:
        model: in eval mode, on the device and in the precision to compute in.
        condition: labels (B,) or text features (B, C, text_dim), real features last.
        lag: columns that a row of the grid is behind the row above it, at least 1. An image takes
            ``columns + (rows - 1) * lag`` passes. As many as the grid has, or more, give the codes
            of ``generate_codes``.
        seeds: one per image.
        sampling: how codes are drawn; by default ``SamplingConfig()``.
        condition_mask: (B, C) bool, False where text features are padding.
        unconditional: shaped like ``condition``, what guidance leads away from; by default the
            model's own "no class" or "no text".
        unconditional_mask: (B, C) bool, False where ``unconditional`` is padding; by default
            ``condition_mask``.
        grid: rows and columns; by default the model's.
        on_row: called after each finished row of the grid.

    Raises:
        InputError: condition, seeds, lag or settings do not fit the model or each other.
        NotFiniteError: the model's logits are not finite.
    """
    check_lag(lag)
    sampling = sampling or SamplingConfig()
    rows, columns = grid or model.config.grid
    sequences = sequences_of(
        model,
        condition,
        seeds=seeds,
        sampling=sampling,
        condition_mask=condition_mask,
        unconditional=unconditional,
        unconditional_mask=unconditional_mask,
    )
    images = sequences.images
    uniforms = uniform_draws(seeds, rows * columns).to(model.device)
    codes = torch.zeros(images, rows * columns, dtype=torch.int64, device=model.device)
    finite = torch.ones((), dtype=torch.bool, device=model.device)
    batch = _Batch(model, sequences, sampling, (rows, columns))
    passes = 0
    for step in _steps((rows, columns), lag):
        logits = batch.logits(codes, step)
        drawn, usable = batch.draw(logits, step, uniforms[:, step.drawn])
        codes[:, step.drawn] = drawn
        finite &= usable.all()
        passes += 1
        last = step.drawn[0]  # of the uppermost row, the first one to finish
        if on_row is not None and (last + 1) % columns == 0:
            partial = codes.clone()
            partial[:, last + 1 :] = 0
            on_row((last + 1) // columns, partial.view(images, rows, columns))
    # Looked at once, at the end: a look at every step would wait for the device at every step.
    check_finite(finite, model)
    return RowParallelCodes(codes.view(images, rows, columns), passes)


def check_lag(lag: int) -> None:
    """Raises InputError unless rows can be ``lag`` columns behind each other."""
    if lag < 1:
        raise InputError(f"row_lag is {lag}, expected at least 1 column")


def most_codes_fed(grid: Grid, lag: int) -> int:
    """Codes of an image that a pass is fed at most, T."""
    return max(len(step.cells) for step in _steps(grid, lag))


class _Step(NamedTuple):
    """A pass, of which all lists hold cells but ``by``."""

    cells: list[int]
    """(T,): the places of what is fed."""
    sources: list[int]
    """(T,): whose codes are fed there; others, where those are not there."""
    drawn: list[int]
    """(D,): what is drawn, the uppermost row's code first and drafts last."""
    by: list[int]
    """(D,): which of the codes fed predicts each of these."""


def _steps(grid: Grid, lag: int) -> Iterator[_Step]:
    """The passes of an image; the first is the condition's, which is fed no codes."""
    rows, columns = grid
    lag = min(lag, columns)
    known = {0}
    yield _Step([], [], [0], [0])
    for time in range(1, columns + (rows - 1) * lag):
        step = _Step([], [], [], [])
        for row in range(rows):
            column = time - row * lag
            if 0 <= column < columns:
                _feed(step, row * columns + column - 1)
            elif column == columns and lag < columns and row + 1 < rows:
                # For the rows below to attend to; where rows do not overlap, the next one does it.
                _feed(step, row * columns + column - 1, predicts=False)
        for row in _drafted(time, rows, lag if lag < columns else 0):
            first = row * columns
            for cell in range(first + lag - 1, first + columns - 1):
                if cell not in step.cells:
                    _feed(step, cell)
        step.sources.extend(_source(cell, columns, known) for cell in step.cells)
        known.update(step.drawn)
        yield step


def _drafted(time: int, rows: int, lag: int) -> list[int]:
    """The rows whose missing codes are drafted, because the next row begins."""
    if lag == 0:
        return []
    # The pass before; but there is none of codes before the very first one.
    return [row for row in range(rows - 1) if max((row + 1) * lag - 1, 1) == time]


def _feed(step: _Step, cell: int, *, predicts: bool = True) -> None:
    if predicts:
        step.drawn.append(cell + 1)
        step.by.append(len(step.cells))
    step.cells.append(cell)


def _source(cell: int, columns: int, known: Set[int]) -> int:
    """Whose code is fed at ``cell``: its own, the nearest one above, or the newest of row 0."""
    for above in range(cell, -1, -columns):
        if above in known:
            return above
    return max(other for other in known if other < columns)


class _Batch:
    """The sequences of all images, which are at the same places of their grids."""

    def __init__(
        self, model: Transformer, sequences: Sequences, sampling: SamplingConfig, grid: Grid
    ) -> None:
        self._decoder = decoder_for(model)
        self._stop = sampling.guidance_stop
        self._images = range(sequences.images)
        self._sequences = SlottedSequences(model, self._decoder, sequences, sampling, grid)
        # All cells count as filled: they are, in an order that lengths could not describe.
        self._sequences.slots.advance(grid[0] * grid[1])
        self._draws: dict[object, Draws] = {}
        """By what draws what, as long as the sequences are the same."""

    def logits(self, codes: Tensor, step: _Step) -> Tensor:
        """(R, T, V) behind what a pass is fed, of codes (B, rows * columns)."""
        if not step.cells:
            return self._sequences.first
        unguided = self._stop is not None and step.drawn[0] >= self._stop
        if unguided and self._sequences.drop(lambda _, unconditional: unconditional):
            self._draws.clear()
        images = [image for image, _ in self._sequences.members]
        fed = codes[:, step.sources][images]
        return self._decoder.extend_at(fed, self._sequences.slots, step.cells)

    def draw(self, logits: Tensor, step: _Step, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, D) from logits (R, T, V), and whether these are finite, (B, D) bool."""
        fed = logits.shape[1]
        guided = [self._stop is None or cell < self._stop for cell in step.drawn]
        key = (fed, tuple(step.by), tuple(guided))
        if key not in self._draws:
            self._draws[key] = self._sequences.draws(
                self._images, step.by, fed=fed, guided=lambda _, code: guided[code]
            )
        rows = logits.flatten(0, 1)
        drawn, finite = self._draws[key](rows, rows, uniforms.flatten())
        return drawn.view(uniforms.shape), finite.view(uniforms.shape)
