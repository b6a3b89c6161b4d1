"""The inference step by torch.compile, with static shapes: what makes a GPU fast at few sequences.

A CPU takes longer to launch one of a step's kernels than a GPU to run it. Compiled in the mode
"reduce-overhead", a step is launched as a whole (a CUDA graph). What is compiled is the model's own
code, so there is no second implementation; shapes depend only on the number of sequences, the
tokens fed to each and the positions that attention reaches over, all rounded up.

Compiling takes tens of seconds for each shape, so it begins once a model has been used for a while.

Shapes: R sequences, T tokens fed to each, M of them wanted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llamagen.config import Grid, non_default_fields
from llamagen.models.transformer import NO_CELL, KVCache, Tokens, Transformer, to_index

_EAGER_STEPS = 1024
"""Steps of a model before it is compiled: a single image should not wait for that."""
_POSITION_STEP = 256
"""Positions that attention reaches over are rounded up to a multiple of this."""
_MAX_SHAPES = 64


class CompiledStep:
    """Computes steps of one model compiled; conditions, and what is rare, by the model itself."""

    is_wide = False

    FIELDS = frozenset(
        {
            *("dim", "layers", "heads", "kv_heads", "hidden_dim", "codebook_size", "grid"),
            *("condition", "num_classes", "text_length", "text_dim", "rope_base", "norm_eps"),
            *("token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout"),
            *("drop_path", "quantization", "qk_norm", "order"),
        }
    )
    """Fields of ``TransformerConfig`` that compile; all others must be at their defaults."""

    def __init__(self, model: Transformer, *, eager_steps: int = _EAGER_STEPS) -> None:
        """Prepare steps of a model; ``eager_steps`` of them before the first is compiled."""
        self._model = model
        self._eager_steps = eager_steps
        self._steps = 0
        self._compiled: dict[tuple[int, int, int, Grid], Callable[..., Tensor]] = {}

    @classmethod
    def supports(cls, model: Transformer) -> bool:
        """Whether the model's configuration compiles, and is worth it: on a CUDA device."""
        is_known = not non_default_fields(model.config, cls.FIELDS)
        return is_known and not model.training and _is_on_gpu(model)

    @classmethod
    def of(cls, model: Transformer, *, eager_steps: int = _EAGER_STEPS) -> CompiledStep:
        """The step of a model, made once: what is compiled stays."""
        if model not in _steps:
            _steps[model] = cls(model, eager_steps=eager_steps)
        return _steps[model]

    def __call__(self, tokens: Tokens, cache: KVCache, grid: Grid) -> Tensor:
        """See ``Step``."""
        self._steps += 1
        is_condition = tokens.features is not None or bool((tokens.cells == NO_CELL).any())
        if is_condition or self._steps <= self._eager_steps:
            return self._model.step(tokens, cache, grid=grid)
        ids, cells, positions, wanted, end = _static_inputs(tokens, cache, self._model.device)
        key = (*ids.shape, end, grid)
        step = self._compiled.get(key)
        if step is None and len(self._compiled) >= _MAX_SHAPES:
            return self._model.step(tokens, cache, grid=grid)
        for part in (*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales):
            torch._dynamo.mark_static_address(part)
        arguments = (ids, cells, positions, self._model.rope_table(grid), cache)
        if step is None:
            step = self._compiled[key] = self._compile(end)
            with torch._dynamo.config.patch(recompile_limit=2 * _MAX_SHAPES):
                logits = step(*arguments)
        else:
            torch.compiler.cudagraph_mark_step_begin()
            logits = step(*arguments)
        return logits.flatten(0, 1)[wanted]

    def _compile(self, end: int) -> Callable[..., Tensor]:
        model = self._model

        def step(
            ids: Tensor, cells: Tensor, positions: Tensor, table: Tensor, cache: KVCache
        ) -> Tensor:
            return model.step_rectangle(ids, table[cells], positions, cache, end)

        return torch.compile(step, mode="reduce-overhead", dynamic=False, fullgraph=True)


_steps: weakref.WeakKeyDictionary[Transformer, CompiledStep] = weakref.WeakKeyDictionary()


def _static_inputs(
    tokens: Tokens, cache: KVCache, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Tokens as a rectangle over the cache's first sequences, in use or not.

    Sequences that are fed fewer tokens repeat their last one. Those that are fed none, or are not
    in use, get one behind their length, which stays unused.

    Returns:
        Ids, cells and positions (R, T), the indices (M,) of those wanted among the R * T tokens,
        and the positions that attention reaches over.
    """
    numbers, fed, wanted_rows, wanted_columns = tokens.rectangle()
    rows = min(_power_of_two(int(numbers[-1]) + 1), cache.max_sequences)
    width = _power_of_two(fed.shape[1])
    gather = np.zeros((rows, width), dtype=np.int64)
    gather[numbers] = np.pad(fed, ((0, 0), (0, width - fed.shape[1])), mode="edge")
    is_fed = np.isin(np.arange(rows), numbers)[:, None]
    lengths = np.zeros((rows, 1), dtype=np.int64)
    lengths[: cache.sequences, 0] = cache.lengths[:rows]
    unused = np.minimum(lengths, cache.positions - 1)
    end = -(-(int(tokens.positions.max()) + 1) // _POSITION_STEP) * _POSITION_STEP
    return (
        tokens.ids[to_index(gather, device)],
        to_index(np.where(is_fed, tokens.cells[gather], 0), device),
        to_index(np.where(is_fed, tokens.positions[gather], unused), device),
        to_index(numbers[wanted_rows] * width + wanted_columns, device),
        min(end, cache.positions),
    )


def _is_on_gpu(model: Transformer) -> bool:
    return model.device.type == "cuda"


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
