"""Several codes of an image per forward pass, and the same codes as ``generate_codes``.

Jacobi decoding (2410.01699) with fixed random numbers. Every image has a window of drafts, guesses
at the codes that come next. One forward pass over a window gives the distribution of each position,
and each position draws from it with the very number that ``generate_codes`` draws it with. Up to
and including the first code that changed, distributions were computed from the codes that stand
there now: these codes are final. Those behind it stay as drafts for the next pass (2603.18599 goes
on behind the first change too).

Why that changes nothing: given an image's random numbers, each of its codes is a function of the
codes before it, and a code becomes final when that function has been computed from final codes. So
codes are those drawn one by one, up to floating-point ties, and distributed exactly like them. That
drafts hold, though distributions change with what stands before, is because a number that draws a
code from one distribution mostly draws it from a similar one too.

Shapes: B images, A of them running, R sequences of these, W positions of a window, T of them in a
pass, V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llamagen.backends.decoder import CpuDecoder, decoder_for
from llamagen.config import Grid, SamplingConfig
from llamagen.generation.decode import RowCallback, not_finite
from llamagen.generation.draws import Draws
from llamagen.generation.seeds import uniform_draws
from llamagen.generation.sequences import Sequences, sequences_of
from llamagen.generation.slotted import SlottedSequences
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError

_MOST_ROWS = 32
"""Rows of a pass up to which its time, with tiles, grows much more slowly than their number."""
_PER_CODE = 4.0
"""Positions of a window for each code that a pass has lately made final."""
_TRIALS = 12
"""Passes after which it is known whether drafts hold."""
_LEAST = 1.25
"""Codes per pass that a window has to bring to be worth its time."""


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
    window: int | None = None,
    seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    condition_mask: Tensor | None = None,
    unconditional: Tensor | None = None,
    unconditional_mask: Tensor | None = None,
    grid: Grid | None = None,
    on_row: RowCallback | None = None,
) -> ParallelCodes:
    """Draws one image's codes per row of ``condition``, several of them per forward pass.

    The codes are those of ``generate_codes`` for the same seeds, up to floating-point ties.

    Args:
        model: in eval mode, on the device and in the precision to compute in.
        condition: labels (B,) or text features (B, C, text_dim), real features last.
        window: codes of each image that a pass looks at, at least 1. A pass makes as many of
            them final as hold, always one. By default it grows where drafts hold and ends where
            they do not.
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
    if window is not None and window < 1:
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


def looking_ahead_pays(model: Transformer, images: int, sampling: SamplingConfig) -> bool:
    """Whether drawing several codes per pass may be faster, and never much slower.

    Found so for few images on CPUs with tiles (AMX), where sixteen rows of a pass cost what one
    costs; on CPUs without them it was slower (docs/speed.md).
    """
    sequences = 2 * images if sampling.guided else images
    if 4 * sequences > _MOST_ROWS:
        return False
    decoder = decoder_for(model)
    return isinstance(decoder, CpuDecoder) and decoder.has_tiles


