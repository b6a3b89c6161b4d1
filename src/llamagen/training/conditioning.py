"""The condition in front of the codes in training: labels, or captions.

Shapes: B images, L tokens of the longest caption, W width of a text feature.
"""

from __future__ import annotations

import abc
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llamagen.data.captions import Captions, draw_caption
from llamagen.data.live_codes import CodeSource
from llamagen.support.errors import InputError
from llamagen.text.encoder import TextEncoder, padded
from llamagen.text.features import TextStore
from llamagen.training.task import Batch

_CHECKED_IMAGES = 1000
"""About how many images are checked before a training starts."""
_MAX_CACHED = 1 << 18
"""Maximum number of captions whose tokens are cached."""


class Conditioning(abc.ABC):
    """How the images of a store become conditions of the model."""

    @abc.abstractmethod
    def batch(
        self, store: CodeSource, rows: np.ndarray, rngs: Sequence[random.Random] | None
    ) -> Batch:
        """Return the "condition" of some images, and what goes with it, one row for each.

        Args:
            store: has the images.
            rows: of the store.
            rngs: a random generator for each image; with None the most likely caption is taken.
        """

    def model_input(self, batch: Batch) -> Tensor:
        """Return the condition of a batch on its device as the model takes it."""
        return batch["condition"]

    def lengths(self, store: CodeSource, rows: np.ndarray) -> list[int]:
        """Return approximate lengths of some conditions, to batch similar ones together."""
        del store
        return [1] * len(rows)

    def check(self, store: CodeSource, rows: np.ndarray) -> None:
        """Check some of these images.

        Raises:
            InputError: none of them has a condition.
        """
        del store, rows

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Return further scalars of a batch to be logged."""
        del batch
        return {}


class LabelConditioning(Conditioning):
    """The class of each image."""

    def batch(
        self, store: CodeSource, rows: np.ndarray, rngs: Sequence[random.Random] | None
    ) -> Batch:
        """Return labels (B,)."""
        del rngs
        assert store.labels is not None
        return {"condition": torch.from_numpy(store.labels[rows].astype(np.int64))}


class CaptionConditioning(Conditioning):
    """A caption of each image, a random one each time. Images without any have weight 0."""

    def batch(
        self, store: CodeSource, rows: np.ndarray, rngs: Sequence[random.Random] | None
    ) -> Batch:
        """Return texts (B, L) or (B, L, W), a mask (B, L) of their tokens, and weights (B,)."""
        captions = captions_of_rows(store, rows)
        if rngs is None:
            chosen = [most_likely_caption(each) for each in captions]
        else:
            chosen = [
                draw_caption(each, rng.random()) or ""
                for each, rng in zip(captions, rngs, strict=True)
            ]
        texts, mask, usable = self._texts(chosen)
        weights = [float(bool(a and b)) for a, b in zip(captions, usable, strict=True)]
        return {"condition": texts, "mask": mask, "weights": torch.tensor(weights)}

    @abc.abstractmethod
    def _texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Sequence[bool]]:
        """Return tokens or features of captions, their mask, and which of them are usable."""

    def lengths(self, store: CodeSource, rows: np.ndarray) -> list[int]:
        """Return the characters of the most likely captions, which costs no tokenisation."""
        return [len(most_likely_caption(each)) for each in captions_of_rows(store, rows)]

    def check(self, store: CodeSource, rows: np.ndarray) -> None:
        """See ``Conditioning``."""
        some = rows[:: max(1, len(rows) // _CHECKED_IMAGES)]
        if len(some) and not any(map(self._is_usable, captions_of_rows(store, some))):
            raise InputError(
                f"of {len(some)} images in {store.folder}, none has a caption that can be used; "
                f"name the columns with `caption_columns` and make the codes again"
            )

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """Return the fraction of images without a caption, and so without weight."""
        return {"without_caption": 1.0 - batch["weights"].mean()}

    def _is_usable(self, captions: Captions) -> bool:
        return bool(captions)


class TokenConditioning(CaptionConditioning):
    """Captions as tokens, for a text encoder in the model or for a frozen one."""

    def __init__(self, encoder: TextEncoder, *, frozen: bool) -> None:
        """``encoder`` makes the tokens and, if it is ``frozen``, the features too."""
        self._encoder = encoder
        self._frozen = frozen
        self._tokens: dict[str, list[int]] = {}

    def model_input(self, batch: Batch) -> Tensor:
        """See ``Conditioning``."""
        tokens = batch["condition"]
        if not self._frozen:
            return tokens
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            features: Tensor = self._encoder.to(tokens.device)(tokens, batch["mask"])
        return features

    def _texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Sequence[bool]]:
        tokens = self._encoder.tokens([self._token_ids(text) for text in captions])
        return tokens.ids, tokens.mask, [True] * len(captions)

    def _token_ids(self, caption: str) -> list[int]:
        # Cleaning takes longer than everything else here, and captions recur every epoch.
        if caption not in self._tokens:
            if len(self._tokens) == _MAX_CACHED:
                self._tokens.clear()
            prepared = self._encoder.prepare(caption)
            self._tokens[caption] = self._encoder.token_ids([prepared])[0]
        return self._tokens[caption]


class FeatureConditioning(CaptionConditioning):
    """Captions as stored features. Those that are not in the store have weight 0."""

    def __init__(self, features: TextStore) -> None:
        self._features = features

    def _texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Sequence[bool]]:
        found = self._features.features(captions)
        # At least one position, even without a feature: a sequence starts with its condition.
        texts, mask = padded(found)
        mask[:, -1] = True
        return texts, mask, [len(each) > 0 for each in found]

    def _is_usable(self, captions: Captions) -> bool:
        return any(len(f) for f in self._features.features([each.text for each in captions]))


def most_likely_caption(captions: Captions) -> str:
    """Return the text of the caption with the largest weight; "" if there is none."""
    return max(captions, key=lambda caption: caption.weight).text if captions else ""


def captions_of_rows(store: CodeSource, rows: np.ndarray) -> list[Captions]:
    """Return the captions of some images of a store.

    Raises:
        InputError: its images have none.
    """
    captions = store.captions(rows)
    if captions is None:
        raise InputError(
            f"the codes in {store.folder} have no captions; make them from images with captions"
        )
    return captions
