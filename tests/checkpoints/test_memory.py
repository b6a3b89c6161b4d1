"""Loading takes little more memory than the loaded weights."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch

from llamagen.config import TRANSFORMER_PRESETS
from llamagen.models.transformer import Transformer

# The peak is set back after the imports, so that it is of the loading alone.
CHILD = """
import json, sys, torch
from pathlib import Path
from llamagen.checkpoints import load_transformer

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])

Path("/proc/self/clear_refs").write_text("5")
modules = len(sys.modules)
before = kilobytes("VmRSS")
model = load_transformer(sys.argv[1], dtype=torch.bfloat16)
grown = 1024 * (kilobytes("VmHWM") - before)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"ratio": grown / weights, "modules": len(sys.modules) - modules}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_preset_b(tmp_path):
    model = Transformer(TRANSFORMER_PRESETS["B"])
    torch.nn.init.normal_(model.output.weight, std=0.02)
    arguments = argparse.Namespace(image_size=256, downsample_size=16)
    optimizer = {"state": {0: {"exp_avg": torch.ones(2**22)}}}
    content = {"model": model.state_dict(), "optimizer": optimizer, "args": arguments}
    torch.save(content, tmp_path / "published.pt")
    model.save_pretrained(tmp_path / "float32")
    model.bfloat16().save_pretrained(tmp_path / "bfloat16")
    for name in ("bfloat16", "float32", "published.pt"):
        child = [sys.executable, "-c", CHILD, str(tmp_path / name)]
        done = subprocess.run(child, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout)
        assert measured["ratio"] < 1.3, name
        assert measured["modules"] < 100, "initial values import much of torch"
