"""Communication between the processes of a run that ``torchrun`` started.

Every function also works in a process without a process group, as the only one.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llamagen.support.devices import find_device
from llamagen.support.launch import Launch, own_device

T = TypeVar("T")

_TIMEOUT = dt.timedelta(minutes=30)
"""Longer than a process samples, validates or saves while the others wait."""


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the process that writes logs and images."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    # ``dist.barrier`` guesses a CUDA device and warns.
    total(torch.zeros(1))


def total(tensor: Tensor) -> Tensor:
    """Return the sum over all processes of tensors of the same shape."""
    return _exchanged(tensor, dist.all_reduce)


def maximum(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum over all processes."""
    return _exchanged(tensor, functools.partial(dist.all_reduce, op=dist.ReduceOp.MAX))


def mean(tensor: Tensor) -> Tensor:
    """Return the mean over all processes of tensors of the same shape."""
    return total(tensor) / world_size()


def broadcast(tensor: Tensor) -> Tensor:
    """Return the main process's tensor; the others give one of the same shape and type."""
    return _exchanged(tensor, functools.partial(dist.broadcast, src=0))


def gathered(value: T) -> list[T]:
    """Return the Python objects of all processes, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_of(value: bool) -> bool:
    """Return whether ``value`` is true in any process."""
    return bool(maximum(torch.tensor(float(value))))


def is_lost_peer(error: RuntimeError) -> bool:
    """Return whether an error means that the connection to another process was lost."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed", "reset by peer"))


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part of ``items``: consecutive, of equal lengths up to one."""
    start, end = (len(items) * part // world_size() for part in (rank(), rank() + 1))
    return items[start:end]


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Return the sums over all processes of numbers by name."""
    sums = total(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, sums.tolist(), strict=True))


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run a block in the main process, then, even if it failed, in the others: for downloads."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the process group, if there are several processes; yield this process's device.

    On "cuda" that is the GPU of its local rank; InputError if the machine has none for it.
    """
    launch = Launch.current()
    if launch.world_size == 1 or dist.is_initialized():
        yield find_device(device)
        return
    where = own_device(find_device(device), launch)
    is_cuda = where.type == "cuda"
    # gloo beside nccl: numbers and objects are exchanged without synchronising the GPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        timeout=_TIMEOUT,
        rank=launch.rank,
        world_size=launch.world_size,
        device_id=where if is_cuda else None,
    )
    yield where
    # Not after an error: it would wait for a process that is gone.
    dist.destroy_process_group()


def _exchanged(tensor: Tensor, collective: Callable[[Tensor], object]) -> Tensor:
    """Return the result of a collective that works in place."""
    if world_size() == 1:
        return tensor.clone()
    # On the CPU, unless it is CUDA's.
    moved = tensor.to(tensor.device if tensor.is_cuda else "cpu", copy=True).contiguous()
    collective(moved)
    return moved.to(tensor.device)
