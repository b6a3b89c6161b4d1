"""A step of a transformer in C, on the model's own weights where they are.

Shapes: N tokens of a step in R sequences, M of them whose logits are wanted, V codes of the
codebook, D width.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llamagen.backends.cpu import library
from llamagen.backends.cpu.library import Kernels, load_kernels
from llamagen.config import Grid, non_default_fields
from llamagen.models.transformer import (
    NO_CELL,
    QUERY,
    ClassCondition,
    KVCache,
    TextCondition,
    Tokens,
    Transformer,
)
from llamagen.models.transformer.blocks import RMSNorm, TransformerBlock
from llamagen.models.transformer.quantization import QuantizedLinear
from llamagen.support.errors import InputError


@dataclass
class StepTimes:
    """Where the time of generation goes, in seconds; counted by the CPU kernels only."""

    parts: np.ndarray = field(default_factory=lambda: np.zeros(3, dtype=np.float64))
    """(3,) float64: products with weights, attention, the rest of the steps."""
    sampling: float = 0.0
    """Sampling codes from logits."""


class CpuStep:
    """Computes ``Transformer.step`` of one model, as long as its weights stay where they are.

    Differs from the model's own operations by rounding only; in bfloat16 it rounds less often. What
    else is in a step, and how many tokens of a sequence are fed at once, changes no bit of a
    sequence's logits.
    """

    FIELDS = frozenset(
        {
            *("dim", "layers", "heads", "kv_heads", "hidden_dim", "codebook_size", "grid"),
            *("condition", "num_classes", "text_length", "text_dim", "rope_base", "norm_eps"),
            *("token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout"),
            *("drop_path", "quantization", "qk_norm", "order"),
        }
    )
    """Fields of ``TransformerConfig`` that it implements; all others must be at their defaults."""

    def __init__(
        self, model: Transformer, times: StepTimes | None = None, *, kernels: Kernels | None = None
    ) -> None:
        """Prepare steps of a model that ``supports`` accepts; the time they take goes to ``times``.

        ``kernels`` are by default those for this machine.
        """
        kernels = load_kernels() if kernels is None else kernels
        assert kernels is not None, "the kernels cannot be compiled here"
        self._kernels = kernels
        self._source = model
        self._config = model.config
        self._references: list[object] = [times]  # what the structures point to
        self._model = self._model_struct(model)
        tables = [table.weight.detach() for table in _tables(model)]
        self._references += tables
        self._embeddings = np.concatenate(
            [library.row_addresses(table, model.dtype, model.config.dim) for table in tables]
        )
        """Where the embedding of each code, and behind those of each class, begins."""
        self.is_wide = "amx" in kernels.features and model.dtype == torch.bfloat16
        """See ``Step``."""
        self._step = library.Step()
        if times is not None:
            self._step.seconds = library.address(times.parts, np.float64, (3,))
        self._cache: weakref.ref[KVCache] | None = None
        self._grid: Grid | None = None
        self._logits = self._empty_logits(0)

    @classmethod
    def supports(cls, model: Transformer) -> bool:
        """Whether there are kernels here, and they compute what the model computes."""
        config, dtype = model.config, model.dtype
        linears = [model.output, *(x for block in model.blocks for x in _matrices(block).values())]
        return (
            model.device.type == "cpu"
            and dtype in (torch.float32, torch.bfloat16)
            and not model.training
            and not non_default_fields(config, cls.FIELDS)
            and config.head_dim <= library.MAX_HEAD_DIM
            and config.codebook_size <= library.MAX_CODES
            and all(_is_supported_linear(linear, dtype) for linear in linears)
            and len({type(linear) for linear in linears}) == 1  # all quantised, or none
            and all(type(table) is nn.Embedding for table in _tables(model))
            and all(table.weight.dtype == dtype for table in _tables(model))
            and all(table.weight.is_contiguous() for table in _tables(model))
            and load_kernels() is not None
        )

    def __call__(self, tokens: Tokens, cache: KVCache, grid: Grid) -> Tensor:
        """See ``Step``; raise InputError if there is no such code or class. Logits are float32."""
        count, outputs, step = len(tokens), len(tokens.wanted), self._step
        cells = grid[0] * grid[1]
        if self._cache is None or self._cache() is not cache:
            self._use_cache(cache)
        if grid != self._grid:
            self._grid, self._rope = grid, self._source.rope_table(grid)
            shape = (cells + 1, self._config.head_dim // 2, 2)
            step.rope = library.address(self._rope, torch.float32, shape)
            self._queries = self._source.queries(grid)
        arrays = _checked_indices(tokens, cache, cells)
        for name, array in arrays.items():
            setattr(step, name, library.address(array, np.int32, array.shape))
        embedded = None if tokens.features is None else self._project(tokens, tokens.features)
        embeddings = self._embeddings_of(tokens, embedded)
        step.embeddings = library.address(embeddings, np.uintp, (count,))
        if np.array_equal(tokens.wanted, np.arange(count)):
            step.wanted = None  # all of them
        if outputs > len(self._logits):
            self._logits = self._empty_logits(outputs)
            step.logits = library.address(self._logits, torch.float32, self._logits.shape)
        step.rows, step.sequences, step.outputs = count, len(arrays["slots"]), outputs
        step.threads = torch.get_num_threads()
        self._kernels.run_step(self._model, step, cache.positions)
        del arrays, embeddings, embedded  # to which the step pointed
        return self._logits[:outputs]

    def _use_cache(self, cache: KVCache) -> None:
        """Point to a cache's memory, after checking it."""
        config, step = self._config, self._step
        rows = (cache.max_sequences, config.num_kv_heads, cache.positions)
        heads = (*rows, config.head_dim)
        dtype = torch.int8 if cache.key_scales else self._source.dtype

        def pointers(tensors: list[Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
            if len(tensors) != config.layers:
                raise ValueError(f"a cache of {len(tensors)} layers, expected {config.layers}")
            found = (library.address(tensor, dtype, shape) for tensor in tensors)
            return (ctypes.c_void_p * len(tensors))(*found)

        step.keys, step.values = (pointers(x, dtype, heads) for x in (cache.keys, cache.values))
        step.key_scales = step.value_scales = None
        if cache.key_scales:
            step.key_scales = pointers(cache.key_scales, torch.float32, rows)
            step.value_scales = pointers(cache.value_scales, torch.float32, rows)
        step.head_stride = cache.positions * config.head_dim
        step.slot_stride = config.num_kv_heads * step.head_stride
        self._cache = weakref.ref(cache)

    def _empty_logits(self, count: int) -> Tensor:
        return torch.empty(count, self._config.codebook_size, dtype=torch.float32, device="cpu")

    def _embeddings_of(self, tokens: Tokens, embedded: Tensor | None) -> np.ndarray:
        """Addresses (N,) of the embeddings of tokens; ``embedded`` (F, D) are those of a text."""
        ids, count, is_text = tokens.ids.numpy(), len(tokens), tokens.cells == NO_CELL
        if ids.shape != (count,) or ids.dtype != np.int64:
            raise ValueError(f"ids are {ids.shape} {ids.dtype}, expected {count} int64")
        if embedded is None and self._queries is None:
            return self._rows_of_tables(ids)
        is_query = (ids == QUERY) & ~is_text
        if embedded is None:
            is_text = np.zeros_like(is_query)
        found = self._rows_of_tables(np.where(is_query | is_text, 0, ids))
        for table, where, rows in (
            (embedded, is_text, slice(None)),
            (self._queries, is_query, tokens.cells[is_query]),
        ):
            if table is not None:
                addresses = library.row_addresses(table, self._source.dtype, self._config.dim)
                found[where] = addresses[rows]
        return found

    def _rows_of_tables(self, ids: np.ndarray) -> np.ndarray:
        """Addresses (N,) of the embeddings of codes and classes."""
        try:
            # A negative index would count from the end.
            if len(ids) and int(ids.min()) >= 0:
                return self._embeddings.take(ids)
        except IndexError:
            pass
        size, end = self._config.codebook_size, len(self._embeddings)
        raise InputError(
            f"ids run from {ids.min()} to {ids.max()}, but this model has codes 0 to "
            f"{size - 1}" + (f" and classes {size} to {end - 1}" if end > size else "")
        )

    def _project(self, tokens: Tokens, features: Tensor) -> Tensor:
        """Embeddings (F, D) of text features.

        They are those of each sequence by itself, in the rows of a matrix of one size that their
        positions say: so nothing else that is fed changes a bit of them.
        """
        condition, is_text = self._source.cls_embedding, tokens.cells == NO_CELL
        assert isinstance(condition, TextCondition), "text features for a model of classes"
        (length, width), count = condition.uncond_embedding.shape, int(is_text.sum())
        assert features.shape == (count, width), f"text features {tuple(features.shape)}"
        own_positions, sequences = tokens.positions[is_text], tokens.sequences[is_text]
        library.check_indices(own_positions, count, 0, length, "positions")
        positions = torch.from_numpy(own_positions.astype(np.int64))
        options: Any = {"dtype": self._source.dtype, "device": "cpu"}
        embedded = torch.empty(count, self._config.dim, **options)
        for sequence in np.unique(sequences):
            (own,) = (sequences == sequence).nonzero()
            text = torch.zeros(length, width, **options)
            text[positions[own]] = features[own].to(text.dtype)
            embedded[own] = condition.project(text)[positions[own]]
        return embedded

    def _model_struct(self, model: Transformer) -> library.Model:
        config = model.config
        layers = (library.Layer * config.layers)()
        for block, layer in zip(model.blocks, layers, strict=True):
            layer.attention_norm = self._norm(block.attention_norm, config.dim)
            layer.ffn_norm = self._norm(block.ffn_norm, config.dim)
            layer.q_norm = self._norm(block.attention.q_norm, config.head_dim)
            layer.k_norm = self._norm(block.attention.k_norm, config.head_dim)
            for name, linear in _matrices(block).items():
                setattr(layer, name, self._matrix(linear))
        self._references.append(layers)
        return library.Model(
            *(config.layers, config.dim, config.ffn_dim, config.heads, config.num_kv_heads),
            *(config.head_dim, config.codebook_size, model.dtype == torch.bfloat16),
            *(config.norm_eps, layers, self._norm(model.norm, config.dim)),
            self._matrix(model.output),
        )

    def _norm(self, norm: RMSNorm | None, size: int) -> int | None:
        if norm is None:
            return None
        weight = norm.weight.detach().float().contiguous()
        self._references.append(weight)
        return library.address(weight, torch.float32, (size,))

    def _matrix(self, linear: nn.Linear | QuantizedLinear) -> library.Matrix:
        weight = linear.weight.detach()
        outputs, inputs = linear.out_features, linear.in_features
        scales = linear.scales if isinstance(linear, QuantizedLinear) else None
        self._references += [weight, scales]
        return library.Matrix(
            library.address(weight, weight.dtype, (outputs, inputs)),
            None if scales is None else library.address(scales, torch.float32, (outputs,)),
            *(library.WEIGHT_TYPES[weight.dtype], outputs, inputs),
        )


def _checked_indices(tokens: Tokens, cache: KVCache, cells: int) -> dict[str, np.ndarray]:
    """Arrays of ``library.Step`` for tokens, of which the cache and the grid hold all."""
    count, wanted = len(tokens), tokens.wanted
    library.check_indices(tokens.sequences, count, 0, cache.max_sequences, "sequences")
    library.check_indices(tokens.positions, count, 0, cache.positions, "positions")
    library.check_indices(tokens.cells, count, -1, cells, "cells")
    library.check_indices(wanted, len(wanted), 0, count, "wanted tokens")
    if len(wanted) > count:
        raise ValueError(f"{len(wanted)} wanted tokens, expected at most {count}")
    starts = np.flatnonzero(np.diff(tokens.sequences, prepend=-1))
    slots = tokens.sequences[starts]
    if not (np.diff(slots) > 0).all():
        raise ValueError("tokens of a sequence are not neighbours, or sequences not ascending")
    indices = {
        "positions": tokens.positions,
        "cells": np.remainder(tokens.cells, cells + 1),  # the table's last row is for -1
        "starts": np.append(starts, count),
        "slots": slots,
        "wanted": wanted,
    }
    return {name: np.ascontiguousarray(own, np.int32) for name, own in indices.items()}


def _matrices(block: TransformerBlock) -> dict[str, Any]:
    """Those of ``library.Layer``: linear layers, quantised or not."""
    own, ffn = block.attention, block.feed_forward
    return {"qkv": own.wqkv, "out": own.wo, "gate": ffn.w1, "up": ffn.w3, "down": ffn.w2}


def _tables(model: Transformer) -> list[nn.Embedding]:
    """The tables of embeddings: of codes, and of classes if the model has them."""
    condition = model.cls_embedding
    if isinstance(condition, ClassCondition):
        return [model.tok_embeddings, condition.embedding_table]
    return [model.tok_embeddings]


def _is_supported_linear(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a layer is a matrix and nothing else, of a size that the kernels take."""
    if type(linear) is nn.Linear:
        known = linear.weight.dtype == dtype and getattr(linear, "bias", None) is None
    elif type(linear) is QuantizedLinear:
        known = linear.weight.dtype == torch.int8 and linear.scales.dtype == torch.float32
        known = known and linear.scales.is_contiguous()
    else:
        return False
    fits = linear.out_features % library.OUTPUTS == 0 == linear.in_features % library.INPUTS
    return known and fits and linear.weight.is_contiguous()
