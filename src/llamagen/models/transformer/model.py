"""The autoregressive model over image codes (paper section 3.2).

A condition (one class embedding, or projected text features) stands in front of the codes; the
model predicts each code from the condition and the codes before it in raster order. One class
serves both kinds of condition, training and sampling; a KV cache is an argument, never state.

Shapes: B batch, T codes given, C condition length, D width, V codebook size; of a step N tokens, M
of them wanted, as a rectangle R sequences of T.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llamagen.config import Grid, TransformerConfig
from llamagen.models.pretrained import PretrainedModel
from llamagen.models.transformer.blocks import (
    AttentionMask,
    RMSNorm,
    TransformerBlock,
    UpdateCache,
    apply_rope,
    rope_table,
)
from llamagen.models.transformer.conditioning import ClassCondition, TextCondition
from llamagen.models.transformer.inference import NO_CELL, QUERY, KVCache, Tokens, to_index
from llamagen.models.transformer.quantization import QuantizedLinear, make_quantized
from llamagen.models.transformer.training_ops import Dropout
from llamagen.support.errors import InputError


class Transformer(PretrainedModel[TransformerConfig]):
    """Llama-style decoder over codes. Its state-dict keys are those of the public checkpoints."""

    config_class = TransformerConfig
    kind = "transformer"
    pos_instruct_embeddings: nn.Parameter | None
    """(1, D), RandAR's name: rotated by a cell's angles, the embedding of the cell's query."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_blocks = False
        """Activation checkpointing: recompute the inside of the blocks in the backward pass."""
        self.kv_cache_dtype: torch.dtype | None = None
        """Precision of new caches: int8, or None for that of the weights."""
        is_class = config.condition == "class"
        self.cls_embedding = ClassCondition(config) if is_class else TextCondition(config)
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.dim)
        is_random = config.order == "random"
        query = nn.Parameter(torch.empty(1, config.dim)) if is_random else None
        self.register_parameter("pos_instruct_embeddings", query)
        self.tok_dropout = Dropout(config.token_dropout)
        self.layers = nn.ModuleList(
            TransformerBlock(config, layer) for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.codebook_size, bias=False)
        if config.quantization is not None:
            make_quantized(self)
        self.init_weights()

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The blocks, with their type."""
        return cast("list[TransformerBlock]", list(self.layers))

    @property
    def cache_dtype(self) -> torch.dtype:
        """Precision that keys and values are stored in."""
        return self.dtype if self.kv_cache_dtype is None else self.kv_cache_dtype

    @property
    def requires(self) -> str | None:
        """See ``PretrainedModel``."""
        return None if self.config.quantization is None else "0.1.0"

    def parameter_count(self) -> int:
        """Number of weights, quantised or not."""
        quantized = [m.weight.numel() for m in self.modules() if isinstance(m, QuantizedLinear)]
        return super().parameter_count() + sum(quantized)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every matrix with standard deviation 0.02; the output head is zero."""
        for name, parameter in self.named_parameters():
            self.init_tensor(name, parameter)

    @torch.no_grad()
    def init_tensor(
        self, name: str, tensor: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Give ``tensor`` the initial values of the weight called ``name``."""
        if name == "output.weight":
            nn.init.zeros_(tensor)
        elif name.endswith("norm.weight"):
            nn.init.ones_(tensor)
        else:
            # The scale that a text encoder's features have per entry of their norm.
            is_text = name == "cls_embedding.uncond_embedding"
            std = self.config.text_dim**-0.5 if is_text else 0.02
            nn.init.normal_(tensor, std=std, generator=generator)

    def forward(self, codes: Tensor, condition: Tensor, **options: Any) -> Tensor:
        """Return the logits of the next code at every position, given the codes before it.

        Takes what ``hidden_states`` takes. Returns (B, T + 1, V) logits; row t predicts code t.
        """
        return self.output(self.hidden_states(codes, condition, **options))

    def hidden_states(
        self,
        codes: Tensor,
        condition: Tensor,
        *,
        condition_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
        order: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """Return the normalised states (B, T + 1, D) in front of the output head.

        Args:
            codes: (B, T) int, the first T codes in their order; in training all but the last.
            condition: labels (B,) or text features (B, C, text_dim), real features last.
            condition_mask: (B, C) bool, False where text features are padding.
            drop_condition: (B,) bool, True where the condition is replaced by "no condition".
            order: (B, T + 1) int, the cells that these codes and the next one belong to: given
                exactly if the configuration's order is random.
            grid: rows and columns of the image; by default the configuration's.
        """
        if order is None and self.pos_instruct_embeddings is not None:
            raise InputError("this model predicts codes in random order; give the cells as `order`")
        if order is not None and self.pos_instruct_embeddings is None:
            raise InputError("this model predicts codes in raster order; leave out `order`")
        embedded = self.cls_embedding(condition, drop_condition)  # (B, C, D)
        length, table = embedded.shape[1], self.rope_table(grid)
        x = self.tok_embeddings(codes)
        cells = torch.arange(codes.shape[1], device=x.device)
        if order is not None:
            # In turn the query of a cell, whose state predicts the code there, and that code.
            queries = self._queries(table[order])
            x = torch.stack([queries, F.pad(x, (0, 0, 0, 1))], dim=2).flatten(1, 2)[:, :-1]
            cells = order.repeat_interleave(2, dim=1)[:, :-1]
        x = torch.cat([embedded, x], dim=1)
        rope = table[F.pad(cells, (length, 0), value=NO_CELL)]
        mask = _training_mask(x.shape[1], condition_mask, x.device)
        states = self._run(x, rope, mask)
        return states[:, length - 1 :] if order is None else states[:, length::2]

    def new_cache(self, sequences: int, positions: int) -> KVCache:
        """Return an empty cache, where this model is."""
        dtype, device = self.cache_dtype, self.device
        return KVCache(self.config, sequences, positions, dtype=dtype, device=device)

    def embed(self, tokens: Tokens, rope: Tensor) -> Tensor:
        """Return the embeddings (N, D) of a step's tokens, given their ``rope`` (N, E / 2, 2)."""
        x = self._embed_codes(tokens.ids.clamp(max=self.config.codebook_size - 1), rope)
        (conditions,) = (tokens.cells == NO_CELL).nonzero()
        if len(conditions):
            own = to_index(conditions, self.device)
            if isinstance(self.cls_embedding, TextCondition):
                assert tokens.features is not None, "a text condition without features"
                x[own] = self.cls_embedding.project(tokens.features)
            else:
                labels = tokens.ids[own] - self.config.codebook_size
                x[own] = self.cls_embedding.embedding_table(labels)
        return x

    def _embed_codes(self, ids: Tensor, rope: Tensor) -> Tensor:
        """Embeddings (..., D) of codes or queries ``ids`` (...), with ``rope`` (..., E / 2, 2)."""
        if self.pos_instruct_embeddings is None:
            return self.tok_embeddings(ids)
        codes = self.tok_embeddings(ids.clamp(min=0))
        return torch.where((ids == QUERY).unsqueeze(-1), self._queries(rope), codes)

    def queries(self, grid: Grid) -> Tensor | None:
        """Return the embeddings (cells, D) of the queries of all cells; None in raster order."""
        with torch.no_grad():
            random = self.pos_instruct_embeddings is not None
            return self._queries(self.rope_table(grid)[:-1]) if random else None

    def _queries(self, rope: Tensor) -> Tensor:
        """Embeddings (..., D) of the queries of cells with ``rope`` (..., E / 2, 2)."""
        assert self.pos_instruct_embeddings is not None, "a query in a model of raster order"
        heads = self.pos_instruct_embeddings.view(self.config.heads, self.config.head_dim)
        return apply_rope(heads.expand(*rope.shape[:-2], -1, -1), rope).flatten(-2)

    def step(self, tokens: Tokens, cache: KVCache, *, grid: Grid | None = None) -> Tensor:
        """Feed tokens to sequences of ``cache``; return the logits (M, V) of those wanted.

        Keys and values are stored at the tokens' positions; ``cache.lengths`` is left to the
        caller, who knows how many of the tokens are final. ``grid`` as in ``hidden_states``.
        """
        numbers, gather, rows, columns = tokens.rectangle()
        first, count, width = int(numbers[0]), *gather.shape
        host_positions = tokens.positions[gather]
        end = int(host_positions.max()) + 1
        positions = to_index(host_positions, self.device)
        if np.array_equal(host_positions, np.tile(np.arange(end), (count, 1))):
            mask = AttentionMask(causal=True)
        elif (host_positions == end - 1).all():
            mask = AttentionMask()
        else:
            mask = _mask_up_to(positions, end)
        sequences = to_index(numbers, self.device)
        are_neighbours = numbers[-1] - first + 1 == count
        read = slice(first, first + count) if are_neighbours else sequences
        update = functools.partial(cache.update, (sequences.unsqueeze(1), positions), read, end)
        rope = self.rope_table(grid)[to_index(tokens.cells, self.device)]
        index = to_index(gather, self.device)
        x, rope = self.embed(tokens, rope)[index], rope[index]  # (R, T, ...)
        hidden = self._run(x, rope, mask, update).flatten(0, 1)
        return self.output(hidden[to_index(rows * width + columns, self.device)])

    def step_rectangle(
        self, ids: Tensor, rope: Tensor, positions: Tensor, cache: KVCache, end: int
    ) -> Tensor:
        """As ``step`` for codes in static shapes: nothing depends on a value on the host.

        Feeds codes and queries ``ids`` (R, T) with ``rope`` (R, T, E / 2, 2) at ``positions``
        (R, T), each below ``end``, to the cache's first R sequences. Returns logits (R, T, V).
        """
        sequences = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        update = functools.partial(cache.update, (sequences, positions), slice(0, len(ids)), end)
        mask = _mask_up_to(positions, end)
        return self.output(self._run(self._embed_codes(ids, rope), rope, mask, update))

    def _run(
        self, x: Tensor, rope: Tensor, mask: AttentionMask, cache: UpdateCache | None = None
    ) -> Tensor:
        x = self.tok_dropout(x)
        for block in self.layers:
            if self.recompute_blocks and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        return self.norm(x)

    def rope_table(self, grid: Grid | None) -> Tensor:
        """Return cosines and sines of a grid's cells; see ``blocks.rope_table``."""
        config = self.config
        return rope_table(grid or config.grid, config.head_dim, config.rope_base, self.device)


def _mask_up_to(positions: Tensor, end: int) -> AttentionMask:
    """Attention of tokens at ``positions`` (R, T) to all positions up to their own."""
    allowed = torch.arange(end, device=positions.device) <= positions.unsqueeze(-1)
    return AttentionMask(allowed=allowed.unsqueeze(1))


def _training_mask(
    length: int, condition_mask: Tensor | None, device: torch.device
) -> AttentionMask:
    """Causal attention of ``length`` positions, padding left out.

    ``condition_mask`` (B, C) covers the first C positions. A padded position attends to itself
    only, so that its softmax is defined; nothing else attends to it.
    """
    if condition_mask is None:
        return AttentionMask(causal=True)
    key = torch.arange(length, device=device)
    query = key.unsqueeze(-1)
    valid = F.pad(condition_mask.bool(), (0, length - condition_mask.shape[1]), value=True)
    allowed = ((key <= query) & valid[:, None, None, :]) | (key == query)
    return AttentionMask(allowed=allowed, valid=valid)
