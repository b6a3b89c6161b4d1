"""Decoding on a GPU: steps that are recorded as CUDA graphs, and never wait for the host.

A recording holds for the memory that it was made with. So what a step reads lies in buffers of the
decoder's own, and a cache elsewhere in memory is another recording. Decoders of one model take
their buffers and recordings over from each other, so that the second image starts with those of
the first.

Shapes: R sequences, T codes fed to each, K key-value heads, L positions, E head dimension, V codes
of the codebook.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llamagen.backends import cuda_graphs
from llamagen.backends.cuda_graphs import CudaTape, Recorder
from llamagen.backends.static_step import StepInputs, static_step
from llamagen.config import Grid
from llamagen.models.transformer.blocks import Cache, TransformerBlock
from llamagen.models.transformer.cache import KVCache
from llamagen.models.transformer.model import Transformer
from llamagen.models.transformer.quantized import QuantizedLinear
from llamagen.models.transformer.rope import rope_table
from llamagen.models.transformer.slots import SlotCache

_ATTENDED = 64
"""Attention reaches over whole pieces of so many positions, so that one recording serves as many
steps; half of a piece is read for nothing."""
_MOST_GRAPHS = 64
"""Recordings that are kept: of a few numbers of sequences, each at all lengths of an image."""
_MOST_BUFFERS = 16

_Shelf = weakref.WeakKeyDictionary[Transformer, "list[DecoderState]"]
_idle: dict[torch.device, _Shelf] = {}
"""What no decoder uses at the moment, of the models on each device."""


def has_graphs(model: Transformer) -> bool:
    """Whether ``GraphDecoder`` can do what the model does, on a device where it pays."""
    if not cuda_graphs.wanted(model.device) or model.training:
        return False
    # Steps read keys and values as they are kept.
    if model.cache_dtype != model.dtype:
        return False
    # Autocast keeps copies of weights, which a recording would outlive.
    if torch.is_autocast_enabled("cuda"):
        return False
    linears: list[nn.Module] = [model.output]
    for block in model.blocks:
        # Not a subclass: what shards or adapts a block makes one of it.
        if type(block) is not TransformerBlock:
            return False
        attention, feed_forward = block.attention, block.feed_forward
        linears += [attention.wqkv, attention.wo]
        linears += [feed_forward.w1, feed_forward.w3, feed_forward.w2]
    return all(type(linear) in (nn.Linear, QuantizedLinear) for linear in linears)


class GraphDecoder:
    """Decodes with ``static_step``, recorded; differs from ``TorchDecoder`` by rounding only."""

    def __init__(self, model: Transformer, recorder: Recorder | None = None) -> None:
        """Takes over what an earlier decoder of the model has recorded.

        Args:
            model: in eval mode.
            recorder: one to start with instead, on any device.
        """
        self._model = model
        if recorder is None:
            shelf = _idle.setdefault(model.device, weakref.WeakKeyDictionary())
            self._state = cuda_graphs.lend(shelf, model, self, lambda: _new_state(model.device))
        else:
            self._state = DecoderState(recorder)
        self._state.weights_lie_at(_addresses_of_weights(model))

    @torch.inference_mode()
    def start(
        self, condition: Tensor, cache: Cache, *, condition_mask: Tensor | None = None
    ) -> Tensor:
        """See ``Decoder``. Not recorded: the model's own operations."""
        return self._model.start(condition, cache, condition_mask=condition_mask)

    @torch.inference_mode()
    def next_logits(self, codes: Tensor, cache: Cache) -> Tensor:
        """See ``Decoder``."""
        buffers = self._step(codes.unsqueeze(1), cache)
        buffers.advance()
        cache.advance(1)
        return buffers.logits[: len(codes), -1]

    @torch.inference_mode()
    def feed(self, codes: Tensor, cache: KVCache) -> Tensor:
        """See ``Decoder``. Not recorded: the model's own operations."""
        return self._model.decode(codes, cache)[:, -1]

    @torch.inference_mode()
    def extend(self, codes: Tensor, slots: SlotCache) -> Tensor:
        """See ``Decoder``."""
        return self._step(codes, slots).logits[: len(codes)]

    @torch.inference_mode()
    def extend_at(self, codes: Tensor, slots: SlotCache, cells: Sequence[int]) -> Tensor:
        """See ``Decoder``. Not recorded: the model's own operations."""
        return self._model.extend_at(codes, slots, cells)

    def _step(self, codes: Tensor, cache: Cache) -> Buffers:
        """Feeds codes (R, T); the first R logits of the buffers predict what follows."""
        rows, window = codes.shape
        room = cache.keys[0].shape[2]
        lengths, conditions = _lengths(cache)
        end = max(lengths) + window
        assert rows == cache.batch, f"codes of {rows} sequences for {cache.batch}"
        assert end <= room, f"{end} positions in a cache with room for {room}"
        padded = rows if isinstance(cache, KVCache) else _padded(rows, cache.capacity)
        attended = min(-(-end // _ATTENDED) * _ATTENDED, room)
        state, model = self._state, self._model
        buffers = state.buffers(model, padded, window, room)
        buffers.follow(cache, lengths, conditions)
        buffers.inputs.codes[:rows].copy_(codes, non_blocking=True)
        turns = state.turns(model, cache.grid)

        def work() -> None:
            keys, values = ([x[:padded] for x in own] for own in (cache.keys, cache.values))
            logits = static_step(model, buffers.inputs, keys, values, turns, attended)
            buffers.logits.copy_(logits)

        memory = tuple(x.data_ptr() for own in (cache.keys, cache.values) for x in own)
        key = (state.weights, buffers.number, attended, cache.grid, cache.keys[0].stride(), memory)
        state.recorder.run(key, work)
        return buffers


class Buffers:
    """Memory of the steps with one number of sequences and codes, at fixed addresses."""

    def __init__(self, model: Transformer, rows: int, window: int, room: int, number: int) -> None:
        device = model.device
        self.number = number
        """Tells these buffers from all others."""
        self._positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
        filled, conditions = self._positions
        self.inputs = StepInputs(
            codes=torch.zeros(rows, window, dtype=torch.int64, device=device),
            filled=filled,
            conditions=conditions,
            kept=torch.ones(rows, room, dtype=torch.bool, device=device),
        )
        self.logits = torch.zeros(
            rows, window, model.config.codebook_size, dtype=model.dtype, device=device
        )
        self._cache: weakref.ref[Cache] | None = None
        # What the device knows of the sequences.
        self._lengths: list[int] = []
        self._conditions: list[int] = []

    def follow(self, cache: Cache, lengths: list[int], conditions: list[int]) -> None:
        """Tells the device what has changed since the last step."""
        if self._cache is None or self._cache() is not cache:
            self._meet(cache)
        if lengths == self._lengths and conditions == self._conditions:
            return
        rows = len(self.inputs.filled)
        # Sequences that fill up a batch have no positions, in slots that nobody uses.
        values = [own + [0] * (rows - len(own)) for own in (lengths, conditions)]
        # A new block each time: the last one may still be on its way.
        known = torch.tensor(values, pin_memory=self._positions.is_cuda)
        self._positions.copy_(known, non_blocking=True)
        self._lengths, self._conditions = lengths, conditions

    def advance(self) -> None:
        """One more position of each sequence is filled, which the device counts itself."""
        self.inputs.filled.add_(1)
        self._lengths = [length + 1 for length in self._lengths]

    def _meet(self, cache: Cache) -> None:
        self.inputs.kept.fill_(True)
        if isinstance(cache, KVCache):
            # What attention masks out must be finite, and this memory can hold anything.
            for part in cache.keys + cache.values:
                part[:, :, cache.length :] = 0.0
            mask = cache.condition_mask
            if mask is not None:
                self.inputs.kept[:, : mask.shape[1]].copy_(mask, non_blocking=True)
        self._cache = weakref.ref(cache)


class DecoderState:
    """What decoders of a model hand on: recordings, and the memory that these read and write."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.weights = 0
        """Counts how often the weights have moved."""
        self._addresses: tuple[int, ...] = ()
        self._buffers: OrderedDict[tuple[int, int, int], Buffers] = OrderedDict()
        self._turns: dict[Grid, Tensor] = {}
        self._numbers = itertools.count()

    def weights_lie_at(self, addresses: tuple[int, ...]) -> None:
        """Recordings of weights elsewhere hold no longer."""
        if addresses != self._addresses:
            self._addresses = addresses
            self.weights += 1
            # They may have another precision, too.
            self._buffers.clear()

    def buffers(self, model: Transformer, rows: int, window: int, room: int) -> Buffers:
        """Memory for a step; that of the shapes not used for longest is given up."""
        key = (rows, window, room)
        found = self._buffers.pop(key, None)
        if found is None:
            found = Buffers(model, rows, window, room, next(self._numbers))
        self._buffers[key] = found
        if len(self._buffers) > _MOST_BUFFERS:
            self._buffers.popitem(last=False)
        return found

    def turns(self, model: Transformer, grid: Grid) -> Tensor:
        """(codes of an image, E / 2) complex64, which stay where they are."""
        if grid not in self._turns:
            config = model.config
            table = rope_table(grid, 0, config.head_dim, config.rope_base, model.device)
            self._turns[grid] = torch.view_as_complex(table)
        return self._turns[grid]


def _new_state(device: torch.device) -> DecoderState:
    return DecoderState(Recorder(CudaTape(device), most=_MOST_GRAPHS))


def _addresses_of_weights(model: Transformer) -> tuple[int, ...]:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return tuple(tensor.data_ptr() for tensor in tensors)


def _lengths(cache: Cache) -> tuple[list[int], list[int]]:
    """Of each sequence: positions filled, and those of its condition."""
    if isinstance(cache, KVCache):
        return [cache.length] * cache.batch, [cache.condition_length] * cache.batch
    return list(cache.lengths), list(cache.conditions)


def _padded(rows: int, most: int) -> int:
    """A number of sequences that comes more often than ``rows``, in which it fits.

    A server's batch changes all the time; what is recorded for it should not change as often.
    """
    step = 8 if rows > 8 else 1 << (rows - 1).bit_length()
    return min(-(-rows // step) * step, most)
