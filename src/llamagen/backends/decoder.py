"""One code of each sequence in, the logits of the next ones out: the step that sampling repeats.

``TorchDecoder`` runs the model; on a CPU ``CpuDecoder`` does the same with kernels of our own,
several times as fast for a few sequences; on a CUDA device ``GraphDecoder`` (``graphs``) plays
recorded steps. Shapes: R sequences, C condition length, V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Embedding

from llamagen.backends.cpu import Kernels, library, load_kernels
from llamagen.backends.graphs import GraphDecoder, has_graphs
from llamagen.models.transformer.blocks import Cache
from llamagen.models.transformer.cache import KVCache
from llamagen.models.transformer.condition import ClassCondition
from llamagen.models.transformer.model import Transformer
from llamagen.models.transformer.quantized import QuantizedLinear
from llamagen.models.transformer.rope import rope_table
from llamagen.models.transformer.slots import SlotCache

_PRECISIONS = (torch.float32, torch.bfloat16)
_KINDS = {
    torch.float32: library.FLOAT32,
    torch.bfloat16: library.BFLOAT16,
    torch.int8: library.INT8,
    torch.uint8: library.INT4,
}

_FED_AT_ONCE = 16
"""Known codes of a sequence in a pass of the kernels, which compute the logits behind each."""


@dataclass
class StepTimes:
    """Where the time of decoding goes, in seconds; counted by ``CpuDecoder`` only."""

    parts: np.ndarray = field(default_factory=lambda: np.zeros(3))
    """(3,) float64: products with weights, attention, the rest of the steps."""
    drawing: float = 0.0
    """Drawing codes from logits."""


class Decoder(Protocol):
    """Starts sequences, and continues them by codes."""

    def start(
        self, condition: Tensor, cache: Cache, *, condition_mask: Tensor | None = None
    ) -> Tensor:
        """Runs conditions into an empty ``KVCache``, or behind the sequences of slots.

        Args:
            condition: as ``Transformer.forward`` takes it.
            cache: for so many more sequences.
            condition_mask: (B, C) bool, False where the condition is padding; not with slots.

        Returns logits (B, V) of the first codes.
        """
        ...

    def next_logits(self, codes: Tensor, cache: Cache) -> Tensor:
        """Feeds ``codes`` (R,) behind what ``cache`` holds of each sequence.

        Returns logits (R, V) of the codes that follow, valid until the next call.
        """
        ...

    def feed(self, codes: Tensor, cache: KVCache) -> Tensor:
        """As ``next_logits``, but several codes (R, T) of each sequence, which are known already.

        Returns logits (R, V) of what follows the last of them.
        """
        ...

    def extend(self, codes: Tensor, slots: SlotCache) -> Tensor:
        """Feeds several codes (R, T) to each sequence, without counting their positions as filled.

        Returns logits (R, T, V); row t predicts what follows codes[:, t]. Valid until the next
        call.
        """
        ...

    def extend_at(self, codes: Tensor, slots: SlotCache, cells: Sequence[int]) -> Tensor:
        """As ``extend``, but ``codes`` (R, T) take the places of ``cells`` (T,) in their images.

        Each attends to all cells up to its own, which must hold something.
        """
        ...


def decoder_for(
    model: Transformer, *, condition_mask: Tensor | None = None, times: StepTimes | None = None
) -> Decoder:
    """The fastest decoder for a model, to be used as long as its weights stay where they are.

    Args:
        model: in eval mode.
        condition_mask: (R, C) bool, False where the condition of sequences to come is padding.
        times: to be added to.
    """
    if has_graphs(model):
        return GraphDecoder(model)
    kernels = load_kernels() if _has_kernels(model, condition_mask) else None
    return TorchDecoder(model) if kernels is None else CpuDecoder(model, kernels, times)


class TorchDecoder:
    """Decodes with the model's own operations, on any device."""

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def start(
        self, condition: Tensor, cache: Cache, *, condition_mask: Tensor | None = None
    ) -> Tensor:
        """See ``Decoder``."""
        return self._model.start(condition, cache, condition_mask=condition_mask)

    def next_logits(self, codes: Tensor, cache: Cache) -> Tensor:
        """See ``Decoder``."""
        if isinstance(cache, KVCache):
            return self._model.decode(codes.unsqueeze(1), cache)[:, -1]
        return self._model.step(codes, cache)

    def feed(self, codes: Tensor, cache: KVCache) -> Tensor:
        """See ``Decoder``."""
        return self._model.decode(codes, cache)[:, -1]

    def extend(self, codes: Tensor, slots: SlotCache) -> Tensor:
        """See ``Decoder``."""
        return self._model.extend(codes, slots)

    def extend_at(self, codes: Tensor, slots: SlotCache, cells: Sequence[int]) -> Tensor:
        """See ``Decoder``."""
        return self._model.extend_at(codes, slots, cells)


