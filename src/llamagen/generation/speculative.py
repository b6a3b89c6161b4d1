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

from llamagen.config import Grid, SamplingConfig
from llamagen.errors import InputError
from llamagen.generation.decode import RowCallback, check_finite
from llamagen.generation.draws import draws_for
from llamagen.generation.seeds import uniform_draws
from llamagen.generation.sequences import Sequences, sequences_of
from llamagen.transformer import SlotCache, Transformer, decoder_for
from llamagen.transformer.decoder import CpuDecoder

_MOST_ROWS = 32
"""Rows of a pass up to which its time, with tiles, grows much more slowly than their number."""
_PER_CODE = 2.5
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
    """Images at different places of their grids, each with a window behind its final codes."""

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
        self._images = self._index(self.running).unsqueeze(1)
        """(A, 1): the images that run."""
        self._starts = torch.zeros_like(self._images)
        """(A, 1): of these, how many codes will not change."""
        self._offsets = torch.arange(most, device=self._device)
        self._codes = torch.zeros(images, self._total + most, dtype=torch.int64)
        self._codes = self._codes.to(self._device)
        """Final codes and behind them drafts; those past the image mean nothing."""
        self._uniforms = uniform_draws(seeds, self._total + most).to(self._device)
        self._slots = SlotCache.empty(
            model.config,
            len(sequences.condition),
            grid=grid,
            device=model.device,
            dtype=model.dtype,
            spare=most - 1,
        )
        self._sequences: list[tuple[int, bool]] = []
        """What is in the slots: of which image, and whether it is the unconditional one."""
        logits = []
        for members, condition in sequences.by_length():
            logits.append(model.start(condition, self._slots))
            self._sequences += [(row % images, row >= images) for row in members]
        self._fed = self._numbers()
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
        width = min(self._window.width(), left)
        positions = self._positions(width)
        # What is fed stands before what is predicted.
        fed = self._codes[self._images, positions - 1]  # (A, T)
        logits = self._decoder.extend(fed[self._fed], self._slots)
        advances = dict(zip(self.running, self._update(logits), strict=True))
        self._window.learn(width, list(advances.values()))
        self._slots.advance_each([advances[image] for image, _ in self._sequences])
        self._drop_finished()

    def _update(self, logits: Tensor) -> list[int]:
        """Draws what logits (R, T, V) predict; how many codes of each image are final thereby."""
        length = logits.shape[1]
        images, positions = self._images, self._positions(length)
        drafts = self._codes[images, positions]
        codes, finite = self._draw(logits, self._uniforms[images, positions])
        self._codes[images, positions] = codes

        unchanged = (codes == drafts).cumprod(-1).sum(-1, keepdim=True)
        final = torch.minimum(unchanged + 1, (self._total - self._starts).clamp(max=length))
        later = self._offsets[:length] >= final
        check_finite((finite | later).all(), self._model)

        advances = final.flatten().tolist()
        for image, advance in zip(self.running, advances, strict=True):
            self._final[image] += advance
            self.passes[image] += 1
        self._starts = self._starts + final
        self._guess(codes, final)
        return advances

    def _guess(self, codes: Tensor, advances: Tensor) -> None:
        """Fills what lies behind a pass's codes (A, T), of which ``advances`` (A, 1) are final.

        The pass's last code, repeated. Cleverer guesses, as the code above in the grid, save no
        passes.
        """
        behind = self._positions(self._window.most)
        # Counted from an image's first code that is not final, the pass's codes end before this.
        known = self._offsets < codes.shape[1] - advances
        drafts = torch.where(known, self._codes[self._images, behind], codes[:, -1:])
        self._codes[self._images, behind] = drafts

    def _draw(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (A, T) from logits (R, T, V), and (A, T) bool, False where these are not finite."""
        length, stop = logits.shape[1], self._sampling.guidance_stop
        place = {sequence: index for index, sequence in enumerate(self._sequences)}
        conditional: list[int] = []
        unconditional: list[int | None] = []
        for image in self.running:
            own, other = place[image, False], place.get((image, True))
            guided = 0 if other is None else length if stop is None else stop - self._final[image]
            conditional += [own * length + position for position in range(length)]
            unconditional += [
                other * length + position if other is not None and position < guided else None
                for position in range(length)
            ]
        draw = draws_for(
            [self._sampling] * len(conditional),
            conditional,
            unconditional,
            codebook_size=logits.shape[-1],
            device=logits.device,
        )
        rows = logits.flatten(0, 1)
        codes, finite = draw(rows, rows, uniforms.flatten())
        return codes.view(-1, length), finite.view(-1, length)

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
            self.running = [self.running[number] for number in kept]
            self._images, self._starts = self._images[kept], self._starts[kept]
        if len(self._fed) != len(self._sequences):
            self._fed = self._numbers()

    def _positions(self, length: int) -> Tensor:
        """(A, T): the first positions of each running image whose codes may change."""
        return self._starts + self._offsets[:length]

    def _numbers(self) -> Tensor:
        """(R,): which of the running images each sequence belongs to."""
        number = {image: number for number, image in enumerate(self.running)}
        return self._index([number[image] for image, _ in self._sequences])

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
