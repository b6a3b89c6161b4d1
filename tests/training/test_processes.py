"""Runs of several processes, started as torchrun starts them, over gloo."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from llamagen.cli.main import main
from tests.training.runs import assert_same_state, records, state

pytestmark = pytest.mark.slow


def torchrun(processes, *arguments):
    """Start ``llamagen`` in several processes; return the launcher's own process."""
    # Standalone: the launcher binds a free port itself, so nothing else can take it in between.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={processes}", "-m", "llamagen"]
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )


def run(processes, *arguments):
    if processes == 1:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert not ended.value.code
        return
    process = torchrun(processes, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


LOOP = "--precision float32 --device cpu --batch-size 8 --log-every 1 --validate-every 2 "
LOOP += "--sample-every 0 --size 16 --validation-fraction 0.2 --lr 1e-3 --ema-decay 0.9"


def tokenizer_command(data, out, *more, steps=4):
    flags = "--codebook-size 32 --codebook-dim 4 --base-channels 8 --channel-multipliers 1 1 2 "
    flags += "--norm-groups 4 --z-channels 8 --encoder-blocks 1 --decoder-blocks 1 "
    flags += f"--codebook-init data --steps {steps} {LOOP}"
    return ["train", "tokenizer", "--data", data, "--out", out, *flags.split(), *more]


def transformer_command(data, tokenizer, out, *more, steps=4):
    flags = "--dim 32 --layers 2 --heads 2 --hidden-dim 64 --token-dropout 0 --residual-dropout 0 "
    flags += f"--ffn-dropout 0 --views flip --sample-images 3 --steps {steps} {LOOP}"
    return [
        *("train", "transformer", "--data", data, "--tokenizer", tokenizer, "--out", out),
        *flags.split(),
        *more,
    ]


# Measured on pixels of 8 bits, of which one or the other rounds to its neighbour after a
# difference in the seventh digit: that changes them far more than the difference itself.
OF_WHOLE_PIXELS = ("psnr", "ssim")


def assert_same_losses(a, b):
    for one, other in zip(records(a), records(b), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            rel = 1e-3 if name in OF_WHOLE_PIXELS else 1e-5
            expected = value if isinstance(value, str) else pytest.approx(value, rel=rel, abs=1e-6)
            assert other[name] == expected, (name, one, other)


def test_tokenizer_of_two_processes_is_that_of_one(digits, tmp_path):
    for processes in (1, 2):
        run(processes, *tokenizer_command(digits, tmp_path / str(processes)))
    assert_same_losses(tmp_path / "1", tmp_path / "2")


@pytest.fixture(scope="module")
def of_one_process(digits, tokenizer_folder, tmp_path_factory):
    """A transformer's run; not to be changed."""
    out = tmp_path_factory.mktemp("of-one-process") / "run"
    run(1, *transformer_command(digits, tokenizer_folder, out))
    return out


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient-accumulation", "2"],
        ["--parallel", "fsdp"],
        ["--parallel", "fsdp", "--gradient-accumulation", "2"],
        ["--parallel", "fsdp", "--shard-processes", "1"],
    ],
    ids=["ddp", "fsdp", "fsdp-accumulation", "hybrid"],
)
def test_transformer_of_two_processes_is_that_of_one(
    of_one_process, digits, tokenizer_folder, tmp_path, flags
):
    run(2, *transformer_command(digits, tokenizer_folder, tmp_path / "2", *flags))
    assert_same_losses(of_one_process, tmp_path / "2")


def test_random_orders_of_two_processes_are_those_of_one(digits, tokenizer_folder, tmp_path):
    for processes in (1, 2):
        flags = ["--order", "random", "--parallel", "fsdp" if processes > 1 else "ddp"]
        out = tmp_path / str(processes)
        run(processes, *transformer_command(digits, tokenizer_folder, out, *flags))
    assert_same_losses(tmp_path / "1", tmp_path / "2")


def test_sharded_bfloat16_is_near_that_of_one_process(digits, tokenizer_folder, tmp_path):
    """Sharded weights are gathered in bfloat16; angles and residual stream stay float32."""
    for processes, parallel in ((1, "ddp"), (2, "fsdp")):
        flags = ["--precision", "bfloat16", "--parallel", parallel]
        out = tmp_path / str(processes)
        run(processes, *transformer_command(digits, tokenizer_folder, out, *flags))
    losses = [[line["loss"] for line in records(tmp_path / name)] for name in ("1", "2")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_text_encoder_of_two_processes_is_that_of_one(digits, tokenizer_folder, tmp_path):
    images = shutil.copytree(digits, tmp_path / "images")
    paths = sorted(path.relative_to(images) for path in images.rglob("*.png"))
    rows = [f"{path},digit {path.parent.name}" for path in paths]
    (images / "metadata.csv").write_text("\n".join(["file_name,text", *rows]) + "\n")
    flags = "--condition text --text-dim 16 --text-layers 1 --text-heads 2 --text-dropout 0"
    for processes, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        out = tmp_path / f"{parallel}-{processes}"
        command = transformer_command(images, tokenizer_folder, out, *flags.split())
        run(processes, *command, "--parallel", parallel)
    for parallel in ("ddp", "fsdp"):
        assert_same_losses(tmp_path / "ddp-1", tmp_path / f"{parallel}-2")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resumed_on_other_numbers_of_processes(digits, tokenizer_folder, tmp_path, parallel):
    def train(out, processes, steps):
        flags = ["--parallel", parallel, "--save-every", "2"]
        run(
            processes,
            *transformer_command(digits, tokenizer_folder, tmp_path / out, *flags, steps=steps),
        )

    train("whole", 1, 6)
    for processes, steps in ((2, 2), (1, 4), (2, 6)):
        train("parts", processes, steps)

    def losses(out):
        lines = records(tmp_path / out)
        return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}

    assert losses("parts") == pytest.approx(losses("whole"), rel=1e-5)


def test_same_number_of_processes_resumes_exactly(digits, tokenizer_folder, tmp_path):
    def train(out, steps):
        command = transformer_command(
            digits, tokenizer_folder, tmp_path / out, "--parallel", "fsdp", steps=steps
        )
        run(2, *command, "--token-dropout", "0.2")

    train("whole", 4)
    for steps in (2, 4):
        train("parts", steps)
    assert_same_state(state(tmp_path / "parts", 4), state(tmp_path / "whole", 4))


def test_a_process_that_dies_stops_all(digits, tokenizer_folder, tmp_path):
    out = tmp_path / "run"
    command = transformer_command(digits, tokenizer_folder, out, "--save-every", "5", steps=100000)
    launcher = torchrun(2, *command)
    checkpoints = out / "checkpoints"
    while not list(checkpoints.glob("step-*")):
        assert launcher.poll() is None, launcher.stdout.read()
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[1]), 9)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "lost another process of this run" in output
    before = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
    assert before > 0
    steps = before + 3
    run(1, *transformer_command(digits, tokenizer_folder, out, steps=steps))
    assert records(out)[-1]["step"] == steps


def test_uneven_batch_is_refused(digits, tmp_path):
    process = torchrun(2, *tokenizer_command(digits, tmp_path / "out", "--batch-size", "7"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "batch_size 7 cannot be split over 2 processes" in output
