"""The autoregressive model over image codes (paper section 3.2).

A condition (one class embedding, or projected text features) stands in front of the codes; the
model predicts each code from the condition and the codes before it in raster order. One class
serves both kinds of condition, training and sampling; a KV cache is an argument, never state.

Shapes: B batch, T codes given, C condition length, D width, V codebook size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamagen.config import Grid, TransformerConfig
from llamagen.models.pretrained import PretrainedModel
from llamagen.models.transformer.blocks import AttentionMask, Cache, RMSNorm, TransformerBlock
from llamagen.models.transformer.cache import KVCache
from llamagen.models.transformer.code_loss import code_loss
from llamagen.models.transformer.condition import ClassCondition, TextCondition
from llamagen.models.transformer.cpu import Dropout
from llamagen.models.transformer.quantized import QuantizedLinear, make_quantized
from llamagen.models.transformer.rope import rope_table
from llamagen.models.transformer.slots import SlotCache


class Transformer(PretrainedModel[TransformerConfig]):
    """Llama-style decoder over codes. Its state-dict keys are those of the public checkpoints."""

    config_class = TransformerConfig
    kind = "transformer"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_blocks = False
        """Forget the inside of the blocks in the forward pass of training, and compute it again
        in the backward pass: less memory for more computation."""
        self.kv_cache_dtype: torch.dtype | None = None
        """Precision of new caches: int8, or None for that of the weights."""
        is_class = config.condition == "class"
        self.cls_embedding = ClassCondition(config) if is_class else TextCondition(config)
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.dim)
        self.tok_dropout = Dropout(config.token_dropout)
        self.layers = nn.ModuleList(
            TransformerBlock(config, layer) for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.codebook_size, bias=False)
        if config.quantization is not None:
            make_quantized(self, config.quantization)
        self.init_weights()

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The blocks, with their type."""
        return cast("list[TransformerBlock]", list(self.layers))

    @property
    def cache_dtype(self) -> torch.dtype:
        """Precision that keys and values are kept in."""
        return self.dtype if self.kv_cache_dtype is None else self.kv_cache_dtype

    @property
    def requires(self) -> str | None:
        """See ``PretrainedModel``."""
        return None if self.config.quantization is None else "0.1.0"

    def parameter_count(self) -> int:
        """Number of weights, quantised or not."""
        quantized = [m for m in self.modules() if isinstance(m, QuantizedLinear)]
        return super().parameter_count() + sum(m.in_features * m.out_features for m in quantized)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal with standard deviation 0.02 for every matrix, zero for the output head."""
        for name, parameter in self.named_parameters():
            self.init_tensor(name, parameter)

    @torch.no_grad()
    def init_tensor(
        self, name: str, tensor: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Gives ``tensor`` the first values of the weight called ``name``."""
        if name == "output.weight":
            nn.init.zeros_(tensor)
        elif name.endswith("norm.weight"):
            nn.init.ones_(tensor)
        else:
            # The scale that a text encoder's features have per entry of their norm.
            is_text = name == "cls_embedding.uncond_embedding"
            std = self.config.text_dim**-0.5 if is_text else 0.02
            nn.init.normal_(tensor, std=std, generator=generator)

    def forward(
        self,
        codes: Tensor,
        condition: Tensor,
        *,
        condition_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
        grid: Grid | None = None,
        targets: Tensor | None = None,
        target_weights: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next code at every position, given the codes before it, or their loss.

        Args:
            codes: (B, T) int, the first T codes in raster order; in training all but the last.
            condition: labels (B,) or text features (B, C, text_dim), real features last.
            condition_mask: (B, C) bool, False where text features are padding.
            drop_condition: (B,) bool, True where the condition is replaced by "no condition".
            grid: rows and columns of the image; by default the configuration's.
            targets: (B, T + 1) int64, the codes to be predicted. With them the loss is returned,
                and the logits are never all in memory.
            target_weights: (B,), what each image counts; by default all alike.

        Returns:
            (B, T + 1, V) logits; row t is the prediction of code t. With ``targets`` the mean
            cross-entropy, a scalar in nats.
        """
        hidden = self.hidden_states(
            codes,
            condition,
            condition_mask=condition_mask,
            drop_condition=drop_condition,
            grid=grid,
        )
        if targets is None:
            return self.output(hidden)
        weights = None
        if target_weights is not None:
            weights = target_weights.repeat_interleave(targets.shape[1])
        return code_loss(hidden.flatten(0, 1), self.output.weight, targets.flatten(), weights)

    def hidden_states(
        self,
        codes: Tensor,
        condition: Tensor,
        *,
        condition_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """As ``forward``, but the normalised states (B, T + 1, D) in front of the output head."""
        embedded = self.cls_embedding(condition, drop_condition)  # (B, C, D)
        length = embedded.shape[1]
        x = torch.cat([embedded, self.tok_embeddings(codes)], dim=1)
        rope = self._rope(grid or self.config.grid, length)[: x.shape[1]]
        mask = _attention_mask(x.shape[1], x.shape[1], condition_mask, x.device)
        return self._run(x, rope, mask, cache=None)[:, length - 1 :]

    def new_cache(
        self, batch: int, *, condition_length: int | None = None, grid: Grid | None = None
    ) -> KVCache:
        """An empty cache for ``batch`` sequences, where this model is."""
        if condition_length is None:
            condition_length = self.config.condition_length
        return KVCache.empty(
            self.config,
            batch,
            grid=grid or self.config.grid,
            condition_length=condition_length,
            device=self.device,
            dtype=self.cache_dtype,
        )

    def prefill(
        self, condition: Tensor, cache: KVCache, *, condition_mask: Tensor | None = None
    ) -> Tensor:
        """Starts sequences: runs the condition into an empty ``cache``.

        Returns the logits (B, V) of the first code.
        """
        assert cache.length == 0, f"the cache already holds {cache.length} positions"
        embedded = self.cls_embedding(condition)
        length = embedded.shape[1]
        assert length == cache.condition_length, (
            f"{length} condition positions, but the cache was made for {cache.condition_length}"
        )
        if condition_mask is not None:
            cache.condition_mask = condition_mask.bool()
        rope = self._rope(cache.grid, length)[:length]
        mask = _attention_mask(length, length, cache.condition_mask, embedded.device)
        hidden = self._run(embedded, rope, mask, cache)
        cache.advance(length)
        return self.output(hidden[:, -1])

    def decode(self, codes: Tensor, cache: KVCache) -> Tensor:
        """Continues sequences: feeds ``codes`` (B, T) behind what ``cache`` holds.

        Returns logits (B, T, V); row t is the prediction of the code that follows codes[:, t].
        """
        x = self.tok_embeddings(codes)
        start, end = cache.length, cache.length + codes.shape[1]
        rope = self._rope(cache.grid, cache.condition_length)[start:end]
        mask = _attention_mask(codes.shape[1], end, cache.condition_mask, x.device)
        hidden = self._run(x, rope, mask, cache)
        cache.advance(codes.shape[1])
        return self.output(hidden)

    def start(
        self, condition: Tensor, cache: Cache, *, condition_mask: Tensor | None = None
    ) -> Tensor:
        """Starts sequences in an empty cache, or behind those in slots, which take no padding.

        Returns the logits (B, V) of the first code.
        """
        if isinstance(cache, KVCache):
            return self.prefill(condition, cache, condition_mask=condition_mask)
        assert condition_mask is None, "conditions in slots have no padding"
        length = 1 if condition.ndim == 1 else condition.shape[1]
        # Room for the condition only: what is kept is copied into the slots.
        own = self.new_cache(len(condition), condition_length=length, grid=(1, 1))
        logits = self.prefill(condition, own)
        cache.admit(own)
        return logits

    def step(self, codes: Tensor, slots: SlotCache) -> Tensor:
        """Continues sequences that are at different places: feeds one code to each, (B,).

        Returns logits (B, V) of the codes that follow.
        """
        logits = self.extend(codes.unsqueeze(1), slots)
        slots.advance(1)
        return logits[:, 0]

    def extend(self, codes: Tensor, slots: SlotCache) -> Tensor:
        """Looks ahead in sequences that are at different places: feeds ``codes`` (R, T) to them.

        Their keys and values are written behind each sequence's own but not counted as filled:
        that is left to ``slots.advance_each``, once it is known how many of the codes hold. A
        window may reach past an image's last code, as far as the slots have room for; what is
        predicted there means nothing.

        Returns logits (R, T, V); row t is the prediction of the code that follows codes[:, t].
        """
        x = self.tok_embeddings(codes)
        count = codes.shape[1]
        rope = self._rope(slots.grid, 0)[slots.cells(count).to(self.device)]
        mask = AttentionMask(causal=False, allowed=slots.attended(count))
        return self.output(self._run(x, rope, mask, slots))

    def extend_at(self, codes: Tensor, slots: SlotCache, cells: Sequence[int]) -> Tensor:
        """As ``extend``, but ``codes`` (R, T) need not follow what stands in the slots.

        Theirs are the places of ``cells`` (T,), alike in all sequences: codes of an image, numbered
        in raster order, each at most once. What stood there is overwritten. Each attends to the
        condition and to all cells up to its own, which must hold something.
        """
        x = self.tok_embeddings(codes)
        rope = self._rope(slots.grid, 0)[list(cells)]
        there = slots.at(cells)
        mask = AttentionMask(causal=False, allowed=there.attended(len(cells)))
        return self.output(self._run(x, rope, mask, there))

    def _run(self, x: Tensor, rope: Tensor, mask: AttentionMask, cache: Cache | None) -> Tensor:
        x = self.tok_dropout(x)
        for block in self.layers:
            if self.recompute_blocks and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        return self.norm(x)

    def _rope(self, grid: Grid, condition_length: int) -> Tensor:
        config = self.config
        return rope_table(grid, condition_length, config.head_dim, config.rope_base, self.device)


def _attention_mask(
    queries: int, keys: int, condition_mask: Tensor | None, device: torch.device
) -> AttentionMask:
    """Causal attention of the last ``queries`` of ``keys`` positions, padding left out.

    ``condition_mask`` (B, C) covers the first C positions. A padded position attends to itself
    only, so that its softmax is defined; nothing else attends to it.
    """
    if condition_mask is None and queries == keys:
        return AttentionMask(causal=True, allowed=None)
    if condition_mask is None and queries == 1:
        return AttentionMask(causal=False, allowed=None)
    query_index = torch.arange(keys - queries, keys, device=device).unsqueeze(-1)
    key_index = torch.arange(keys, device=device)
    allowed = (key_index <= query_index)[None, None]  # (1, 1, T, L)
    if condition_mask is not None:
        valid = F.pad(condition_mask.bool(), (0, keys - condition_mask.shape[1]), value=True)
        allowed = (allowed & valid[:, None, None, :]) | (key_index == query_index)
        return AttentionMask(
            causal=False, allowed=allowed, valid=valid if queries == keys else None
        )
    return AttentionMask(causal=False, allowed=allowed)