class _Window:
    """How many codes of each image the next pass looks at."""

    def __init__(self, fixed: int | None, sequences: int) -> None:
        self._fixed = fixed
        self.most = fixed or max(1, _MOST_ROWS // sequences)
        self._per_pass = 2.0
        self._passes = 0

    def width(self) -> int:
        """T, if there is as much left."""
        if self._fixed is not None:
            return self._fixed
        if self._passes >= _TRIALS and self._per_pass < _LEAST:
            return 1
        return min(self.most, round(_PER_CODE * self._per_pass))

    def learn(self, width: int, advances: Sequence[int]) -> None:
        """Is told what a pass has made final of each image."""
        if width > 1:
            self._passes += 1
            mean = sum(advances) / len(advances)
            self._per_pass += (mean - self._per_pass) / min(self._passes + 1, 8)


class _Batch:
    """Images at different places of their grids, each with a window behind its final codes.

    Codes are looked at on the host, a few numbers a pass, where that takes the fewest operations.
    """

    def __init__(
        self,
        model: Transformer,
        sequences: Sequences,
        seeds: Sequence[int],
        sampling: SamplingConfig,
        grid: Grid,
        window: int | None,
    ) -> None:
        """Draws the first code of each image."""
        images = sequences.images
        self.running = list(range(images))
        self.passes = [0] * images
        self._model = model
        self._device = model.device
        self._decoder = decoder_for(model)
        self._sampling = sampling
        self._grid = grid
        self._total = grid[0] * grid[1]
        # A pass has no use for more positions than there are codes behind the first.
        window = None if window is None else max(1, min(window, self._total - 1))
        self._window = _Window(window, len(sequences.condition))
        most = self._window.most
        self._final = [0] * images
        """Of every image, how many codes will not change."""
        self._codes = [[0] * (self._total + most) for _ in range(images)]
        """Final codes and behind them drafts; those past the image mean nothing."""
        self._uniforms = uniform_draws(seeds, self._total + most).to(self._device)
        self._draws: dict[int, Draws] = {}
        """By a pass's positions, as long as the sequences are the same."""
        self._sequences = SlottedSequences(
            model, self._decoder, sequences, sampling, grid, spare=most - 1
        )
        self._update(self._sequences.first)
        self._drop_finished()

    @property
    def finished_rows(self) -> int:
        """Rows of the grid that all images have."""
        return min(self._final) // self._grid[1]

    def rows(self, count: int) -> Tensor:
        """(B, rows, columns): the first ``count`` rows of all images, zeros behind them."""
        codes = torch.tensor(self._codes, device=self._device)[:, : self._total]
        codes[:, count * self._grid[1] :] = 0
        return codes.unflatten(1, self._grid)

    def step(self) -> None:
        """One forward pass over the windows of all running images."""
        left = self._total - min(self._final[image] for image in self.running)
        width = min(self._window.width(), left)
        # What is fed stands before what is predicted.
        fed = [
            self._codes[image][self._final[image] - 1 : self._final[image] - 1 + width]
            for image, _ in self._sequences.members
        ]
        slots = self._sequences.slots
        logits = self._decoder.extend(torch.tensor(fed, device=self._device), slots)
        advances = dict(zip(self.running, self._update(logits), strict=True))
        self._window.learn(width, list(advances.values()))
        slots.advance_each([advances[image] for image, _ in self._sequences.members])
        self._drop_finished()

    def _update(self, logits: Tensor) -> list[int]:
        """Draws what logits (R, T, V) predict; how many codes of each image are final thereby."""
        drawn = zip(self.running, self._draw(logits), strict=True)
        return [self._take(image, codes) for image, codes in drawn]

    def _take(self, image: int, codes: list[int | None]) -> int:
        """Puts a pass's codes where the drafts are; how many of them are final."""
        start, known = self._final[image], len(codes)
        own = self._codes[image]
        final = min(_unchanged(own[start : start + known], codes) + 1, self._total - start, known)
        if None in codes[:final]:
            raise not_finite(self._model)
        drafts = [code or 0 for code in codes]
        # Behind them its last one, repeated. Cleverer guesses, as the code above in the grid, save
        # no passes.
        reach = final + self._window.most
        own[start : start + reach] = drafts + drafts[-1:] * (reach - known)
        self._final[image] += final
        self.passes[image] += 1
        return final

    def _draw(self, logits: Tensor) -> list[list[int | None]]:
        """Codes (A, T) from logits (R, T, V); None where these are not finite."""
        length, stop = logits.shape[1], self._sampling.guidance_stop
        draw = self._draws.get(length)
        if draw is None:
            draw = self._draws_of(length)
            if stop is None:
                self._draws[length] = draw
        starts = (self._final[image] for image in self.running)
        each = zip(self.running, starts, strict=True)
        uniforms = [self._uniforms[image, start : start + length] for image, start in each]
        rows = logits.flatten(0, 1)
        codes, finite = draw(rows, rows, torch.cat(uniforms))
        found = codes.where(finite, -1).view(-1, length).tolist()
        return [[None if code < 0 else code for code in own] for own in found]

    def _draws_of(self, length: int) -> Draws:
        """Draws of the next ``length`` codes of each running image."""
        stop = self._sampling.guidance_stop
        return self._sequences.draws(
            self.running,
            range(length),
            fed=length,
            guided=lambda image, code: stop is None or self._final[image] + code < stop,
        )

    def _drop_finished(self) -> None:
        """Ends images that have all codes, and unconditional sequences that are not needed."""
        stop = self._sampling.guidance_stop

        def done(image: int, unconditional: bool) -> bool:
            final = self._final[image]
            return final == self._total or (unconditional and stop is not None and final >= stop)

        if self._sequences.drop(done):
            self.running = [image for image in self.running if self._final[image] < self._total]
            self._draws.clear()


def _unchanged(drafts: Sequence[int], codes: Sequence[int | None]) -> int:
    """How many of ``codes`` are the drafts that they were drawn behind, from the first one on."""
    for count, (draft, code) in enumerate(zip(drafts, codes, strict=True)):
        if draft != code:
            return count
    return len(codes)
