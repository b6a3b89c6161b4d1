"""What the tests of networks share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llamagen.evaluation.networks import InceptionV3
from llamagen.support.errors import InputError


def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = InceptionV3()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


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
