"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where to compute, and how precisely."""

    device: Device = "auto"
    """Where to compute; auto takes the GPU if there is one."""
    dtype: DType = "auto"
    """Precision of the weights; auto takes bfloat16 where the device is fast at it."""

    def resolve(self) -> tuple[torch.device, torch.dtype]:
        """The device and precision meant.

        Raises:
            InputError: this machine has no such device.
        """
        from llamagen.devices import find_device, find_dtype

        device = find_device(self.device)
        return device, find_dtype(self.dtype, device)
