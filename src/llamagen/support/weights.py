"""Weights by their names: in safetensors files, their shapes, and what tells two sets apart."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llamagen.support.errors import InputError

NamedTensors = Iterable[tuple[str, Callable[[], Tensor]]]
"""Names, each with a function that reads its tensor; read one at a time, in order."""


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor in a safetensors file, from its header.

    Raises InputError if the file is truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file ({error}); copy or download it again"
        ) from error


def read_safetensors(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the tensors of a safetensors file, read on demand."""
    for name in safetensors_shapes(path):
        yield name, functools.partial(_read_tensor, path, name)


def _read_tensor(path: Path, name: str) -> Tensor:
    # Opened anew for each tensor: pages of a mapping stay in memory until it is closed.
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    kind: str,
) -> None:
    """Raise InputError for the first weight that is missing, superfluous or of another shape."""
    for name in [*expected, *found]:
        if name not in found:
            reason = f"weight {name} {expected[name]} is missing"
        elif name not in expected:
            reason = f"weight {name} is extra (there is no weight {name} in it)"
        elif (shape := tuple(found[name])) != expected[name]:
            reason = f"weight {name} has shape {shape}, expected {expected[name]}"
        else:
            continue
        raise InputError(f"{source}: not this {kind}: {reason}")


def digest(
    about: str, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
) -> str:
    """Return a short text that depends on ``about`` and on weights, wherever and however they lie.

    In another precision than their own they are compared only to its digits.
    """
    whole = hashlib.sha256(about.encode())
    for name, tensor in sorted(weights):
        whole.update(name.encode())
        values = tensor.detach().to("cpu", dtype).flatten()
        whole.update(values.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]
