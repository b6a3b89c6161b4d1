"""A step of a transformer in C, on the model's own weights where they are.

Shapes: N tokens of a step in R sequences, M of them whose logits are wanted, V codes of the
codebook, D width.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llamagen.backends.cpu import library
from llamagen.backends.cpu.library import Kernels, load_kernels
from llamagen.backends.step import StepTimes
from llamagen.config import Grid, non_default_fields
from llamagen.models.transformer.blocks import RMSNorm
from llamagen.models.transformer.conditioning import ClassCondition, TextCondition
from llamagen.models.transformer.kv_cache import KVCache
from llamagen.models.transformer.model import Transformer
from llamagen.models.transformer.quantization import QuantizedLinear
from llamagen.models.transformer.rope import rope_table
from llamagen.models.transformer.tokens import Tokens
from llamagen.support.errors import InputError

_MODEL_DTYPES = (torch.float32, torch.bfloat16)
_WEIGHT_TYPES = {
    torch.float32: library.FLOAT32,
    torch.bfloat16: library.BFLOAT16,
    torch.int8: library.INT8,
}


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
            *("drop_path", "quantization", "qk_norm"),
        }
    )
    """Fields of ``TransformerConfig`` that are implemented. A model in which any other one is not
    at its default is refused."""

    def __init__(
        self,
        model: Transformer,
        times: StepTimes | None = None,
        *,
        kernels: Kernels | None = None,
    ) -> None:
        """Prepare steps of a model that ``supports`` accepts.

        Args:
            model: in eval mode.
            times: where the time goes is added to it.
            kernels: others than those for this machine.
        """
        kernels = load_kernels() if kernels is None else kernels
        assert kernels is not None, "the kernels cannot be compiled here"
        self._kernels = kernels
        self._source = model
        self._config = model.config
        self._times = times
        self._references: list[object] = []  # to what the structures point to
        self._model = self._model_struct(model)
        self._addresses = self._embedding_addresses(model)
        self.is_wide = "amx" in kernels.features and model.dtype == torch.bfloat16
        """See ``Step``."""
        self._step = library.Step()
        if times is not None:
            self._step.seconds = library.array_address(times.parts, np.float64, (3,))
        self._cache: weakref.ref[KVCache] | None = None
        self._cache_shape = (0, 0)
        self._grid: Grid | None = None
        self._scratch_for: tuple[int, ...] = ()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0, self._config.codebook_size, dtype=torch.float32)

    @classmethod
    def supports(cls, model: Transformer) -> bool:
        """Whether there are kernels here, and they compute what the model computes."""
        if model.device.type != "cpu" or model.dtype not in _MODEL_DTYPES or model.training:
            return False
        config = model.config
        linears: list[nn.Module] = [model.output]
        for block in model.blocks:
            attention, feed_forward = block.attention, block.feed_forward
            linears += [attention.wqkv, attention.wo]
            linears += [feed_forward.w1, feed_forward.w3, feed_forward.w2]
        return (
            not non_default_fields(config, cls.FIELDS)
            and config.head_dim <= library.MAX_HEAD_DIM
            and config.codebook_size <= library.MAX_CODES
            and all(_is_supported_linear(linear, model.dtype) for linear in linears)
            and len({type(linear) for linear in linears}) == 1  # all quantised, or none
            and all(_is_plain_table(table, model.dtype) for table in _tables(model))
            and load_kernels() is not None
        )

    def __call__(self, tokens: Tokens, cache: KVCache, grid: Grid) -> Tensor:
        """Feed tokens to sequences of a cache, where their keys and values are stored.

        Args:
            tokens: what is fed.
            cache: holds the positions before those of the tokens, for each sequence.
            grid: rows and columns of the image.

        Returns:
            (M, V) float32, the logits of the tokens that are wanted. Valid until the next call.

        Raises:
            InputError: there is no such code or class.
        """
        count, step = len(tokens), self._step
        if tokens.features is None:
            embedded = None
            addresses = self._addresses_of(tokens.ids, count)
        else:
            embedded = self._project(tokens, tokens.features)
            addresses = library.row_addresses(embedded, np.arange(count))
        if self._cache is None or self._cache() is not cache:
            self._use_cache(cache)
        if grid != self._grid:
            self._use_grid(grid)
        sequences, positions = self._cache_shape
        cells = grid[0] * grid[1]
        library.check_indices(tokens.sequences, count, 0, sequences, "sequences")
        library.check_indices(tokens.positions, count, 0, positions, "positions")
        library.check_indices(tokens.cells, count, -1, cells, "cells")
        wanted = tokens.wanted
        outputs = len(wanted)
        library.check_indices(wanted, outputs, 0, count, "wanted tokens")
        if outputs > count:
            raise ValueError(f"{outputs} wanted tokens, expected at most {count}")

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
        arrays = {name: np.ascontiguousarray(own, np.int32) for name, own in indices.items()}
        arrays["embeddings"] = addresses
        for name, array in arrays.items():
            setattr(step, name, array.ctypes.data)
        if np.array_equal(wanted, np.arange(count)):
            step.wanted = None  # all of them

        threads = torch.get_num_threads()
        scratch_for = (count, positions, threads)
        if scratch_for != self._scratch_for:
            self._reserve_scratch(*scratch_for)
        if outputs > len(self._logits):
            self._logits = torch.empty(outputs, self._config.codebook_size, dtype=torch.float32)
            step.logits = self._logits.data_ptr()
        step.rows, step.sequences, step.outputs, step.threads = count, len(slots), outputs, threads
        self._kernels.run_step(self._model, step)
        del arrays, embedded  # to which the step pointed
        return self._logits[:outputs]

    def _reserve_scratch(self, count: int, positions: int, threads: int) -> None:
        need = self._kernels.scratch_bytes(self._model, count, positions, threads)
        if self._scratch.numel() < need:
            self._scratch = torch.zeros(need, dtype=torch.uint8)
            self._step.scratch = self._scratch.data_ptr()
        self._scratch_for = (count, positions, threads)

    def _use_cache(self, cache: KVCache) -> None:
        """Point to a cache's memory, after checking it."""
        config, step = self._config, self._step
        sequences, _, positions, _ = cache.keys[0].shape
        dtype = torch.int8 if cache.key_scales else self._source.dtype
        shape = (sequences, config.num_kv_heads, positions, config.head_dim)
        stride = cache.keys[0].stride()
        if stride[2:] != (config.head_dim, 1):
            raise ValueError(f"strides are {stride}, expected heads of {config.head_dim} in a row")

        def pointers(tensors: Sequence[Tensor], *, scales: bool = False) -> object:
            if scales and not tensors:
                return None
            if len(tensors) != config.layers:
                raise ValueError(f"a cache of {len(tensors)} layers, expected {config.layers}")
            layout: tuple[Any, ...] = (dtype, shape, stride)
            if scales:
                strides = (stride[0] // config.head_dim, stride[1] // config.head_dim, 1)
                layout = (torch.float32, shape[:3], strides)
            found = (library.address(tensor, *layout) for tensor in tensors)
            return (ctypes.c_void_p * len(tensors))(*found)

        step.keys, step.values = pointers(cache.keys), pointers(cache.values)
        step.key_scales = pointers(cache.key_scales, scales=True)
        step.value_scales = pointers(cache.value_scales, scales=True)
        step.slot_stride, step.head_stride = stride[:2]
        self._cache = weakref.ref(cache)
        self._cache_shape = (sequences, positions)

    def _use_grid(self, grid: Grid) -> None:
        config = self._config
        self._rope = rope_table(grid, config.head_dim, config.rope_base, self._source.device)
        shape = (grid[0] * grid[1] + 1, config.head_dim // 2, 2)
        self._step.rope = library.address(self._rope, torch.float32, shape)
        self._grid = grid

    def _addresses_of(self, ids: Tensor, count: int) -> np.ndarray:
        """Addresses (N,) of the embeddings of codes and classes."""
        numbers = ids.numpy()
        if numbers.shape != (count,) or numbers.dtype != np.int64:
            raise ValueError(f"ids are {numbers.shape} {numbers.dtype}, expected {count} int64")
        try:
            # A negative index would count from the end.
            if len(numbers) and int(numbers.min()) >= 0:
                return self._addresses.take(numbers)
        except IndexError:
            pass
        size = self._config.codebook_size
        classes = len(self._addresses) - size
        raise InputError(
            f"ids run from {numbers.min()} to {numbers.max()}, but this model has codes 0 to "
            f"{size - 1}" + (f" and classes {size} to {size + classes - 1}" if classes else "")
        )

    def _project(self, tokens: Tokens, features: Tensor) -> Tensor:
        """Embeddings (N, D) of text features.

        They are those of each sequence by itself, in the rows of a matrix of one size that their
        positions say: so nothing else that is fed changes a bit of them.
        """
        condition = self._source.cls_embedding
        assert isinstance(condition, TextCondition), "text features for a model of classes"
        length, width = condition.uncond_embedding.shape
        assert features.shape == (len(tokens), width), f"text features {tuple(features.shape)}"
        library.check_indices(tokens.positions, len(tokens), 0, length, "positions")
        positions = torch.from_numpy(tokens.positions.astype(np.int64))
        embedded = torch.empty(len(tokens), self._config.dim, dtype=self._source.dtype)
        for sequence in np.unique(tokens.sequences):
            (own,) = (tokens.sequences == sequence).nonzero()
            text = torch.zeros(length, width, dtype=self._source.dtype)
            text[positions[own]] = features[own].to(text.dtype)
            embedded[own] = condition.project(text)[positions[own]]
        return embedded

    def _embedding_addresses(self, model: Transformer) -> np.ndarray:
        """Where the embedding of each code, and behind those of each class, begins."""
        tables = [table.weight.detach() for table in _tables(model)]
        self._references += tables
        return np.concatenate(
            [library.row_addresses(table, np.arange(len(table))) for table in tables]
        )

    def _model_struct(self, model: Transformer) -> library.Model:
        config = model.config
        layers = (library.Layer * config.layers)()
        for block, layer in zip(model.blocks, layers, strict=True):
            layer.attention_norm = self._norm(block.attention_norm)
            layer.ffn_norm = self._norm(block.ffn_norm)
            layer.q_norm = self._norm(block.attention.q_norm)
            layer.k_norm = self._norm(block.attention.k_norm)
            layer.qkv = self._matrix(block.attention.wqkv)
            layer.out = self._matrix(block.attention.wo)
            layer.gate = self._matrix(block.feed_forward.w1)
            layer.up = self._matrix(block.feed_forward.w3)
            layer.down = self._matrix(block.feed_forward.w2)
        self._references.append(layers)
        return library.Model(
            layers=config.layers,
            width=config.dim,
            hidden=config.ffn_dim,
            heads=config.heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            codes=config.codebook_size,
            is_bf16=model.dtype == torch.bfloat16,
            eps=config.norm_eps,
            layer=layers,
            norm=self._norm(model.norm),
            output=self._matrix(model.output),
        )

    def _norm(self, norm: RMSNorm | None) -> int | None:
        if norm is None:
            return None
        weight = norm.weight.detach().float().contiguous()
        self._references.append(weight)
        return library.address(weight, torch.float32, weight.shape)

    def _matrix(self, linear: nn.Linear | QuantizedLinear) -> library.Matrix:
        weight = linear.weight.detach()
        outputs, inputs = linear.out_features, linear.in_features
        scales = linear.scales if isinstance(linear, QuantizedLinear) else None
        self._references += [weight, scales]
        return library.Matrix(
            data=library.address(weight, weight.dtype, (outputs, inputs)),
            scales=None if scales is None else library.address(scales, torch.float32, (outputs,)),
            type=_WEIGHT_TYPES[weight.dtype],
            outputs=outputs,
            inputs=inputs,
        )


def _tables(model: Transformer) -> list[nn.Embedding]:
    """The tables of embeddings: of codes, and of classes if the model has them."""
    condition = model.cls_embedding
    return [
        model.tok_embeddings,
        *([condition.embedding_table] if isinstance(condition, ClassCondition) else []),
    ]


def _is_plain_table(table: nn.Module, dtype: torch.dtype) -> bool:
    if type(table) is not nn.Embedding:
        return False
    return table.weight.dtype == dtype and table.weight.is_contiguous()


def _is_supported_linear(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a layer is a matrix and nothing else, of a size that the kernels take."""
    if type(linear) is nn.Linear:
        known = linear.weight.dtype == dtype and getattr(linear, "bias", None) is None
    elif type(linear) is QuantizedLinear:
        known = linear.weight.dtype == torch.int8 and linear.scales.dtype == torch.float32
        known = known and linear.scales.is_contiguous()
    else:
        return False
    outputs, inputs = linear.out_features, linear.in_features
    fits = outputs % library.OUTPUTS == 0 and inputs % library.INPUTS == 0
    return known and fits and linear.weight.is_contiguous()
