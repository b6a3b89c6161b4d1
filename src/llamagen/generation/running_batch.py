"""A batch that images join and leave between any two codes (continuous batching).

``generate_codes`` starts all images of a batch together, with the same settings. Here every image
has a condition, a seed and settings of its own, and gets the codes (up to floating-point ties)
that it would get alone.

Shapes: N images, R sequences (an image has one, and one more each for guidance and for a blend),
T codes of an image, V codes of the codebook.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamagen.backends.decoder import decoder_for
from llamagen.config import SamplingConfig
from llamagen.generation.draws import draws_for
from llamagen.generation.known import check_known
from llamagen.generation.seeds import check_seed, uniform_draws
from llamagen.generation.sequences import check_share
from llamagen.models.transformer import SlotCache, Transformer
from llamagen.support.errors import InputError, NotFiniteError


@dataclass(eq=False)
class Drawing:
    """An image in the making."""

    condition: Tensor
    """A label (), or text features (C, text_dim) without padding."""
    seed: int
    sampling: SamplingConfig
    unconditional: Tensor | None = None
    """What guidance leads away from, as ``condition``; by default the model's own "no class" or
    "no text"."""
    blend: Tensor | None = None
    """A second condition, as ``condition``, whose logits are mixed with those of the first."""
    blend_share: float = 0.5
    """How much it counts, from 0 to 1."""
    known: Tensor | None = None
    """(T,) codes that stay as they are, -1 where one is to be drawn."""
    drawn: int = 0
    """Codes drawn so far."""
    codes: Tensor | None = None
    """(T,) int64 on the model's device, the first ``drawn`` of them filled; None before it joins a
    batch."""
    finite: Tensor | None = None
    """() bool, False once its logits were not."""

    @property
    def guided(self) -> bool:
        """Whether the next code needs the unconditional sequence."""
        stop = self.sampling.guidance_stop
        return self.sampling.guided and (stop is None or self.drawn < stop)

    @property
    def sequences(self) -> int:
        """How many of the batch's sequences it needs, at most."""
        return 1 + self.sampling.guided + (self.blend is not None)

    def check(self) -> None:
        """Raises NotFiniteError if the model's logits were not finite. Waits for the device."""
        if self.finite is not None and not bool(self.finite):
            raise NotFiniteError(
                "the transformer's logits are not finite; use bfloat16 or float32, or check the "
                "weights"
            )


class _Role(enum.Enum):
    """What a sequence of an image is conditioned on."""

    OWN = enum.auto()
    UNCONDITIONAL = enum.auto()
    BLEND = enum.auto()


_Sequence = tuple[Drawing, _Role]


class RunningBatch:
    """Draws one code of every image per step."""

    def __init__(self, model: Transformer, max_images: int) -> None:
        """Takes the memory of a batch.

        Args:
            model: in eval mode, on the device and in the precision to compute in.
            max_images: images that can be drawn at once, guided or not; fewer where some are
                blends.
        """
        self.model = model
        self.max_images = max_images
        self.drawings: list[Drawing] = []
        self._sequences: list[_Sequence] = []
        self._layout: _Layout | None = None
        grid = model.config.grid
        self.codes_per_image = grid[0] * grid[1]
        self._slots = SlotCache.empty(
            model.config, 2 * max_images, grid=grid, device=model.device, dtype=model.cache_dtype
        )
        self._decoder = decoder_for(model)

    def room(self, waiting: Sequence[Drawing]) -> int:
        """How many of those that wait can join, from the first one on."""
        free = 2 * self.max_images - sum(drawing.sequences for drawing in self.drawings)
        most = self.max_images - len(self.drawings)
        for count, drawing in enumerate(waiting[:most]):
            free -= drawing.sequences
            if free < 0:
                return count
        return min(most, len(waiting))

    @property
    def sequences(self) -> int:
        """R, what a step has to compute."""
        return len(self._sequences)

    def check(self, drawing: Drawing) -> None:
        """Raises InputError if the model cannot take its conditions, seed or known codes."""
        check_seed(drawing.seed)
        check_share(drawing.blend_share)
        if drawing.sequences > 2 * self.max_images:
            raise InputError(
                "a blend with guidance needs three sequences, but the batch has room for two; "
                "allow it two images"
            )
        for condition in (drawing.condition, drawing.unconditional, drawing.blend):
            if condition is not None:
                self.model.cls_embedding.check(condition.unsqueeze(0))
        if drawing.known is not None:
            check_known(drawing.known, (self.codes_per_image,), self.model.config.codebook_size)

    @torch.inference_mode()
    def add(self, drawings: Sequence[Drawing]) -> None:
        """Starts images and draws the first code of each.

        Raises:
            InputError: a condition or a seed is not one that the model can take; none has joined.
        """
        assert self.room(drawings) == len(drawings), f"no room for {len(drawings)} images"
        embedding = self.model.cls_embedding
        by_shape: dict[torch.Size, list[tuple[_Sequence, Tensor]]] = {}
        for drawing in drawings:
            self.check(drawing)
            condition = drawing.condition.to(self.model.device)
            given = {_Role.OWN: condition}
            if drawing.guided:
                other = drawing.unconditional
                if other is None:
                    other = embedding.unconditional(condition.unsqueeze(0))[0]
                given[_Role.UNCONDITIONAL] = other.to(condition)
            if drawing.blend is not None:
                given[_Role.BLEND] = drawing.blend.to(condition)
            for role, each in given.items():
                by_shape.setdefault(each.shape, []).append(((drawing, role), each))
        for drawing in drawings:
            empty = torch.zeros(self.codes_per_image, dtype=torch.int64)
            drawing.codes = empty.to(self.model.device)
            drawing.finite = torch.ones((), dtype=torch.bool, device=self.model.device)
        started: list[_Sequence] = []
        logits: list[Tensor] = []
        for group in by_shape.values():
            conditions = torch.stack([condition for _, condition in group])
            logits.append(self._decoder.start(conditions, self._slots))
            started += [sequence for sequence, _ in group]
        if drawings:
            self._layout_of(drawings, started).draw(torch.cat(logits))
        self.drawings += drawings
        self._sequences += started
        self._layout = None

    @torch.inference_mode()
    def step(self) -> None:
        """Draws the next code of every image. None may be finished."""
        if not self.drawings:
            return
        for drawing in self.drawings:
            if drawing.sampling.guided and drawing.drawn == drawing.sampling.guidance_stop:
                self._drop(self._sequences.index((drawing, _Role.UNCONDITIONAL)))
        if self._layout is None:
            self._layout = self._layout_of(self.drawings, self._sequences)
        layout = self._layout
        layout.draw(self._decoder.next_logits(layout.last_codes(), self._slots))

    def finished(self) -> list[Drawing]:
        """Takes out the images that have all their codes."""
        done = [d for d in self.drawings if d.drawn == self.codes_per_image]
        for drawing in done:
            self.remove(drawing)
        return done

    def remove(self, drawing: Drawing) -> None:
        """Takes an image out, finished or not."""
        for place in reversed(range(len(self._sequences))):
            if self._sequences[place][0] is drawing:
                self._drop(place)
        self.drawings.remove(drawing)

    def clear(self) -> None:
        """Takes all images out, whatever state a failed step has left."""
        self.drawings = []
        self._sequences = []
        self._layout = None
        self._slots.clear()

    def _layout_of(self, drawings: Sequence[Drawing], sequences: Sequence[_Sequence]) -> _Layout:
        codebook_size = self.model.config.codebook_size
        return _Layout(drawings, sequences, self.codes_per_image, codebook_size)

    def _drop(self, place: int) -> None:
        """Ends a sequence; the last one takes its place, as in the slots."""
        self._slots.remove(place)
        self._sequences[place] = self._sequences[-1]
        self._sequences.pop()
        self._layout = None


