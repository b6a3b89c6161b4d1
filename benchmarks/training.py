"""A training step of the transformer against a plain eager loop, in tokens/s and peak memory.

The plain loop computes all logits, converts them to float32, and uses AdamW with its defaults; the
other step is that of ``llamagen train transformer``. Both train the same model on the same codes
under bfloat16 autocast. The floor is the time of the operations at the rate of a large matrix
product, which is measured first; ``--shares`` profiles a step.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/training.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import median_and_spread, print_table, record, time_in_turn
from torch import nn

from llamagen.config import TRANSFORMER_PRESETS, TransformerConfig, preset
from llamagen.evaluation.speed import measure_limits
from llamagen.models.transformer import Transformer, training_ops
from llamagen.support.devices import keep_freed_memory
from llamagen.training.config import LoopConfig
from llamagen.training.metrics import peak_flops, training_flops
from llamagen.training.next_code import NextCodeModel
from llamagen.training.optimizer import make_optimizer

Step = Callable[[], float]


def batch(config: TransformerConfig, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    codes = torch.randint(config.codebook_size, (size, config.num_codes), device=device)
    return codes, torch.randint(config.num_classes, (size,), device=device)


def plain_step(config: TransformerConfig, size: int, device: str) -> Step:
    """The step of a first version of a training script."""
    model = Transformer(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    codes, labels = batch(config, size, device)
    for module in model.modules():
        if isinstance(module, training_ops.Dropout):
            module.__class__ = nn.Dropout
    # torch's own attention, norms and rotations, too.
    stock = mock.patch.object(training_ops, "should_use", return_value=False)

    def step() -> float:
        optimizer.zero_grad()
        with stock, torch.autocast(device, torch.bfloat16):
            logits = model(codes[:, :-1], labels)
        loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def product_step(
    config: TransformerConfig, size: int, device: str, *, compiled: bool, recompute: bool
) -> Step:
    """The step of the training loop."""
    keep_freed_memory()
    transformer = Transformer(config)
    transformer.recompute_blocks = recompute
    model = NextCodeModel(transformer).to(device).train()
    if compiled:
        for block in transformer.layers:
            block.compile()
    loop = LoopConfig(weight_decay=0.05)
    optimizer = make_optimizer(model, loop, lr=1e-4)
    codes, labels = batch(config, size, device)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16):
            loss = model(codes[:, :-1], labels, codes)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert torch.isfinite(norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


STEPS: dict[str, Callable[[TransformerConfig, int, str], Step]] = {
    "plain": plain_step,
    "llamagen": lambda *a: product_step(*a, compiled=False, recompute=False),
    "llamagen, recomputing": lambda *a: product_step(*a, compiled=False, recompute=True),
    "llamagen, compiled": lambda *a: product_step(*a, compiled=True, recompute=False),
}
WARM_UP = 4
"""Steps in which the process allocates its memory."""

# Parts of a step's time, by torch's operations; others are the rest.
PARTS = {
    "aten::mm": "products",
    "aten::bmm": "attention",
    "aten::baddbmm": "attention",
    "aten::_softmax": "attention",
    "aten::_softmax_backward_data": "attention",
    "aten::copy_": "casts and copies",
    "aten::random_": "random numbers of dropout",
    "aten::_fused_adamw_": "optimizer",
}


class Worker:
    """A process of its own for each candidate: neither shares the other's allocator."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--only", name, "--preset", arguments.preset]
        command += ["--batch-size", str(arguments.batch_size), "--device", arguments.device]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for _ in range(WARM_UP):
            self()

    def __call__(self) -> None:
        """Take a step."""
        self.ask("step")

    def ask(self, what: str) -> str:
        """Send a line; return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"the process ended with {self._process.wait()}")
        return answer

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def work(name: str, config: TransformerConfig, size: int, device: str) -> None:
    """The other end of a ``Worker``."""
    step = STEPS[name](config, size, device)
    for line in sys.stdin:
        if line.strip() == "peak memory":
            print(peak_memory(device), flush=True)
        elif line.strip() == "shares":
            print(json.dumps(shares(step)), flush=True)
        else:
            print(step(), flush=True)


def shares(step: Step) -> dict[str, float]:
    """Shares of the time of a step on a CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        part = PARTS.get(event.key, "rest")
        found[part] = found.get(part, 0.0) + event.self_cpu_time_total
    return {part: time / sum(found.values()) for part, time in found.items()}


def peak_memory(device: str) -> int:
    """Peak bytes of this process, or of its tensors on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def ratio(seconds: dict[str, list[float]], name: str) -> str:
    """Speed relative to the plain loop, in the median of the pairs."""
    if "plain" not in seconds:
        return ""
    pairs = zip(seconds["plain"], seconds[name], strict=True)
    return f"{statistics.median(plain / own for plain, own in pairs):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="B")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", nargs="+", choices=STEPS, help="by default all but compiled")
    parser.add_argument("--shares", action="store_true", help="profile a step, on a CPU")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config, size = preset(TRANSFORMER_PRESETS, arguments.preset), arguments.batch_size
    if arguments.only is not None:
        work(arguments.only, config, size, arguments.device)
        return
    names = arguments.steps or [name for name in STEPS if name != "llamagen, compiled"]
    limits = measure_limits(torch.device(arguments.device), torch.bfloat16)
    floor = size * training_flops(config) / limits.operations_per_second
    workers = {name: Worker(name, arguments) for name in names}
    seconds = time_in_turn(workers, repeats=arguments.repeats)
    tokens = size * config.num_codes
    peak = peak_flops(torch.device(arguments.device), "bfloat16")
    results: dict[str, Any] = {"floor_seconds": floor}
    rows = []
    for name in names:
        rates = [tokens / value for value in seconds[name]]
        memory = int(workers[name].ask("peak memory"))
        results[name] = {"seconds": seconds[name], "peak_memory": memory}
        if arguments.shares:
            results[name]["shares"] = json.loads(workers[name].ask("shares"))
        workers[name].end()
        row = [name, median_and_spread(rates), ratio(seconds, name), f"{memory / 1e9:.2f}"]
        if peak is not None:
            mfu = size * training_flops(config) / statistics.median(seconds[name]) / peak
            results[name]["mfu"] = mfu
            row.append(f"{mfu:.1%}")
        rows.append(row)
    rows.append(["floor", f"{tokens / floor:.1f}", "", ""] + ([""] if peak is not None else []))
    print(f"preset {arguments.preset}, {size} x {config.num_codes} codes, bfloat16 autocast")
    header = ["step", "tokens/s", "times plain", "peak GB"]
    print_table(header + (["MFU"] if peak is not None else []), rows)
    for name in names if arguments.shares else ():
        parts = sorted(results[name]["shares"].items(), key=lambda part: -part[1])
        print(f"{name}: " + ", ".join(f"{part} {share:.1%}" for part, share in parts))
    record(f"training-{arguments.preset}", results)


if __name__ == "__main__":
    main()
