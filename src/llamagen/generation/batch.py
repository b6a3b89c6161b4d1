"""The decode loop: a batch that images join, step by step, and leave (continuous batching).

Every image has a condition, a seed, settings and a schedule of its own, and gets the codes (up to
floating-point ties) that it would get alone. Generating many images is: add all, step until none
runs.

Shapes: N images, R sequences (an image has one, and one more each for guidance and for a blend),
T codes of an image, D codes sampled by a step, V codes of the codebook.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llamagen.backends import StepTimes, fastest_step
from llamagen.backends.cpu.sampling import Rows
from llamagen.config import Grid
from llamagen.generation.request import UNKNOWN, GenerationRequest, check_request, uniform_draws
from llamagen.generation.sampling import Sampler, fastest_sampler, guidance_scale_at
from llamagen.generation.schedules import MAX_TOKENS, Pass, Schedule, new_schedule
from llamagen.models.transformer import NO_CELL, QUERY, Tokens, Transformer, to_index
from llamagen.support.errors import InputError, NotFiniteError

NOT_FINITE = -1
"""Stands for a code whose logits were not finite."""


_Role = enum.IntEnum("_Role", ["CONDITIONAL", "UNCONDITIONAL", "BLEND"], start=0)
"""Condition of one of an image's sequences."""


@dataclass(eq=False)
class GenerationState:
    """The progress of one image in a batch."""

    request: GenerationRequest
    schedule: Schedule
    row: int
    """Row of the batch's codes that is this image's."""
    total: int
    published_rows: int = 0
    """Rows of the grid that whoever asked for the image has got."""

    @property
    def final(self) -> int:
        """Codes that are final: the first ones in the schedule's order."""
        return self.schedule.final

    @property
    def is_finished(self) -> bool:
        """Whether all codes are final."""
        return self.schedule.final == self.total


