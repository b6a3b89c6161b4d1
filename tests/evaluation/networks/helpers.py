"""Shared by the tests of networks."""

from __future__ import annotations

import io
import os

import pytest
import torch
from torch import Tensor, nn

from llamagen.evaluation.networks.inception import InceptionV3
from llamagen.support.errors import InputError


def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = InceptionV3()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


LPIPS_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Where they stand in VGG16's features."""
LPIPS_HEADS = (64, 128, 256, 512, 512)
_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def lpips_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of LPIPS, by their names in the public files."""
    found: dict[str, tuple[int, ...]] = {}
    for i, index in enumerate(LPIPS_CONVOLUTIONS):
        found[f"features.{index}.weight"] = (_CHANNELS[i + 1], _CHANNELS[i], 3, 3)
        found[f"features.{index}.bias"] = (_CHANNELS[i + 1],)
    return found | {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(LPIPS_HEADS)}


def images(*size: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)


def one_line(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


class Malicious:
    """Asks whoever unpickles it to run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def saved(content: object, *, legacy: bool = False) -> bytes:
    """The file of ``torch.save``."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return set(state) == set(weights) and all(torch.equal(state[k], weights[k]) for k in weights)
