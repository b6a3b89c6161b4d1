"""The processes of a run, and what they tell one another.

Every function here also works in a run of one process without a process group, where it changes
nothing. A run has several processes if ``torchrun`` (or anything that sets the same environment
variables) has started it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llamagen.support.devices import find_device
from llamagen.support.launch import Launch, own_device

T = TypeVar("T")

_TIMEOUT = dt.timedelta(minutes=30)
"""How long a process waits for the others: longer than one of them samples, validates or saves."""


def rank() -> int:
    """Number of this process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes logs and pictures."""
    return rank() == 0


def barrier() -> None:
    """Waits until all processes are here."""
    if world_size() > 1:
        # A reduction rather than ``dist.barrier``: that one guesses a CUDA device and warns.
        total(torch.zeros(1))


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes of a tensor that has the same shape in each; a new tensor."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def maximum(tensor: Tensor) -> Tensor:
    """The elementwise maximum over all processes; a new tensor."""
    return _reduced(tensor, dist.ReduceOp.MAX)


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes of a tensor that has the same shape in each; a new tensor."""
    return total(tensor) / world_size()


def broadcast(tensor: Tensor) -> Tensor:
    """The main process's tensor; the others give one of the same shape and type."""
    if world_size() == 1:
        return tensor
    moved = tensor.to(_communication_device(tensor), copy=True).contiguous()
    dist.broadcast(moved, src=0)
    return moved.to(tensor.device)


def gathered(value: T) -> list[T]:
    """Every process's value, a plain Python object, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_of(value: bool) -> bool:
    """Whether it holds in any process."""
    if world_size() == 1:
        return value
    return bool(maximum(torch.tensor(float(value))))


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that another process, or the network to it, is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed", "reset by peer"))


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of ``items``: consecutive, and as long as every other's up to one."""
    start, end = (len(items) * part // world_size() for part in (rank(), rank() + 1))
    return items[start:end]


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sums over all processes of numbers that have the same names in each."""
    if world_size() == 1:
        return dict(values)
    sums = total(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, sums.tolist(), strict=True))


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Runs a block in the main process, then in the others: for downloads into a shared cache.

    If the main process fails, the others go through the block all the same, and fail themselves.
    """
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Joins the run's other processes, if there are any; yields this process's device.

    Args:
        device: as the recipe has it; on "cuda" each process takes the GPU of its local rank.

    Raises:
        InputError: this machine has no such device, or fewer GPUs than processes.
    """
    launch = Launch.read()
    if launch is None or dist.is_initialized():
        yield find_device(device)
        return
    where = own_device(find_device(device), launch)
    # gloo beside nccl: plain numbers and objects are exchanged without a stop of the GPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo",
        timeout=_TIMEOUT,
        rank=launch.rank,
        world_size=launch.world_size,
        device_id=where if where.type == "cuda" else None,
    )
    yield where
    # Not after an error: where another process is gone, saying goodbye would wait for it.
    dist.destroy_process_group()


def _reduced(tensor: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return tensor.clone()
    moved = tensor.to(_communication_device(tensor), copy=True).contiguous()
    dist.all_reduce(moved, op=operation)
    return moved.to(tensor.device)


def _communication_device(tensor: Tensor) -> torch.device:
    """Every process group here can send from the CPU, and from CUDA if it runs on it."""
    return tensor.device if tensor.device.type == "cuda" else torch.device("cpu")
