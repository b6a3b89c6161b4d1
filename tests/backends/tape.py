"""CUDA graphs' rules on a CPU: what is played are the same operations on the same memory.

Whatever a step would read from the host when it is recorded (a length, an address) stays as it
was, and whatever would wait for the device is refused.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")


class Tape:
    """Counts what it did, as a GPU's tape would be used."""

    def __init__(self, fails=False):
        self.rehearsed = self.recorded = self.played = 0
        self.fails = fails

    def rehearse(self, work):
        self.rehearsed += 1
        work()

    def record(self, work):
        if self.fails:
            raise RuntimeError("operation not permitted\nwhen recording")
        operations = _Operations()
        with operations:
            work()
        self.recorded += 1
        operations.undo()

        def play():
            self.played += 1
            operations.play()

        return play


class _Operations(TorchDispatchMode):
    """Operations with the tensors that they had, and where their results go."""

    def __init__(self):
        super().__init__()
        self.done = []
        self._before = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if name in _WAITS:
            raise RuntimeError(f"{name} waits for the device")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write:
                self._before.append((value, value.clone()))
        result = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, result))
        return result

    def undo(self):
        """A recording does nothing: what it changed is as before, what it made cannot be used."""
        for changed, before in reversed(self._before):
            changed.copy_(before)
        for _, args, _, result in self.done:
            for made in _made(args, result):
                made.fill_(torch.nan if made.is_floating_point() or made.is_complex() else 0)

    def play(self):
        for func, args, kwargs, result in self.done:
            again = func(*args, **kwargs)
            if _made(args, result):
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    old.copy_(new)


def _made(args, result):
    """Tensors in memory that is new: neither views nor what was changed in place."""
    given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if torch.is_tensor(x)}
    return [
        x
        for x in tree_leaves(result)
        if torch.is_tensor(x) and x.numel() and x.untyped_storage().data_ptr() not in given
    ]
