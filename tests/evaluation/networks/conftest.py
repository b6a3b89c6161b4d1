"""An Inception-v3 with random weights, and a server of public files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llamagen.evaluation.networks.inception import InceptionV3
from tests.web import running


@pytest.fixture(scope="session")
def network() -> InceptionV3:
    """With weights that keep features in range, and statistics that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = InceptionV3()
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 4:
                nn.init.kaiming_normal_(tensor, nonlinearity="relu")
            elif name.endswith(("running_var", "bn.weight")):
                tensor.uniform_(0.8, 1.2)
            elif name != "fc.weight":
                tensor.normal_(std=0.2)
    return model


@pytest.fixture
def web():
    """Stands in for the servers of public files."""
    with running() as web:
        yield web
