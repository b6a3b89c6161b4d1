"""One code of each sequence in, the logits of the next ones out: the step that sampling repeats.

``TorchDecoder`` runs the model; on a CPU ``CpuDecoder`` does the same with kernels of our own,
several times as fast for a few sequences. Shapes: R sequences, C condition length, V codes of the
codebook.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from llamagen.kernels import Kernels, library, load_kernels
from llamagen.transformer.blocks import Cache, TransformerBlock
from llamagen.transformer.cache import KVCache
from llamagen.transformer.model import Transformer
from llamagen.transformer.rope import rope_table

_KINDS = {torch.float32: library.FLOAT32, torch.bfloat16: library.BFLOAT16}


class Decoder(Protocol):
    """Continues sequences by one code."""

    def next_logits(self, codes: Tensor, cache: Cache) -> Tensor:
        """Feeds ``codes`` (R,) behind what ``cache`` holds of each sequence.

        Returns logits (R, V) of the codes that follow, valid until the next call.
        """
        ...


def decoder_for(model: Transformer, *, condition_mask: Tensor | None = None) -> Decoder:
    """The fastest decoder for a model as it is now. Made for one generation, not to be kept longer.

    Args:
        model: in eval mode.
        condition_mask: (R, C) bool, False where the condition of sequences to come is padding.
    """
    kernels = load_kernels() if _has_kernels(model, condition_mask) else None
    return TorchDecoder(model) if kernels is None else CpuDecoder(model, kernels)


class TorchDecoder:
    """Decodes with the model's own operations, on any device."""

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def next_logits(self, codes: Tensor, cache: Cache) -> Tensor:
        """See ``Decoder``."""
        if isinstance(cache, KVCache):
            return self._model.decode(codes.unsqueeze(1), cache)[:, -1]
        return self._model.step(codes, cache)


class CpuDecoder:
    """Decodes with the kernels, on the model's own weights where they lie.

    Differs from ``TorchDecoder`` by rounding only; in bfloat16 it rounds less often.
    """

    def __init__(self, model: Transformer, kernels: Kernels) -> None:
        self._config = model.config
        self._kernels = kernels
        self._kept: list[object] = []  # what the structures point to
        self._model = self._described(model)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0, model.config.codebook_size)

    def next_logits(self, codes: Tensor, cache: Cache) -> Tensor:
        """See ``Decoder``. The logits are float32."""
        config = self._config
        rows, threads = cache.batch, torch.get_num_threads()
        place, cell, first = _places(cache)
        row_stride, head_stride, _, _ = cache.keys[0].stride()
        room = cache.keys[0].shape[2]
        rope = rope_table(cache.grid, 0, config.head_dim, config.rope_base, codes.device)
        codes = codes.to(torch.int64).contiguous()
        assert codes.shape == (rows,), f"codes of shape {tuple(codes.shape)} for {rows} sequences"
        assert place.max() < room, f"position {place.max()} in a cache with room for {room}"
        assert cell.max() < len(rope), f"code {cell.max()} of an image of {len(rope)}"
        need = self._kernels.scratch_bytes(self._model, rows, room, threads)
        if self._scratch.numel() < need:
            self._scratch = torch.zeros(need, dtype=torch.uint8)
        if len(self._logits) != rows:
            self._logits = torch.empty(rows, config.codebook_size)
        step = library.Step(
            rows=rows,
            threads=threads,
            codes=codes.data_ptr(),
            place=place.ctypes.data,
            first=first.ctypes.data,
            cell=cell.ctypes.data,
            rope=rope.data_ptr(),
            keys=library.addresses(cache.keys),
            values=library.addresses(cache.values),
            row_stride=row_stride,
            head_stride=head_stride,
            logits=self._logits.data_ptr(),
            scratch=self._scratch.data_ptr(),
        )
        self._kernels.decode_step(self._model, step)
        cache.advance(1)
        return self._logits

    def _described(self, model: Transformer) -> library.Model:
        config = model.config
        layers = (library.Layer * config.layers)()
        for block, layer in zip(_blocks(model), layers, strict=True):
            layer.attention_norm = self._floats(block.attention_norm.weight)
            layer.ffn_norm = self._floats(block.ffn_norm.weight)
            layer.qkv = self._matrix(block.attention.wqkv)
            layer.out = self._matrix(block.attention.wo)
            layer.gate = self._matrix(block.feed_forward.w1)
            layer.up = self._matrix(block.feed_forward.w3)
            layer.down = self._matrix(block.feed_forward.w2)
        embedding = model.tok_embeddings.weight.detach()
        self._kept += [layers, embedding]
        return library.Model(
            layers=config.layers,
            width=config.dim,
            hidden=config.ffn_dim,
            heads=config.heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            codes=config.codebook_size,
            half=model.dtype == torch.bfloat16,
            eps=config.norm_eps,
            layer=layers,
            embedding=embedding.data_ptr(),
            norm=self._floats(model.norm.weight),
            output=self._matrix(model.output),
        )

    def _floats(self, weight: Tensor) -> int:
        floats = weight.detach().float().contiguous()
        self._kept.append(floats)
        return floats.data_ptr()

    def _matrix(self, linear: nn.Linear) -> library.Matrix:
        weight = linear.weight.detach()
        self._kept.append(weight)
        outputs, inputs = weight.shape
        return library.Matrix(
            data=weight.data_ptr(),
            scales=None,
            kind=_KINDS[weight.dtype],
            outputs=outputs,
            inputs=inputs,
            group=inputs,
        )


