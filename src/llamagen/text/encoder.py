"""Text encoders of the T5 family, which turn captions into features.

Shapes: B captions, L tokens of the longest, W width of a feature.
"""

from __future__ import annotations

import itertools
import logging
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import llamagen.support.storage as storage
from llamagen.config import SmallTextEncoderConfig, TextConfig
from llamagen.models.pretrained import eval_mode
from llamagen.support.errors import InputError
from llamagen.support.names import is_visible, normal_name
from llamagen.support.weights import digest
from llamagen.text.cleaning import clean_caption
from llamagen.text.transformers_library import import_transformers, load_pretrained, quietly

TOKENS_AT_ONCE = 4096
"""Default number of tokens of a batch."""
_BYTE_TOKENS = 384
"""Byte-level tokens: the bytes, three special ones and a reserve, as in ByT5."""

_log = logging.getLogger(__name__)


class TextEncoder(nn.Module):
    """A T5 encoder with its tokenizer and the preparation of captions."""

    def __init__(self, model: Any, tokenizer: Any, config: TextConfig) -> None:
        """See ``from_pretrained`` and ``small``; ``model`` is a ``transformers.T5EncoderModel``."""
        super().__init__()
        # One module under both names: moved from "meta", shared weights would become two.
        model.set_input_embeddings(model.get_input_embeddings())
        self.model, self.tokenizer, self.config = model, tokenizer, config

    @classmethod
    def from_pretrained(
        cls,
        config: TextConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """Load an encoder, by default FLAN-T5-XL as in the published models.

        Of a whole T5 model, only the encoder's weights are loaded. T5 overflows in float16.
        InputError if there is no such encoder, or packages are not installed.
        """
        config = config or TextConfig()
        families, who = ("t5", "mt5", "umt5"), "text encoders need"
        model, tokenizer, _ = load_pretrained(
            "text encoder", config.encoder, "EncoderModel", families, who=who, dtype=dtype
        )
        return cls(model.to(device).eval(), tokenizer, config)

    @classmethod
    def small(cls, config: SmallTextEncoderConfig, *, clean: bool = True) -> Self:
        """Return a byte-level encoder with random weights, to train with a transformer."""
        transformers = import_transformers("text encoders need")
        model = transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=_BYTE_TOKENS,
                d_model=config.dim,
                d_kv=config.dim // config.heads,
                d_ff=config.hidden_dim or 2 * config.dim,
                num_layers=config.layers,
                num_heads=config.heads,
                dropout_rate=config.dropout,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        text = TextConfig(encoder="", max_length=config.max_length, clean=clean)
        return cls(model, transformers.ByT5Tokenizer(), text)

    def small_config(self, *, dropout: float) -> SmallTextEncoderConfig:
        """Return the architecture of an encoder that ``small`` made."""
        config = self.model.config
        return SmallTextEncoderConfig(
            dim=config.d_model,
            layers=config.num_layers,
            heads=config.num_heads,
            hidden_dim=config.d_ff,
            dropout=dropout,
            max_length=self.config.max_length,
        )

    @property
    def width(self) -> int:
        """Length of a feature."""
        return int(self.model.config.d_model)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def prepare(self, caption: str) -> str:
        """Return a caption as it is encoded; InputError if it has control characters.

        It is in Unicode's composed form (NFC), and "" if there is nothing to see in it.
        """
        if any(unicodedata.category(character) == "Cs" for character in caption):
            raise InputError(f"the text {_shortened(caption)} is no valid UTF-8; write it anew")
        for character in caption:
            if unicodedata.category(character) == "Cc" and character not in "\t\r\n":
                raise InputError(
                    f"the text {_shortened(caption)} has the control character "
                    f"U+{ord(character):04X} in it; remove it"
                )
        caption = normal_name(caption)
        text = clean_caption(caption) if self.config.clean else caption
        return text if is_visible(text) else ""

    def require_text(self, caption: str) -> str:
        """See ``prepare``; InputError also if nothing is left of the caption."""
        if prepared := self.prepare(caption):
            return prepared
        why = "is empty once it is cleaned" if is_visible(caption) else "is empty"
        raise InputError(f"the prompt {_shortened(caption)} {why}; describe an image")

    def token_ids(self, prepared: Sequence[str], *, warn: bool = False) -> list[list[int]]:
        """Return tokens of prepared captions, cut after ``max_length``; ``warn`` of those cut."""
        limit = self.config.max_length
        ids: list[list[int]] = self.tokenizer(
            list(prepared), truncation=True, max_length=limit, add_special_tokens=True
        )["input_ids"]
        for text, tokens in zip(prepared, ids, strict=True) if warn else ():
            if len(tokens) == limit < len(self.tokenizer(text, add_special_tokens=True).input_ids):
                shown = _shortened(text)
                _log.warning("only the first %d tokens of the text %s are read", limit, shown)
        return ids

    def tokens(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, L) int64 of several captions and their mask; see ``padded``."""
        rows = [torch.tensor(row, dtype=torch.int64) for row in ids]
        return padded(rows, self.tokenizer.pad_token_id)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode tokens (B, L), True in ``mask`` where they are real, to features (B, L, W)."""
        # T5 has relative positions only, so left padding changes nothing.
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    @torch.inference_mode()
    def encode(
        self,
        prepared: Sequence[str],
        *,
        tokens_at_once: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[Tensor]:
        """Return features of prepared captions, each (its tokens, W), on the CPU.

        A batch has captions of one length, without padding, and at most ``tokens_at_once`` tokens.
        By default a CPU encodes captions one by one: products of other shapes round differently, so
        features would depend on the batch. ``progress`` is called with the number newly done.
        """
        if tokens_at_once is None:
            tokens_at_once = 1 if self.device.type == "cpu" else TOKENS_AT_ONCE
        ids = self.token_ids(prepared)
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        for batch in length_batches(list(map(len, ids)), tokens_at_once):
            tokens = self.tokens([ids[i] for i in batch])
            with eval_mode(self):
                features = self(*(each.to(self.device) for each in tokens)).cpu()
            for row, index in zip(features, batch, strict=True):
                found[index] = row.clone()
            if progress is not None:
                progress(len(batch))
        return found

    def fingerprint(self) -> str:
        """Return a short text that depends on the weights and the preparation of captions."""
        prepared = repr((self.config.max_length, self.config.clean, len(self.tokenizer)))
        # The same for every precision.
        return digest(prepared, self.model.state_dict().items(), torch.bfloat16)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder and its tokenizer as ``transformers`` reads them."""
        with storage.atomic_folder(Path(folder)) as temporary, quietly():
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)


def length_batches(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """Yield indices in batches of one length, the longest first, of at most so many tokens."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for length, group in itertools.groupby(order, key=lambda index: lengths[index]):
        same = list(group)
        size = max(1, tokens_at_once // max(1, length))
        yield from (same[start : start + size] for start in range(0, len(same), size))


def padded(rows: Sequence[Tensor], value: int = 0) -> tuple[Tensor, Tensor]:
    """Stack features (L, W) or tokens (L,) of captions, left-padded to one length, at least 1.

    Returns (B, L, W) or (B, L), and (B, L) bool, False where there is padding, which is ``value``.
    """
    lengths = torch.tensor([len(row) for row in rows])
    length = max(1, int(lengths.max()))
    mask = torch.arange(length) >= length - lengths[:, None]
    together = rows[0].new_full((*mask.shape, *rows[0].shape[1:]), value)
    together[mask] = torch.cat(list(rows))
    return together, mask


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
