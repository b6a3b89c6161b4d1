"""Reads the parity cases: a configuration, weights drawn from key names, inputs and outputs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


@dataclass
class Case:
    """One fixture: its description, its arrays and its weights."""

    info: dict[str, Any]
    arrays: dict[str, np.ndarray]
    weights: dict[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


@pytest.fixture(scope="session")
def fixtures(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("parity_fixtures")
    assert folder.is_dir(), f"--fixtures {folder} is not a folder"
    return folder


@pytest.fixture(scope="session")
def read_case(fixtures: Path) -> Callable[[str], Case]:
    spec = importlib.util.spec_from_file_location("seeded", fixtures / "seeded.py")
    assert spec is not None
    assert spec.loader is not None
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)

    def read(name: str) -> Case:
        info = json.loads((fixtures / f"{name}.json").read_text())
        with np.load(fixtures / f"{name}.npz") as arrays:
            data = dict(arrays)
        weights = {}
        if "shapes" in info:
            drawn = seeded.seeded_state_dict(info["shapes"], info["seed"], info["std"])
            weights = {key: torch.from_numpy(value) for key, value in drawn.items()}
        return Case(info, data, weights)

    return read