class CpuDecoder:
    """Decodes with the kernels, on the model's own weights where they lie.

    Differs from ``TorchDecoder`` by rounding only; in bfloat16 it rounds less often. What else is
    in a batch, and how many codes are fed at once, changes no bit of a sequence's logits.
    """

    def __init__(
        self, model: Transformer, kernels: Kernels, times: StepTimes | None = None
    ) -> None:
        self._times = times
        self._source = model
        self._config = model.config
        self._kernels = kernels
        self._kept: list[object] = []  # what the structures point to
        self._model = self._described(model)
        self._starts = self._described_start(model)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0, model.config.codebook_size)

    @property
    def has_tiles(self) -> bool:
        """Whether sixteen rows take the time of one."""
        return "tiles" in self._kernels.features and self._model.half == 1

    def start(
        self, condition: Tensor, cache: Cache, *, condition_mask: Tensor | None = None
    ) -> Tensor:
        """See ``Decoder``. A class is like one more code; a text is left to the model.

        Raises:
            InputError: there is no such class.
        """
        source = self._source
        if self._starts is None or condition.ndim != 1:
            return source.start(condition, cache, condition_mask=condition_mask)
        # The kernels read whatever lies where a label points to.
        source.cls_embedding.check(condition)
        if isinstance(cache, SlotCache):
            own = source.new_cache(len(condition), condition_length=1, grid=(1, 1))
            logits = self.start(condition, own)
            cache.admit(own)
            return logits
        nowhere = np.zeros(len(condition), dtype=np.int32)
        config = self._config
        rope = rope_table(cache.grid, 1, config.head_dim, config.rope_base, source.device)
        places = _Places(nowhere, nowhere, nowhere)
        logits = self._run(condition.unsqueeze(1), cache, places, self._starts, rope)
        cache.advance(1)
        return logits

    def next_logits(self, codes: Tensor, cache: Cache) -> Tensor:
        """See ``Decoder``. The logits are float32."""
        logits = self._run(codes.unsqueeze(1), cache, _next_places(cache, 1))
        cache.advance(1)
        return logits

    def feed(self, codes: Tensor, cache: KVCache) -> Tensor:
        """See ``Decoder``. The logits are float32, and the same bits as of codes fed one by one."""
        for part in codes.split(_FED_AT_ONCE, dim=1):
            window = part.shape[1]
            logits = self._run(part, cache, _next_places(cache, window))
            cache.advance(window)
        return logits.unflatten(0, part.shape)[:, -1]

    def extend(self, codes: Tensor, slots: SlotCache) -> Tensor:
        """See ``Decoder``. The logits are float32."""
        places = _next_places(slots, codes.shape[1])
        return self._run(codes, slots, places).unflatten(0, codes.shape)

    def extend_at(self, codes: Tensor, slots: SlotCache, cells: Sequence[int]) -> Tensor:
        """See ``Decoder``. The logits are float32."""
        return self._run(codes, slots, _places_of(cells, slots)).unflatten(0, codes.shape)

    def _run(
        self,
        codes: Tensor,
        cache: Cache,
        places: _Places,
        model: library.Model | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Logits (R * T, V) behind each of ``codes`` (R, T).

        ``model`` is another one than that of codes, ``rope`` another table than that of images.
        """
        model = self._model if model is None else model
        config, threads = self._config, torch.get_num_threads()
        sequences, window = codes.shape
        rows = sequences * window
        place, cell, first = places
        row_stride, head_stride, _, _ = cache.keys[0].stride()
        room = cache.keys[0].shape[2]
        if rope is None:
            rope = rope_table(cache.grid, 0, config.head_dim, config.rope_base, codes.device)
        codes = codes.to(torch.int64).contiguous()
        assert sequences == cache.batch, f"codes of {sequences} sequences for {cache.batch}"
        assert place.max() < room, f"position {place.max()} in a cache with room for {room}"
        need = self._kernels.scratch_bytes(model, rows, room, threads)
        if self._scratch.numel() < need:
            self._scratch = torch.zeros(need, dtype=torch.uint8)
        if len(self._logits) != rows:
            self._logits = torch.empty(rows, config.codebook_size)
        step = library.Step(
            rows=rows,
            threads=threads,
            window=window,
            codes=codes.data_ptr(),
            place=place.ctypes.data,
            first=first.ctypes.data,
            cell=cell.ctypes.data,
            rope=rope.data_ptr(),
            keys=library.addresses(cache.keys),
            values=library.addresses(cache.values),
            key_scales=library.addresses(cache.key_scales) if cache.key_scales else None,
            value_scales=library.addresses(cache.value_scales) if cache.value_scales else None,
            row_stride=row_stride,
            head_stride=head_stride,
            logits=self._logits.data_ptr(),
            scratch=self._scratch.data_ptr(),
            seconds=None if self._times is None else self._times.parts.ctypes.data,
        )
        self._kernels.decode_step(model, step)
        return self._logits

    def _described(self, model: Transformer) -> library.Model:
        config = model.config
        layers = (library.Layer * config.layers)()
        for block, layer in zip(model.blocks, layers, strict=True):
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

    def _described_start(self, model: Transformer) -> library.Model | None:
        """The same, with classes in the place of codes; None if conditions are no classes."""
        condition = model.cls_embedding
        if (
            type(condition) is not ClassCondition
            or type(condition.embedding_table) is not Embedding
        ):
            return None
        table = condition.embedding_table.weight.detach()
        if table.dtype != model.dtype or not table.is_contiguous():
            return None
        self._kept.append(table)
        described = library.Model.from_buffer_copy(self._model)
        described.embedding = table.data_ptr()
        return described

    def _floats(self, weight: Tensor) -> int:
        floats = weight.detach().float().contiguous()
        self._kept.append(floats)
        return floats.data_ptr()

    def _matrix(self, linear: nn.Linear | QuantizedLinear) -> library.Matrix:
        weight = linear.weight.detach()
        scales, factors = None, None
        if isinstance(linear, QuantizedLinear):
            scales, factors = linear.scales, linear.factors
        self._kept += [weight, scales, factors]
        return library.Matrix(
            data=weight.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
            factors=None if factors is None else factors.data_ptr(),
            kind=_KINDS[weight.dtype],
            outputs=linear.out_features,
            inputs=linear.in_features,
        )


def _has_kernels(model: Transformer, condition_mask: Tensor | None) -> bool:
    """Whether the kernels can do what the model does."""
    if model.device.type != "cpu" or model.dtype not in _PRECISIONS or model.training:
        return False
    config = model.config
    linears: list[nn.Module] = [model.output]
    for block in model.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        linears += [attention.wqkv, attention.wo]
        linears += [feed_forward.w1, feed_forward.w3, feed_forward.w2]
    return (
        all(_is_plain(linear, model.dtype) for linear in linears)
        and len({type(linear) for linear in linears}) == 1  # all quantised, or none
        and model.tok_embeddings.weight.is_contiguous()
        and config.head_dim <= library.WIDEST_HEAD
        and config.codebook_size <= library.MOST_CODES
        and (condition_mask is None or _is_left_padded(condition_mask))
    )


def _is_plain(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a layer is a matrix and nothing else, of a size that the kernels take."""
    if type(linear) is nn.Linear:
        known = linear.weight.dtype == dtype and getattr(linear, "bias", None) is None
    elif type(linear) is QuantizedLinear:
        known = linear.scales.dtype == torch.float32 and linear.scales.is_contiguous()
    else:
        return False
    outputs, inputs = linear.out_features, linear.in_features
    fits = outputs % library.OUTPUTS == 0 and inputs % library.INPUTS == 0
    return known and fits and linear.weight.is_contiguous()


def _is_left_padded(mask: Tensor) -> bool:
    """Whether padding (False in ``mask``, (R, C)) stands in front of everything else only."""
    kept = mask.bool().int()
    return bool((kept.diff(dim=-1) >= 0).all())


class _Places(NamedTuple):
    """Of each code that is fed, (R * T,) int32."""

    position: np.ndarray
    """The one to be filled, which is the last one attended to."""
    cell: np.ndarray
    """The code's place in its image."""
    first: np.ndarray
    """The first position attended to."""


def _next_places(cache: Cache, window: int) -> _Places:
    """Of the next codes of each sequence, ``window`` (T) of them."""
    if isinstance(cache, KVCache):
        lengths = np.full(cache.batch, cache.length, dtype=np.int32)
        conditions = np.full(cache.batch, cache.condition_length, dtype=np.int32)
    else:
        lengths = np.array(cache.lengths, dtype=np.int32)
        conditions = np.array(cache.conditions, dtype=np.int32)
    first = np.zeros_like(lengths)
    if isinstance(cache, KVCache) and cache.condition_mask is not None:
        first = (~cache.condition_mask).sum(-1).numpy().astype(np.int32)
    place = (lengths[:, None] + np.arange(window, dtype=np.int32)).ravel()
    # Past an image's last code a window has that code's place: what is drawn there means nothing.
    last = cache.grid[0] * cache.grid[1] - 1
    cell = np.minimum(place - conditions.repeat(window), last)
    return _Places(place, cell, first.repeat(window))


def _places_of(cells: Sequence[int], slots: SlotCache) -> _Places:
    """Of the codes in ``cells`` (T,) of each image."""
    count = slots.grid[0] * slots.grid[1]
    assert max(cells) < count, f"cell {max(cells)} of an image of {count} codes"
    conditions = np.array(slots.conditions, dtype=np.int32)
    cell = np.tile(np.array(cells, dtype=np.int32), len(conditions))
    position = conditions.repeat(len(cells)) + cell
    return _Places(position, cell, np.zeros_like(position))