def _blocks(model: Transformer) -> list[TransformerBlock]:
    return cast("list[TransformerBlock]", list(model.layers))


def _has_kernels(model: Transformer, condition_mask: Tensor | None) -> bool:
    """Whether the kernels can do what the model does."""
    if model.device.type != "cpu" or model.dtype not in _KINDS or model.training:
        return False
    config = model.config
    linears: list[nn.Module] = [model.output]
    for block in _blocks(model):
        attention, feed_forward = block.attention, block.feed_forward
        linears += [attention.wqkv, attention.wo]
        linears += [feed_forward.w1, feed_forward.w3, feed_forward.w2]
    return (
        all(_is_plain(linear, model.dtype) for linear in linears)
        and model.tok_embeddings.weight.is_contiguous()
        and config.head_dim <= library.WIDEST_HEAD
        and config.codebook_size <= library.MOST_CODES
        and (condition_mask is None or _is_left_padded(condition_mask))
    )


def _is_plain(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a layer is a matrix and nothing else, of a size that the kernels take."""
    if type(linear) is not nn.Linear or getattr(linear, "bias", None) is not None:
        return False
    outputs, inputs = linear.weight.shape
    fits = outputs % library.OUTPUTS == 0 and inputs % library.INPUTS == 0
    return fits and linear.weight.dtype == dtype and linear.weight.is_contiguous()


def _is_left_padded(mask: Tensor) -> bool:
    """Whether padding (False in ``mask``, (R, C)) stands in front of everything else only."""
    kept = mask.bool().int()
    return bool((kept.diff(dim=-1) >= 0).all())


def _places(cache: Cache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R,) int32 each: the position to be filled, the code of the image, the first one attended."""
    if not isinstance(cache, KVCache):
        lengths = np.array(cache.lengths, dtype=np.int32)
        conditions = np.array(cache.conditions, dtype=np.int32)
        return lengths, lengths - conditions, np.zeros_like(lengths)
    lengths = np.full(cache.batch, cache.length, dtype=np.int32)
    first = np.zeros_like(lengths)
    if cache.condition_mask is not None:
        first = (~cache.condition_mask).sum(-1).numpy().astype(np.int32)
    return lengths, lengths - cache.condition_length, first
