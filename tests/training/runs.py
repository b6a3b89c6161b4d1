"""Small training runs for tests: seconds each, with everything in them that could go wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from llamagen.config import TokenizerConfig, TransformerConfig
from llamagen.training import LoopConfig, TokenizerTraining, TransformerTraining
from llamagen.training.config import ImageConfig


def loop(**changes: Any) -> LoopConfig:
    values: dict[str, Any] = {
        "steps": 4,
        "batch_size": 4,
        "lr": 1e-3,
        "precision": "float32",
        "device": "cpu",
        # Out of step with the checkpoints, so that a half-filled mean is carried over.
        "log_every": 3,
        "validate_every": 2,
        "sample_every": 0,
        "save_every": 2,
        **changes,
    }
    return LoopConfig(**values)


def tokenizer_recipe(data: Path, out: Path, *, dropout: float = 0.1, **changes: Any) -> Any:
    loop_changes = {key: changes.pop(key) for key in list(changes) if hasattr(LoopConfig, key)}
    values: dict[str, Any] = {
        "data": None if data is None else str(data),
        "out": out,
        "images": ImageConfig(size=16, validation_fraction=0.2),
        "model": TokenizerConfig(
            base_channels=8,
            channel_multipliers=(1, 1, 2),
            norm_groups=4,
            z_channels=8,
            codebook_size=32,
            codebook_dim=4,
            encoder_blocks=1,
            decoder_blocks=1,
            dropout=dropout,
        ),
        "loop": loop(**loop_changes),
        **changes,
    }
    return TokenizerTraining(**values)


def transformer_recipe(data: Path, tokenizer: Path | str, out: Path, **changes: Any) -> Any:
    loop_changes = {key: changes.pop(key) for key in list(changes) if hasattr(LoopConfig, key)}
    values: dict[str, Any] = {
        "data": None if data is None else str(data),
        "tokenizer": str(tokenizer),
        "out": out,
        "images": ImageConfig(size=16, validation_fraction=0.2),
        "views": "flip",
        "model": TransformerConfig(
            dim=32, layers=2, heads=2, hidden_dim=64, drop_path=0.1, attention_dropout=0.1
        ),
        "sample_images": 6,
        "loop": loop(**loop_changes),
        **changes,
    }
    return TransformerTraining(**values)


def records(out: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what is measured by the clock."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if "per_second" not in key}
        for line in lines
    ]


def state(out: Path, step: int) -> dict[str, Any]:
    """Everything in a run's checkpoint but the time it took."""
    path = out / "checkpoints" / f"step-{step:07d}"
    values: dict[str, Any] = torch.load(path / "state.pt", weights_only=True)
    del values["seconds"]
    index = FileSystemReader(path / "tensors").read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in index.items()
    }
    dcp.load(tensors, checkpoint_id=path / "tensors", no_dist=True)
    return values | tensors


def assert_same_state(a: Any, b: Any) -> None:
    """Equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same_state(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
