"""Peak memory and seconds of loading preset B, as a multiple of the weights' own size.

Each way of loading runs in a process of its own; its peak is counted after the imports.

    python benchmarks/loading.py           (Linux)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import print_table, record

from llamagen.config import TRANSFORMER_PRESETS, preset
from llamagen.models.transformer import Transformer

_CHILD = """
import json, sys, time
from pathlib import Path
import torch
from llamagen.checkpoints import load_transformer

def peak():
    # Of this process alone: getrusage also counts what its parent was when it forked.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before = peak()
start = time.perf_counter()
model = load_transformer(sys.argv[1], dtype=torch.bfloat16)
seconds = time.perf_counter() - start
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"peak": peak() - before, "weights": weights, "seconds": seconds}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="B")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = Transformer(preset(TRANSFORMER_PRESETS, arguments.preset))
        model.save_pretrained(folder / "float32")
        torch.save({"model": model.state_dict()}, folder / "published.pt")
        model.to(torch.bfloat16).save_pretrained(folder / "bfloat16")
        for name in ("bfloat16", "float32", "published.pt"):
            child = [sys.executable, "-c", _CHILD, str(folder / name)]
            done = subprocess.run(child, capture_output=True, text=True, check=True)
            results[name] = json.loads(done.stdout)
    rows = [
        [name, f"{r['peak'] / r['weights']:.2f}", f"{r['seconds']:.2f}"]
        for name, r in results.items()
    ]
    print_table([f"{arguments.preset} in bfloat16 from", "peak / weights", "seconds"], rows)
    record(f"loading-{arguments.preset}", results)


if __name__ == "__main__":
    main()
