"""Several codes of an image per forward pass, distributed as those of ``generate_codes``.

Speculative Jacobi decoding (2410.01699), which here goes on checking behind the first change
(2603.18599). Every image has a window of drafts, guesses at the codes that come next. One forward
pass over a window gives the distribution p of each position; where the draft x was drawn from the
distribution q, a maximal coupling makes it a draw from p: x is kept with probability
min(1, p(x) / q(x)), and otherwise replaced by a draw from what p has more than q. Up to and
including the first code that changed, p was computed from the codes that stand there now, and the
codes are final. Those behind it stay as drafts, now with q = p.

Why that changes nothing: suppose that, given all chance at earlier positions, the draft at a
position is distributed as its q, which is decided by earlier positions. A draft that enters the
window repeats an earlier position's code, so it is so then, with q a certainty; and each coupling
keeps it so, since p is decided by earlier positions too. In which pass a position becomes final is
decided by changes at earlier positions only. So its final code, given the final codes before it,
is a draw from the model's distribution.

Shapes: B images, A of them running, R sequences of these, W positions of a window, T of them in a
pass, V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.config import Grid, SamplingConfig
from llamagen.errors import InputError
from llamagen.generation.couplings import Pass, couplings_for
from llamagen.generation.decode import RowCallback, check_finite
from llamagen.generation.seeds import uniform_draws
from llamagen.generation.sequences import Sequences, sequences_of
from llamagen.transformer import SlotCache, Transformer, decoder_for


class ParallelCodes(NamedTuple):
    """What ``generate_codes_in_parallel`` has drawn."""

    codes: Tensor
    """(B, rows, columns) int64."""
    passes: tuple[int, ...]
    """Per image, the forward passes that it took part in: ``generate_codes`` takes one per code."""


@torch.inference_mode()
def generate_codes_in_parallel(
    model: Transformer,
    condition: Tensor,
    *,
    window: int,
    seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    condition_mask: Tensor | None = None,
    unconditional: Tensor | None = None,
    unconditional_mask: Tensor | None = None,
    grid: Grid | None = None,
    on_row: RowCallback | None = None,
) -> ParallelCodes:
    """Draws one image's codes per row of ``condition``, several of them per forward pass.

    The codes are distributed as those of ``generate_codes``, though the same seed gives other
    ones; at temperature 0 they are the same. Those of an image depend on its own condition, seed,
    settings and the window only (up to floating-point ties).

    Args:
        model: in eval mode, on the device and in the precision to compute in.
        condition: labels (B,) or text features (B, C, text_dim), real features last.
        window: codes of each image that a pass looks at, at least 1. A pass makes as many of
            them final as hold, always one.
        seeds: one per image.
        sampling: how codes are drawn; by default ``SamplingConfig()``.
        condition_mask: (B, C) bool, False where text features are padding.
        unconditional: shaped like ``condition``, what guidance leads away from; by default the
            model's own "no class" or "no text".
        unconditional_mask: (B, C) bool, False where ``unconditional`` is padding; by default
            ``condition_mask``.
        grid: rows and columns; by default the model's.
        on_row: called when all images have finished a row of the grid.

    Raises:
        InputError: condition, seeds, window or settings do not fit the model or each other.
        NotFiniteError: the model's logits are not finite.
    """
    if window < 1:
        raise InputError(f"window is {window}, expected at least 1 code")
    sampling = sampling or SamplingConfig()
    grid = grid or model.config.grid
    sequences = sequences_of(
        model,
        condition,
        seeds=seeds,
        sampling=sampling,
        condition_mask=condition_mask,
        unconditional=unconditional,
        unconditional_mask=unconditional_mask,
    )
    # A pass has no use for more positions than there are codes behind the first.
    window = max(1, min(window, grid[0] * grid[1] - 1))
    batch = _Batch(model, sequences, seeds, sampling, grid, window)
    reported = 0
    while True:
        if on_row is not None:
            for count in range(reported + 1, batch.finished_rows + 1):
                on_row(count, batch.rows(count))
        reported = batch.finished_rows
        if not batch.running:
            break
        batch.step()
    return ParallelCodes(batch.rows(grid[0]), tuple(batch.passes))


class _Batch:
    """Images at different places of their grids, each with a window behind its final codes."""

    def __init__(
        self,
        model: Transformer,
        sequences: Sequences,
        seeds: Sequence[int],
        sampling: SamplingConfig,
        grid: Grid,
        window: int,
    ) -> None:
        """Draws the first code of each image."""
        images = sequences.images
        self.running = list(range(images))
        self.passes = [0] * images
        self._model = model
        self._decoder = decoder_for(model)
        self._seeds = seeds
        self._sampling = sampling
        self._grid = grid
        self._window = window
        self._total = grid[0] * grid[1]
        self._final = [0] * images
        """Of every image, how many codes will not change."""
        self._codes = torch.zeros(images, self._total + window, dtype=torch.int64)
        self._codes = self._codes.to(model.device)
        """Final codes and behind them drafts; those past the image mean nothing."""
        self._couplings = couplings_for(
            sampling, images, window, model.config.codebook_size, model.device
        )
        self._slots = SlotCache.empty(
            model.config,
            len(sequences.condition),
            grid=grid,
            device=model.device,
            dtype=model.dtype,
            spare=window - 1,
        )
        self._sequences: list[tuple[int, bool]] = []
        """What is in the slots: of which image, and whether it is the unconditional one."""
        logits = []
        for members, condition in sequences.by_length():
            logits.append(model.start(condition, self._slots))
            self._sequences += [(row % images, row >= images) for row in members]
        self._update(torch.cat(logits).unsqueeze(1))
        self._drop_finished()

    @property
    def finished_rows(self) -> int:
        """Rows of the grid that all images have."""
        return min(self._final) // self._grid[1]

    def rows(self, count: int) -> Tensor:
        """(B, rows, columns): the first ``count`` rows of all images, zeros behind them."""
        codes = self._codes[:, : self._total].clone()
        codes[:, count * self._grid[1] :] = 0
        return codes.unflatten(1, self._grid)

    def step(self) -> None:
        """One forward pass over the windows of all running images."""
        left = self._total - min(self._final[image] for image in self.running)
        positions = self._positions(min(self._window, left))
        # What is fed stands before what is predicted.
        fed = self._codes[self._index(self.running).unsqueeze(1), positions - 1]  # (A, T)
        number = {image: number for number, image in enumerate(self.running)}
        numbers = self._index([number[image] for image, _ in self._sequences])
        logits = self._decoder.extend(fed[numbers], self._slots)
        advances = dict(zip(self.running, self._update(logits), strict=True))
        self._slots.advance_each([advances[image] for image, _ in self._sequences])
        self._drop_finished()

    def _update(self, logits: Tensor) -> list[int]:
        """Draws what logits (R, T, V) predict; how many codes of each image are final thereby."""
        length = logits.shape[1]
        images, positions = self._index(self.running).unsqueeze(1), self._positions(length)
        drafts = self._codes[images, positions]
        codes, finite = self._couplings(self._pass(logits), drafts, self._uniforms(length))
        self._codes[images, positions] = codes

        left = self._index([self._total - self._final[image] for image in self.running])
        unchanged = (codes == drafts).cumprod(-1).sum(-1)
        final = torch.minimum(unchanged + 1, left.clamp(max=length))
        later = torch.arange(length, device=final.device) >= final.unsqueeze(1)
        check_finite((finite | later).all(), self._model)

        advances = final.tolist()
        for image, advance in zip(self.running, advances, strict=True):
            self._final[image] += advance
            self.passes[image] += 1
        self._couplings.move(advances)
        self._guess(codes, final)
        return advances

    def _guess(self, codes: Tensor, advances: Tensor) -> None:
        """Fills the windows, which have moved by ``advances`` (A,), from a pass's codes (A, T).

        Positions that enter one repeat the pass's last code. Cleverer guesses, as the code above
        in the grid, save no passes.
        """
        images, positions = self._index(self.running).unsqueeze(1), self._positions(self._window)
        numbers = torch.arange(len(images), device=images.device).unsqueeze(1)
        offsets = torch.arange(self._window, device=images.device)
        places = offsets + advances.unsqueeze(1)  # (A, W): where the positions were in the pass
        self._codes[images, positions] = codes[numbers, places.clamp(max=codes.shape[1] - 1)]

    def _pass(self, logits: Tensor) -> Pass:
        """Logits (R, T, V) with what they are of."""
        place = {sequence: index for index, sequence in enumerate(self._sequences)}
        length, stop = logits.shape[1], self._sampling.guidance_stop
        stops = [length if stop is None else stop - self._final[image] for image in self.running]
        return Pass(
            logits,
            conditional=[place[image, False] for image in self.running],
            unconditional=[place.get((image, True)) for image in self.running],
            guided=stops,
        )

    def _uniforms(self, length: int) -> Tensor:
        """(A, T, 2) numbers for this pass, which an image gets whatever else is in the batch."""
        seeds = [self._seeds[image] for image in self.running]
        drawn = uniform_draws(seeds, 2 * length, stream=self.passes[self.running[0]])
        return drawn.unflatten(1, (length, 2)).to(self._model.device)

    def _drop_finished(self) -> None:
        """Ends images that have all codes, and unconditional sequences that are not needed."""
        stop = self._sampling.guidance_stop
        for place in reversed(range(len(self._sequences))):
            image, unconditional = self._sequences[place]
            unguided = unconditional and stop is not None and self._final[image] >= stop
            if self._final[image] == self._total or unguided:
                self._slots.remove(place)
                # The last one takes its place, as in the slots.
                self._sequences[place] = self._sequences[-1]
                self._sequences.pop()
        kept = [n for n, image in enumerate(self.running) if self._final[image] < self._total]
        if len(kept) < len(self.running):
            self._couplings.keep(kept)
            self.running = [self.running[number] for number in kept]

    def _positions(self, length: int) -> Tensor:
        """(A, T): the first positions of each running image whose codes may change."""
        final = self._index([self._final[image] for image in self.running])
        return final.unsqueeze(1) + torch.arange(length, device=final.device)

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)
