"""Rank and device of a process started by ``torchrun`` or with the same environment variables."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Launch:
    """Rank of a process."""

    rank: int = 0
    local_rank: int = 0
    """Rank among the processes of this machine."""
    world_size: int = 1

    @classmethod
    def current(cls) -> Launch:
        """Return the rank of this process, also if it was started alone."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        texts = {name: os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        for name, text in texts.items():
            if not text.isdecimal():
                raise InputError(f"{name} is {text!r} in the environment; start with torchrun")
        return cls(*map(int, texts.values()))


def own_device(device: torch.device, launch: Launch) -> torch.device:
    """Return the device of this process: on "cuda" the GPU of its local rank, or InputError."""
    import torch

    if launch.world_size == 1:
        return device
    if device.type == "mps":
        raise InputError("several processes cannot share device mps; start one, without torchrun")
    if device.type != "cuda":
        return device
    if launch.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {launch.local_rank} of this machine has no GPU of its own, there are "
            f"{torch.cuda.device_count()}; lower torchrun's --nproc_per_node"
        )
    own = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(own)
    return own
