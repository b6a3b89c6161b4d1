"""A transformer in training: codes and conditions in, loss out.

Shapes: B images, L tokens of the longest caption, T codes, V codebook size, W width of a feature.
"""

from __future__ import annotations

import abc
import functools
import random
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen.config import SmallTextEncoderConfig
from llamagen.data.captions import Captions, draw_caption
from llamagen.data.live_codes import CodeSource
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError
from llamagen.text.encoder import TextEncoder, padded
from llamagen.text.features import TextStore
from llamagen.training.losses import chunked_cross_entropy
from llamagen.training.task import Batch

TRANSFORMER = "transformer."
"""Prefix of the names of the transformer's weights."""
_ENCODER = "encoder.model."
_NEIGHBOUR_BIAS = 6.0
"""Against 80 others, nine tenths of the attention."""
_CHECKED_IMAGES = 1000
"""About how many images are checked before a training starts."""
_MAX_CACHED = 1 << 18
"""Maximum number of captions whose tokens are cached."""


class NextCodeModel(nn.Module):
    """A transformer, perhaps with a text encoder that is trained along, and the loss of both.

    The loss is computed in ``forward`` because that is the call which DDP and FSDP hook: the
    weights of the output head, which the loss reads, are gathered for its duration.
    """

    def __init__(
        self,
        transformer: Transformer,
        encoder: TextEncoder | None = None,
        *,
        code_sets: bool = False,
    ) -> None:
        """``code_sets``: also learn to predict from a caption alone which codes its image has."""
        super().__init__()
        self.transformer = transformer
        self.encoder = encoder
        self.code_head: nn.Linear | None = None
        if code_sets:
            config = transformer.config
            self.code_head = nn.Linear(config.text_dim, config.codebook_size, bias=False)

    @property
    def saved(self) -> nn.Module:
        """The module whose state dict checkpoints hold: without an encoder, the transformer."""
        return self.transformer if self.encoder is None else self

    def forward(
        self,
        codes: Tensor,
        condition: Tensor,
        targets: Tensor,
        *,
        condition_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
        order: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy of ``targets`` (B, T), all codes of each image, in nats.

        In training with ``code_sets`` (2,): the loss of the code sets is second. Images count by
        their ``weights`` (B,). ``codes`` (B, T - 1) are what the model is shown; with an encoder,
        ``condition`` are tokens (B, L). For the rest see ``Transformer.forward``.
        """
        if self.encoder is not None:
            assert condition_mask is not None
            condition = self.encoder(condition, condition_mask)
        hidden = self.transformer.hidden_states(
            codes,
            condition,
            condition_mask=condition_mask,
            drop_condition=drop_condition,
            order=order,
        )
        loss = chunked_cross_entropy(
            hidden.flatten(0, 1),
            self.transformer.output.weight,
            targets.flatten(),
            None if weights is None else weights.repeat_interleave(targets.shape[1]),
        )
        if self.code_head is None or not self.training:
            return loss
        assert condition_mask is not None
        return torch.stack([loss, self._code_set_loss(condition, condition_mask, targets, weights)])

    def _code_set_loss(
        self, features: Tensor, mask: Tensor, targets: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Return the cross-entropy of the set of an image's codes, given its caption only."""
        assert self.code_head is not None
        counted = mask.unsqueeze(-1).to(features.dtype)
        pooled = (features * counted).sum(1) / counted.sum(1).clamp(min=1)
        logits = self.code_head(F.rms_norm(pooled, pooled.shape[-1:])).float()  # (B, V)
        present = torch.zeros_like(logits).scatter_(1, targets, 1.0)
        losses = -(present / present.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)
        if weights is None:
            return losses.mean()
        return (losses * weights).sum() / weights.sum().clamp(min=1e-9)


@torch.no_grad()
def init_encoder_tensor(
    name: str, tensor: Tensor, generator: torch.Generator, config: SmallTextEncoderConfig
) -> bool:
    """Fill a weight of the text encoder as T5 does; return False if ``name`` is not one of its.

    T5 does not scale its attention scores: its query weights are smaller instead. All heads but
    one start by attending to one neighbour each: attention takes long to find words by itself.
    """
    if not name.startswith(_ENCODER):
        return False
    if name.endswith("relative_attention_bias.weight"):
        # Half of the buckets are for bytes on the left, half for the right; the first few of each
        # are for single distances.
        buckets, heads = tensor.shape
        tensor.zero_()
        for head in range(heads - 1):
            distance = min(head // 2 + 1, buckets // 4 - 1)
            tensor[distance + (head % 2) * (buckets // 2), head] = _NEIGHBOUR_BIAS
    elif re.search("layer_norm|final_layer_norm", name):
        nn.init.ones_(tensor)
    else:
        scales = {
            r"\.q\.": (config.dim * (config.dim // config.heads)) ** -0.5,
            r"\.wo\.": (config.hidden_dim or 2 * config.dim) ** -0.5,
            r"shared|embed_tokens": 1.0,
            r"": config.dim**-0.5,
        }
        scale = next(value for pattern, value in scales.items() if re.search(pattern, name))
        nn.init.normal_(tensor, std=scale, generator=generator)
    return True


class Conditioning:
    """How the images of a store become conditions of the model: here by their classes."""

    def batch(
        self, store: CodeSource, rows: np.ndarray, rngs: Sequence[random.Random] | None
    ) -> Batch:
        """Return the "condition" of some rows of a store, and what goes with it.

        That is labels (B,); or texts (B, L) or (B, L, W), a "mask" (B, L) of their tokens, and
        "weights" (B,). ``rngs`` has a random generator per image; None takes the most likely one.
        """
        del rngs
        assert store.labels is not None
        return {"condition": torch.from_numpy(store.labels[rows].astype(np.int64))}

    def model_input(self, batch: Batch) -> Tensor:
        """Return the condition of a batch on its device as the model takes it."""
        return batch["condition"]

    def check(self, store: CodeSource, rows: np.ndarray) -> None:
        """Raise InputError if of some of these images none has a condition."""


class CaptionConditioning(Conditioning, abc.ABC):
    """A caption of each image, a random one each time. Images without any have weight 0."""

    def batch(
        self, store: CodeSource, rows: np.ndarray, rngs: Sequence[random.Random] | None
    ) -> Batch:
        """See ``Conditioning``."""
        captions = captions_of_rows(store, rows)
        if rngs is None:
            chosen = [most_likely_caption(each) for each in captions]
        else:
            drawn = zip(captions, rngs, strict=True)
            chosen = [draw_caption(each, rng.random()) or "" for each, rng in drawn]
        texts, mask, usable = self.texts(chosen)
        weights = [float(bool(a and b)) for a, b in zip(captions, usable, strict=True)]
        return {"condition": texts, "mask": mask, "weights": torch.tensor(weights)}

    def check(self, store: CodeSource, rows: np.ndarray) -> None:
        """See ``Conditioning``."""
        some = rows[:: max(1, len(rows) // _CHECKED_IMAGES)]
        if len(some) and not any(map(self._is_usable, captions_of_rows(store, some))):
            raise InputError(
                f"of {len(some)} images in {store.folder}, none has a caption that can be used; "
                f"name the columns with `caption_columns` and make the codes again"
            )

    @abc.abstractmethod
    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Sequence[bool]]:
        """Return tokens or features of captions, their mask, and which of them are usable."""

    def _is_usable(self, captions: Captions) -> bool:
        return bool(captions)


class TokenConditioning(CaptionConditioning):
    """Captions as tokens, for a text encoder in the model or for a frozen one."""

    def __init__(self, encoder: TextEncoder, *, frozen: bool) -> None:
        """``encoder`` makes the tokens and, if it is ``frozen``, the features too."""
        self._encoder, self._frozen = encoder, frozen
        # Cleaning takes longer than everything else here, and captions recur every epoch.
        self._cached_ids = functools.lru_cache(maxsize=_MAX_CACHED)(self._token_ids)

    def model_input(self, batch: Batch) -> Tensor:
        """See ``Conditioning``."""
        tokens = batch["condition"]
        if not self._frozen:
            return tokens
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            features: Tensor = self._encoder.to(tokens.device)(tokens, batch["mask"])
        return features

    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Sequence[bool]]:
        """See ``CaptionConditioning``."""
        ids, mask = self._encoder.tokens([self._cached_ids(text) for text in captions])
        return ids, mask, [True] * len(captions)

    def _token_ids(self, caption: str) -> list[int]:
        return self._encoder.token_ids([self._encoder.prepare(caption)])[0]


class FeatureConditioning(CaptionConditioning):
    """Captions as stored features. Those that are not in the store have weight 0."""

    def __init__(self, features: TextStore) -> None:
        self._features = features

    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Sequence[bool]]:
        """See ``CaptionConditioning``."""
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
    """Return the captions of some images of a store; InputError if its images have none."""
    captions = store.captions(rows)
    if captions is None:
        raise InputError(
            f"the codes in {store.folder} have no captions; make them from images with captions"
        )
    return captions
