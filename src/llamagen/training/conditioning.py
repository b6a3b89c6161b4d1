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
from llamagen.data.live_codes import CodeSource
from llamagen.support.errors import InputError
from llamagen.text.encoder import TextEncoder, padded
from llamagen.text.features import TextStore
from llamagen.training.task import Batch

_LOOKED_AT = 1000
"""Images that are looked at before a training starts, about."""
_REMEMBERED = 1 << 18
"""Captions whose tokens are remembered, at most."""


class Conditioning(abc.ABC):
    """How images of a store are told to a model."""

    @abc.abstractmethod
    def batch(
        self,
        store: CodeSource,
        rows: np.ndarray,
        numbers: Sequence[random.Random] | None,
    ) -> Batch:
        """The conditions of some images, with one row for each.

        Args:
            store: has the images.
            rows: which.
            numbers: random numbers of each image; None takes what is likeliest.
        """

    def loss(self, model: nn.Module, batch: Batch, drop: Tensor | None) -> Tensor:
        """Return what ``NextCodeModel.forward`` computes of a batch.

        Rows where ``drop`` (B,) get no condition.
        """
        loss: Tensor = model(
            batch["shown"],
            self._condition(batch),
            batch["codes"],
            condition_mask=batch.get("mask"),
            drop_condition=drop,
            weights=batch.get("weights"),
        )
        return loss

    def _condition(self, batch: Batch) -> Tensor:
        """What the model is given."""
        return batch["condition"]

    def lengths(self, store: CodeSource, rows: np.ndarray) -> list[int]:
        """About how long the conditions of some images are, to put like ones together."""
        del store
        return [1] * len(rows)

    def check(self, store: CodeSource, rows: np.ndarray) -> None:
        """Looks at some of these images.

        Raises:
            InputError: none of them has a condition.
        """
        del store, rows

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Further scalars to be logged of a batch."""
        del batch
        return {}


class LabelConditioning(Conditioning):
    """The class of each image."""

    def batch(
        self,
        store: CodeSource,
        rows: np.ndarray,
        numbers: Sequence[random.Random] | None,
    ) -> Batch:
        """Labels (B,)."""
        del numbers
        assert store.labels is not None
        return {"condition": torch.from_numpy(store.labels[rows].astype(np.int64))}


class CaptionConditioning(Conditioning):
    """A caption of each image, drawn anew each time. Images without any weigh nothing."""

    def batch(
        self,
        store: CodeSource,
        rows: np.ndarray,
        numbers: Sequence[random.Random] | None,
    ) -> Batch:
        """Texts (B, L) or (B, L, W), where they are no padding (B, L), and weights (B,)."""
        captions = captions_of_rows(store, rows)
        if numbers is None:
            chosen = [max(each, key=lambda c: c.weight).text if each else "" for each in captions]
        else:
            chosen = [
                draw_caption(each, number.random()) or ""
                for each, number in zip(captions, numbers, strict=True)
            ]
        texts, mask, there = self._texts(chosen)
        weights = torch.tensor([float(bool(a and b)) for a, b in zip(captions, there, strict=True)])
        return {"condition": texts, "mask": mask, "weights": weights}

    @abc.abstractmethod
    def _texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Sequence[bool]]:
        """Tokens or features of captions, their mask, and which of them say anything."""

    def lengths(self, store: CodeSource, rows: np.ndarray) -> list[int]:
        """Letters of the likeliest captions: a look at them costs nothing."""
        captions = captions_of_rows(store, rows)
        return [len(max(each, key=lambda c: c.weight).text) if each else 0 for each in captions]

    def check(self, store: CodeSource, rows: np.ndarray) -> None:
        """See ``Conditioning``."""
        some = rows[:: max(1, len(rows) // _LOOKED_AT)]
        if len(some) and not any(map(self._says_anything, captions_of_rows(store, some))):
            raise InputError(
                f"of {len(some)} images in {store.folder}, none has a caption that can be used; "
                f"name the columns with `caption_columns` and make the codes again"
            )

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """The share of images that had no caption, and so no weight."""
        return {"without_caption": 1.0 - batch["weights"].mean()}

    def _says_anything(self, captions: Captions) -> bool:
        return bool(captions)


class TokenConditioning(CaptionConditioning):
    """Captions as tokens, for a model that has its text encoder in it, or for one that has not."""

    def __init__(self, encoder: TextEncoder, *, frozen: bool) -> None:
        """``encoder`` makes the tokens and, if it is ``frozen``, the features too."""
        self._encoder = encoder
        self._frozen = frozen
        self._tokens: dict[str, list[int]] = {}

    def _texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Sequence[bool]]:
        tokens = self._encoder.tokens([self._token_ids(text) for text in captions])
        return tokens.ids, tokens.mask, [True] * len(captions)

    def _condition(self, batch: Batch) -> Tensor:
        tokens = batch["condition"]
        if not self._frozen:
            return tokens
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            features: Tensor = self._encoder.to(tokens.device)(tokens, batch["mask"])
        return features

    def _token_ids(self, caption: str) -> list[int]:
        # Cleaning takes longer than everything else here, and captions come again every epoch.
        if caption not in self._tokens:
            if len(self._tokens) == _REMEMBERED:
                self._tokens.clear()
            prepared = self._encoder.prepare(caption)
            self._tokens[caption] = self._encoder.token_ids([prepared])[0]
        return self._tokens[caption]


class FeatureConditioning(CaptionConditioning):
    """Captions as features that were made before. Those that are not there weigh nothing."""

    def __init__(self, features: TextStore) -> None:
        """Features are looked up in a store."""
        self._features = features

    def _texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Sequence[bool]]:
        found = self._features.features(captions)
        # At least one position, where nothing is: a sequence begins with its condition.
        texts, mask = padded(found, max([1, *(len(each) for each in found)]))
        mask[:, -1] = True
        return texts, mask, [len(each) > 0 for each in found]

    def _says_anything(self, captions: Captions) -> bool:
        return any(len(f) for f in self._features.features([each.text for each in captions]))


def captions_of_rows(store: CodeSource, rows: np.ndarray) -> list[Captions]:
    """The captions of some images of a store.

    Raises:
        InputError: its images have none.
    """
    captions = store.captions(rows)
    if captions is None:
        raise InputError(
            f"the codes in {store.folder} have no captions; make them from images with captions"
        )
    return captions
