"""Models over the processes of a run: DDP, FSDP2, hybrid sharding, or one process."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from llamagen.support import distributed
from llamagen.support.errors import InputError
from llamagen.training.config import LoopConfig

# DDP says so of 1x1 convolutions in channels-last layout, whose strides differ in name only.
warnings.filterwarnings("ignore", message="Grad strides do not match", category=UserWarning)


def require_shares(config: LoopConfig) -> None:
    """Raise InputError if batch or sharded model cannot be split evenly over the processes."""
    processes, accumulation = distributed.world_size(), config.gradient_accumulation
    if config.batch_size % (processes * accumulation):
        raise InputError(
            f"batch_size {config.batch_size} cannot be split over {processes} processes and "
            f"gradient_accumulation {accumulation}; make it a multiple of "
            f"{processes * accumulation}"
        )
    shards = config.shard_processes
    if config.parallel == "fsdp" and shards is not None and processes % shards:
        raise InputError(
            f"{processes} processes cannot be divided into groups of shard_processes {shards}; "
            f"give a divisor of {processes}"
        )


def shards_model(config: LoopConfig) -> bool:
    """Return whether processes hold shards only; such a model is built without memory."""
    return config.parallel == "fsdp" and distributed.world_size() > 1


def place(
    model: nn.Module, config: LoopConfig, device: torch.device, *, units: Sequence[nn.Module]
) -> None:
    """Move ``model`` to the device, or with FSDP this process's shard of it.

    With FSDP, the memory of a model on the "meta" device is not initialised, and the weights of
    ``units`` are gathered one unit after another.
    """
    if not shards_model(config):
        model.to(device)
        return
    processes = distributed.world_size()
    shards = config.shard_processes or processes
    # Two dimensions in all cases; without hybrid sharding one of them has length 1.
    mesh = init_device_mesh(
        device.type, (processes // shards, shards), mesh_dim_names=("replicate", "shard")
    )
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.precision == "bfloat16" else None,
        reduce_dtype=torch.float32,
        # Autocast decides the precision of each operation; this would round the rotary angles.
        cast_forward_inputs=False,
    )
    # Else the root keeps its gathered weights, stale once the weights of the EMA are swapped in.
    for module in (*units, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)


def callable_form(model: nn.Module, device: torch.device) -> nn.Module:
    """Return ``model``, with DDP wrapped: it broadcasts the main process's weights."""
    if distributed.world_size() == 1 or isinstance(model, FSDPModule):
        return model
    with warnings.catch_warnings():
        # torch 2.13 has another name for it, which the versions before do not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


@contextlib.contextmanager
def gradients_stay_here(*called: nn.Module, when: bool) -> Iterator[None]:
    """Accumulate gradients of ``callable_form``'s results without exchanging them, if ``when``."""
    with contextlib.ExitStack() as stack:
        for model in called:
            if isinstance(model, DistributedDataParallel) and when:
                stack.enter_context(model.no_sync())
            elif isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(not when)
        yield


def seed_of(*names: object) -> int:
    """Return the 64-bit seed that belongs to a run's seed and a step, a weight or the like."""
    # The CPU's generator uses 32 bits of a seed only, which steps of other runs must not share.
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def seeded(seed: int, *names: object) -> torch.Generator:
    """Return the random generator that belongs to a name."""
    return torch.Generator().manual_seed(seed_of(seed, *names))


@torch.no_grad()
def initialise(model: nn.Module, seed: int, init_tensor: Callable[..., None]) -> None:
    """Initialise weights so that they depend on the seed only, not on sharding.

    ``init_tensor`` is called with a weight's name, the whole tensor to fill and its own generator.
    """
    for name, parameter in model.named_parameters():
        # On the CPU: other devices have other random numbers.
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        init_tensor(name, whole, seeded(seed, name))
        set_tensor(parameter, whole)


@torch.no_grad()
def set_tensor(parameter: Tensor, whole: Tensor) -> None:
    """Copy ``whole`` into a parameter, or this process's shard of it into its shard."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        # Every process has all of it: no communication.
        own = distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)
        local(parameter).copy_(local(own))
    else:
        parameter.copy_(whole)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor; the memory is shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def number(tensor: Tensor) -> float:
    """Return a scalar as a number, the same in every process."""
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def release_gathered(model: nn.Module) -> None:
    """Free the weights that a forward pass without a backward pass has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Return the whole state of a sharded model, on the CPU, in the main process; elsewhere {}."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)