class Batch:
    """Images at different places of their grids, which go through forward passes together."""

    def __init__(
        self,
        model: Transformer,
        max_images: int,
        *,
        max_sequences: int | None = None,
        condition_length: int | None = None,
        grid: Grid | None = None,
        times: StepTimes | None = None,
    ) -> None:
        """Allocate the memory of a batch of ``model``, which is in eval mode.

        ``max_images`` are generated at once, with ``max_sequences`` in all (by default two each)
        and conditions of up to ``condition_length`` positions. The latter and the grid are by
        default the model's. Where the time goes is added to ``times``.
        """
        self.model = model
        self.grid = grid or model.config.grid
        self.total = self.grid[0] * self.grid[1]
        self.max_images = max_images
        self.images: list[GenerationState] = []
        self._times = times
        self._step = fastest_step(model, times)
        length = model.config.condition_length if condition_length is None else condition_length
        positions = length + self.total * model.config.tokens_per_code
        self._cache = model.new_cache(max_sequences or 2 * max_images, positions)
        self._sequences: list[tuple[GenerationState, _Role]] = []
        """By number in the cache."""
        device = model.device
        self._codes = torch.zeros(max_images, self.total, dtype=torch.int64, device=device)
        self._known = torch.full_like(self._codes, UNKNOWN)
        self._uniforms = torch.zeros(max_images, self.total, dtype=torch.float32, device=device)
        self._not_finite = torch.zeros(max_images, dtype=torch.int32, device=device)
        """Of each image, codes whose logits were not finite."""
        self._free_rows = list(reversed(range(max_images)))
        """Rows of these tensors that are no image's."""
        self._sampler: tuple[list[GenerationState], Sampler] | None = None

    @property
    def sequences(self) -> int:
        """R, the sequences that a step computes."""
        return len(self._sequences)

    def has_capacity(self, requests: Sequence[GenerationRequest]) -> bool:
        """Whether all of some requests can join now."""
        everyone = [*(image.request for image in self.images), *requests]
        sequences = sum(request.sequences for request in everyone)
        return len(everyone) <= self.max_images and sequences <= self._cache.max_sequences

    def check(self, request: GenerationRequest) -> None:
        """Raise InputError if the model cannot take a request, or it can never join."""
        check_request(request, self.model, self.grid)
        if request.sequences > self._cache.max_sequences:
            raise InputError(
                f"an image with a blend and guidance needs {request.sequences} sequences, but the "
                f"batch has capacity for {self._cache.max_sequences}; allow it more images"
            )

    @torch.inference_mode()
    def add(self, requests: Sequence[GenerationRequest]) -> list[GenerationState]:
        """Start images: read their conditions and sample the first code of each.

        Raises InputError, and lets none join, if a request is not one that the model can take.
        """
        for request in requests:
            self.check(request)
        assert self.has_capacity(requests), f"no capacity for {len(requests)}"
        if not requests:
            return []
        sequences = self.sequences + sum(request.sequences for request in requests)
        joined = [self._join(request, sequences) for request in requests]
        keys = [(image, role) for image in joined for role in self._roles(image.request)]
        self._cache.add(len(keys))
        self._sequences += keys
        self.images += joined
        self._run({image: image.schedule.first_pass() for image in joined})
        return joined

    @torch.inference_mode()
    def step(self) -> None:
        """Run one forward pass of every image that is not finished."""
        running = [image for image in self.images if not image.is_finished]
        if not running:
            return
        budget = max(1, MAX_TOKENS // max(1, self.sequences))
        passes = {image: image.schedule.next_pass(budget) for image in running}
        self._end_sequences(lambda image, role: image in passes and _is_unneeded(image, role))
        self._run(passes)

    def _run(self, passes: dict[GenerationState, Pass]) -> None:
        """Feed the tokens of passes to their images' sequences, and sample what they predict."""
        fed: list[tuple[int, int, int, int]] = []  # sequence, position, cell, row of the codes
        wanted: list[int] = []
        first_rows: dict[tuple[GenerationState, _Role], int] = {}
        replaced: list[tuple[int, Sequence[int]]] = []
        queries: list[int] = []
        features: list[Tensor] = []
        for number, (image, role) in enumerate(self._sequences):
            if image not in passes:
                continue
            one, length = passes[image], self._cache.lengths[number]
            if length == 0:
                condition = self._condition(image.request, role)
                if condition.ndim:
                    features.append(condition.to(self.model.device))
                else:
                    replaced.append((len(fed), [int(condition) + self.model.config.codebook_size]))
                length = self._cache.lengths[number] = len(condition) if condition.ndim else 1
                fed += [(number, position, NO_CELL, image.row) for position in range(length)]
            start = len(fed)
            if one.codes is not None:
                replaced.append((start, one.codes))
            queries += [start + token for token in one.queries]
            first_rows[image, role] = len(wanted)
            wanted += [start + token for token in one.predicted_by]
            fed += [
                (number, position, cell, image.row)
                for position, cell in enumerate(one.feed, length)
            ]
        sequences, positions, cells, rows = np.array(fed, dtype=np.int32).T
        ids = self._codes[self._index(rows, cells)]
        for start, own in replaced:
            ids[start : start + len(own)] = torch.tensor(own, device=ids.device)
        if queries:
            ids[to_index(np.array(queries), ids.device)] = QUERY
        tokens = Tokens(
            ids,
            sequences,
            positions,
            cells,
            np.array(wanted, dtype=np.int64),
            torch.cat(features) if features else None,
        )
        logits = self._step(tokens, self._cache, self.grid)
        accepted = self._accept(passes, self._sample(logits, passes, first_rows))
        for number, (image, _) in enumerate(self._sequences):
            self._cache.lengths[number] += accepted.get(image, 0)

    def codes_of(self, images: Sequence[GenerationState], count: int) -> Tensor:
        """Return codes (N, T) int64 of images, on the model's device.

        All but the ``count`` that were final first are ``UNKNOWN``.
        """
        codes = self._codes[[image.row for image in images]]
        for own, image in zip(codes, images, strict=True):
            own[torch.tensor(image.schedule.order[count:], dtype=torch.int64)] = UNKNOWN
        return codes

    def check_finite(self, images: Sequence[GenerationState]) -> None:
        """Raise NotFiniteError if logits of these images were not finite. Waits for the device."""
        # Checked once at the end: checking every step would synchronise with the device.
        if int(self._not_finite[[image.row for image in images]].sum()):
            raise NotFiniteError(
                f"the transformer's logits are not finite in {self.model.dtype}; "
                f"use bfloat16 or float32, or check the weights"
            )

    def remove(self, image: GenerationState) -> None:
        """Take an image out, finished or not."""
        self._end_sequences(lambda own, _: own is image)
        self.images.remove(image)
        self._free_rows.append(image.row)

    def clear(self) -> None:
        """Take all images out, in whatever state a failed step has left them."""
        self._free_rows = list(reversed(range(self.max_images)))
        self.images, self._sequences, self._cache.lengths = [], [], []
        self._sampler = None

    def _join(self, request: GenerationRequest, sequences: int) -> GenerationState:
        row, known = self._free_rows.pop(), request.known_codes
        self._known[row] = UNKNOWN if known is None else known.flatten()
        self._codes[row] = self._known[row].clamp(min=0)
        self._uniforms[row] = uniform_draws([request.seed], self.total)[0]
        self._not_finite[row] = 0
        is_wide = self._step.is_wide
        schedule = new_schedule(
            request, self.model.config.order, self.grid, is_wide=is_wide, sequences=sequences
        )
        return GenerationState(request, schedule, row, self.total)

    def _roles(self, request: GenerationRequest) -> list[_Role]:
        """Conditions that an image has sequences for."""
        given = (True, request.sampling.guided, request.blend is not None)
        return [role for role, is_given in zip(_Role, given, strict=True) if is_given]

    def _condition(self, request: GenerationRequest, role: _Role) -> Tensor:
        """Condition of a sequence: a label () or features (C, text_dim)."""
        found = (request.condition, request.negative, request.blend)[role]
        if found is None:
            return self.model.cls_embedding.unconditional(request.condition.unsqueeze(0))[0]
        return found

    def _index(self, *rows_and_cells: Sequence[int] | np.ndarray) -> tuple[Tensor, ...]:
        return to_index(np.array(rows_and_cells), self._codes.device).unbind()

    def _sample(
        self,
        logits: Tensor,
        passes: dict[GenerationState, Pass],
        first_rows: dict[tuple[GenerationState, _Role], int],
    ) -> list[int]:
        """Sample what a pass predicts; return the codes if a schedule needs them.

        ``first_rows`` says where in ``logits`` the rows of each sequence begin, one per code.
        """
        if not any(one.sample for one in passes.values()):
            return []
        began = time.perf_counter()
        # Of each code: rows of its logits, guidance scale, row and cell of the codes.
        sampled: list[tuple[int, int, float, int, int]] = []
        blends: list[tuple[int, int, float]] = []
        for image, one in passes.items():
            own, negative, blend = (first_rows.get((image, role), -1) for role in _Role)
            for number, cell in enumerate(one.sample):
                drawn = cell if one.drawn is None else one.drawn
                scale = guidance_scale_at(image.request.sampling, drawn, self.total)
                other = -1 if negative < 0 or scale == 1.0 else negative + number
                sampled.append((own + number, other, scale, image.row, cell))
                if blend >= 0:
                    blends.append((own + number, blend + number, image.request.blend_share))
        conditional, unconditional, scales, rows, cells = zip(*sampled, strict=True)
        where = self._index(rows, cells)
        codes, finite = self._sampler_of(passes)(
            _blend(logits, blends) if blends else logits,
            logits,
            Rows(np.array(conditional), np.array(unconditional), np.array(scales, np.float32)),
            self._uniforms[where],
        )
        known = self._known[where]
        codes = torch.where(known == UNKNOWN, codes, known)
        self._codes[where] = codes
        are_needed = any(image.schedule.needs_codes for image in passes)
        if are_needed:
            # Guesses may lead to anything: ``_accept`` counts only codes that are final.
            codes = codes.where(finite, NOT_FINITE)
        else:
            self._not_finite.index_add_(0, where[0], (~finite).to(torch.int32))
        if self._times is not None:
            self._times.sampling += time.perf_counter() - began
        return codes.tolist() if are_needed else []

    def _accept(
        self, passes: dict[GenerationState, Pass], sampled: list[int]
    ) -> dict[GenerationState, int]:
        """Tell schedules what was sampled; return the tokens of each image that are final."""
        accepted, start = {}, 0
        for image, one in passes.items():
            own = sampled[start : start + len(one.sample)]
            start += len(one.sample)
            before = image.final
            accepted[image] = image.schedule.accept(own)
            if NOT_FINITE in own[: image.final - before]:
                self._not_finite[image.row] += 1
        return accepted

    def _sampler_of(self, passes: dict[GenerationState, Pass]) -> Sampler:
        """Return the sampler of a pass: that of the pass before, if it has the same rows."""
        rows = [image for image, one in passes.items() for _ in one.sample]
        if self._sampler is None or self._sampler[0] != rows:
            settings = [image.request.sampling for image in rows]
            size = self.model.config.codebook_size
            self._sampler = (rows, fastest_sampler(settings, size, self.model.device))
        return self._sampler[1]

    def _end_sequences(self, is_over: Callable[[GenerationState, _Role], bool]) -> None:
        for number in reversed(range(len(self._sequences))):
            if is_over(*self._sequences[number]):
                # The last one takes its number, as in the cache.
                self._cache.remove(number)
                self._sequences[number] = self._sequences[-1]
                self._sequences.pop()


def _is_unneeded(image: GenerationState, role: _Role) -> bool:
    """Whether no code needs the logits of an image's sequence any more."""
    stop = image.request.sampling.guidance_stop
    return role is _Role.UNCONDITIONAL and stop is not None and image.final >= stop


def _blend(logits: Tensor, blends: Sequence[tuple[int, int, float]]) -> Tensor:
    """Logits (R, V) in which rows are mixed with others: (row, other row, share of the other)."""
    logits = logits.float()
    rows, others, shares = zip(*blends, strict=True)
    index = torch.tensor([rows, others], device=logits.device)
    share = torch.tensor(shares, dtype=torch.float32, device=logits.device).unsqueeze(1)
    mixed = logits[index[0]].lerp(logits[index[1]], share)
    return logits.index_copy(0, index[0], mixed)
