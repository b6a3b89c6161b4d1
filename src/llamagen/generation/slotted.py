"""The sequences of a batch of images in the slots of one cache, and what is drawn behind them.

Shapes: A images, R sequences, T codes fed to each in a pass, D codes drawn of each image by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from llamagen.backends.decoder import Decoder
from llamagen.config import Grid, SamplingConfig
from llamagen.generation.draws import Draws, draws_for
from llamagen.generation.sequences import Sequences
from llamagen.models.transformer import SlotCache, Transformer


class SlottedSequences:
    """The sequences of images that go through passes of several codes together."""

    def __init__(
        self,
        model: Transformer,
        decoder: Decoder,
        sequences: Sequences,
        sampling: SamplingConfig,
        grid: Grid,
        *,
        spare: int = 0,
    ) -> None:
        """Computes the conditions, with the model's decoder.

        Raises:
            InputError: a condition is nothing but padding.
        """
        self._model = model
        self._sampling = sampling
        self.slots = SlotCache.empty(
            model.config,
            len(sequences.condition),
            grid=grid,
            device=model.device,
            dtype=model.cache_dtype,
            spare=spare,
        )
        self.members: list[tuple[int, bool]] = []
        """What is in the slots: of which image, and whether it is the unconditional one."""
        images, logits = sequences.images, []
        for rows, condition in sequences.by_length():
            logits.append(decoder.start(condition, self.slots))
            self.members += [(row % images, row >= images) for row in rows]
        self.first = torch.cat(logits).unsqueeze(1)
        """(R, 1, V) logits of the images' first codes."""

    def drop(self, done: Callable[[int, bool], bool]) -> bool:
        """Ends the members that are ``done``; whether there were any."""
        before = len(self.members)
        for slot in reversed(range(before)):
            if done(*self.members[slot]):
                self.slots.remove(slot)
                # The last one takes its place, as in the slots.
                self.members[slot] = self.members[-1]
                self.members.pop()
        return len(self.members) < before

    def draws(
        self,
        images: Sequence[int],
        by: Sequence[int],
        *,
        fed: int,
        guided: Callable[[int, int], bool],
    ) -> Draws:
        """Draws from logits (R * T, V), as long as the members are the same.

        Args:
            images: (A,) of which images codes are drawn, D of each.
            by: (D,) which of the codes fed predicts each of them.
            fed: T.
            guided: whether guidance still counts, of an image and one of its D codes.
        """
        slot = {member: number for number, member in enumerate(self.members)}
        conditional: list[int] = []
        unconditional: list[int | None] = []
        for image in images:
            own, other = slot[image, False], slot.get((image, True))
            conditional += [own * fed + code for code in by]
            unconditional += [
                other * fed + code if other is not None and guided(image, number) else None
                for number, code in enumerate(by)
            ]
        return draws_for(
            [self._sampling] * len(conditional),
            conditional,
            unconditional,
            codebook_size=self._model.config.codebook_size,
            device=self._model.device,
        )
