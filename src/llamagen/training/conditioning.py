"""What stands in front of the codes in training: labels, or captions.

Shapes: B images, L tokens of the longest caption, T codes of an image.
"""

from __future__ import annotations

import abc
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from llamagen.data.captions import Captions, draw_caption
from llamagen.data.store import CodeStore
from llamagen.errors import InputError
from llamagen.text.encoder import TextEncoder
from llamagen.training.loop import Batch


class Conditioning(abc.ABC):
    """How images of a store are told to a model."""

    @abc.abstractmethod
    def batch(
        self, store: CodeStore, rows: np.ndarray, numbers: Sequence[random.Random] | None
    ) -> Batch:
        """The conditions of some images, with one row for each.

        Args:
            store: has the images.
            rows: which.
            numbers: random numbers of each image; None takes what is likeliest.
        """

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Batch, drop: Tensor | None) -> Tensor:
        """The loss of the batch's "codes" (B, T); rows where ``drop`` (B,) get no condition."""

    def check(self, store: CodeStore, rows: np.ndarray) -> int:
        """How many of these images lack a condition.

        Raises:
            InputError: all of them do.
        """
        del store, rows
        return 0


class LabelConditioning(Conditioning):
    """The class of each image."""

    def batch(
        self, store: CodeStore, rows: np.ndarray, numbers: Sequence[random.Random] | None
    ) -> Batch:
        """Labels (B,)."""
        del numbers
        assert store.labels is not None
        return {"labels": torch.from_numpy(store.labels[rows].astype(np.int64))}

    def loss(self, model: nn.Module, batch: Batch, drop: Tensor | None) -> Tensor:
        """See ``Conditioning``."""
        codes = batch["codes"]
        loss: Tensor = model(codes[:, :-1], batch["labels"], drop_condition=drop, targets=codes)
        return loss


class CaptionConditioning(Conditioning):
    """A caption of each image, drawn anew each time. Images without any weigh nothing."""

    def __init__(self, encoder: TextEncoder, *, frozen: bool) -> None:
        """``encoder`` makes the tokens and, if it is ``frozen``, the features too."""
        self._encoder = encoder
        self._frozen = frozen
        self._tokens: dict[str, list[int]] = {}

    def batch(
        self, store: CodeStore, rows: np.ndarray, numbers: Sequence[random.Random] | None
    ) -> Batch:
        """Tokens (B, L), where they are no padding (B, L), and what each image weighs (B,)."""
        captions = self._captions(store, rows)
        if numbers is None:
            chosen = [max(each, key=lambda c: c.weight).text if each else "" for each in captions]
        else:
            chosen = [
                draw_caption(each, number.random()) or ""
                for each, number in zip(captions, numbers, strict=True)
            ]
        tokens = self._encoder.tokens([self._token_ids(text) for text in chosen])
        weights = torch.tensor([float(bool(each)) for each in captions])
        return {"ids": tokens.ids, "mask": tokens.mask, "weights": weights}

    def loss(self, model: nn.Module, batch: Batch, drop: Tensor | None) -> Tensor:
        """See ``Conditioning``."""
        codes, condition = batch["codes"], batch["ids"]
        if self._frozen:
            with torch.no_grad(), torch.autocast(condition.device.type, enabled=False):
                condition = self._encoder.to(condition.device)(condition, batch["mask"])
        loss: Tensor = model(
            codes[:, :-1],
            condition,
            condition_mask=batch["mask"],
            drop_condition=drop,
            targets=codes,
            target_weights=batch["weights"],
        )
        return loss

    def check(self, store: CodeStore, rows: np.ndarray) -> int:
        """How many of these images have no caption."""
        missing = sum(not each for each in self._captions(store, rows))
        if missing == len(rows) > 0:
            raise InputError(
                f"none of the {len(rows)} images in {store.folder} has a caption; name the column "
                f"with --caption-columns and make the codes again"
            )
        return missing

    def _captions(self, store: CodeStore, rows: np.ndarray) -> list[Captions]:
        captions = store.captions(rows)
        if captions is None:
            raise InputError(
                f"the codes in {store.folder} have no captions; make them from images with captions"
            )
        return captions

    def _token_ids(self, caption: str) -> list[int]:
        # Cleaning takes longer than everything else here, and captions come again every epoch.
        if caption not in self._tokens:
            prepared = self._encoder.prepare(caption)
            self._tokens[caption] = self._encoder.token_ids([prepared])[0]
        return self._tokens[caption]