class _Layout:
    """What a step needs to know of some images, as tensors; made anew when images join or leave."""

    def __init__(
        self,
        drawings: Sequence[Drawing],
        sequences: Sequence[_Sequence],
        codes: int,
        codebook_size: int,
    ) -> None:
        assert drawings[0].codes is not None
        device = drawings[0].codes.device
        place = {sequence: index for index, sequence in enumerate(sequences)}
        number = {drawing: index for index, drawing in enumerate(drawings)}

        def indices(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.drawings = list(drawings)
        self.image = indices([number[drawing] for drawing, _ in sequences])
        self.draws = draws_for(
            [drawing.sampling for drawing in drawings],
            [place[drawing, _Role.OWN] for drawing in drawings],
            [place.get((drawing, _Role.UNCONDITIONAL)) for drawing in drawings],
            codebook_size=codebook_size,
            device=device,
        )
        blends = [drawing for drawing in drawings if drawing.blend is not None]
        self.blended = indices([place[drawing, _Role.OWN] for drawing in blends])
        self.blends = indices([place[drawing, _Role.BLEND] for drawing in blends])
        self.shares = torch.tensor([d.blend_share for d in blends], device=device).unsqueeze(1)
        self.known = _known_of(drawings, codes, device)
        self.uniforms = uniform_draws([drawing.seed for drawing in drawings], codes).to(device)
        self.next = indices([drawing.drawn for drawing in drawings]).unsqueeze(1)
        self.codes = torch.stack([d.codes for d in drawings if d.codes is not None])
        self.finite = torch.stack([d.finite for d in drawings if d.finite is not None])
        for drawing, own, finite in zip(drawings, self.codes, self.finite, strict=True):
            drawing.codes, drawing.finite = own, finite

    def last_codes(self) -> Tensor:
        """(R,): the code that each sequence is fed."""
        return self.codes.gather(1, self.next - 1).squeeze(1)[self.image]

    def draw(self, logits: Tensor) -> None:
        """Draws a code of each image from the logits (R, V) of all sequences."""
        uniforms = self.uniforms.gather(1, self.next).squeeze(1)
        mixed = logits
        if len(self.blends):
            mixed = logits.float()
            own, other = mixed[self.blended], mixed[self.blends]
            mixed = mixed.index_copy(0, self.blended, own.lerp(other, self.shares))
        drawn, finite = self.draws(mixed, logits, uniforms)
        # In place: the drawings hold views.
        self.finite &= finite
        if self.known is not None:
            known = self.known.gather(1, self.next).squeeze(1)
            drawn = torch.where(known < 0, drawn, known)
        self.codes.scatter_(1, self.next, drawn.unsqueeze(1))
        self.next += 1
        for drawing in self.drawings:
            drawing.drawn += 1


def _known_of(drawings: Sequence[Drawing], codes: int, device: torch.device) -> Tensor | None:
    """(N, T) known codes, -1 where there is none; None if no image has any."""
    if all(drawing.known is None for drawing in drawings):
        return None
    known = torch.full((len(drawings), codes), -1, dtype=torch.int64)
    for own, drawing in zip(known, drawings, strict=True):
        if drawing.known is not None:
            own.copy_(drawing.known)
    return known.to(device)
