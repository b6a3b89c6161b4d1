"""A run that was interrupted is the run that was not, bit for bit."""

import dataclasses
import os
import random
import resource
import signal
import time

import pytest
import torch

from llamagen.cli.main import main
from llamagen.training import (
    TrainingInterrupted,
    checkpoint,
    train_tokenizer,
    train_transformer,
)
from llamagen.training.checkpoint import latest_checkpoint
from llamagen.training.trackers import Console
from tests import forked
from tests.training.runs import (
    assert_same_state,
    records,
    state,
    tokenizer_recipe,
    transformer_recipe,
)


@pytest.fixture(params=["tokenizer", "transformer"])
def make_run(request, digits, tokenizer_folder):
    """A function that trains in a folder, with further fields of the loop, and the recipe's."""

    def train(out, **changes):
        if request.param == "tokenizer":
            recipe = tokenizer_recipe(digits, out, codebook_init="data", **changes)
            return train_tokenizer(recipe, quiet=True)
        recipe = transformer_recipe(digits, tokenizer_folder, out, **changes)
        return train_transformer(recipe, quiet=True)

    return train


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema_decay": 0.9, "gradient_accumulation": 2, "warmup_steps": 3}],
    ids=["plain", "ema-accumulation-warmup"],
)
def test_resumed_run_matches_uninterrupted(make_run, tmp_path, changes):
    make_run(tmp_path / "whole", **changes)
    make_run(tmp_path / "parts", steps=2, **changes)
    # What the caller did with random numbers in between has no influence.
    torch.manual_seed(12345)
    make_run(tmp_path / "parts", **changes)
    assert_same_state(state(tmp_path / "parts", 4), state(tmp_path / "whole", 4))
    # The first part ended with a log line of its own, at step 2.
    assert records(tmp_path / "parts")[-1] == records(tmp_path / "whole")[-1]


def test_stopped_by_a_signal(make_run, tmp_path, monkeypatch):
    make_run(tmp_path / "whole", steps=6)

    class Interrupting(Console):
        def stepped(self):
            super().stepped()
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr("llamagen.training.trackers.Console", Interrupting)
        with pytest.raises(TrainingInterrupted, match=r"stopped after step 3 of 6; .* goes on"):
            make_run(tmp_path / "parts", steps=6)
    assert signal.getsignal(signal.SIGTERM) is before
    make_run(tmp_path / "parts", steps=6)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert_same_state(state(tmp_path / "parts", 6), state(tmp_path / "whole", 6))


def test_crash_between_checkpoints(make_run, tmp_path, monkeypatch):
    make_run(tmp_path / "whole", steps=6)

    class Crashing(Console):
        def stepped(self):
            super().stepped()
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == 4:
                raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("llamagen.training.trackers.Console", Crashing)
        with pytest.raises(RuntimeError, match="power cut"):
            make_run(tmp_path / "parts", steps=6)
    # Step 4 was taken but not saved, and there is a line of step 3 after the checkpoint of 2.
    assert records(tmp_path / "parts")[-1]["step"] == 3
    make_run(tmp_path / "parts", steps=6)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert_same_state(state(tmp_path / "parts", 6), state(tmp_path / "whole", 6))


def test_a_checkpoint_becomes_whole_when_the_run_ends_early(make_run, tmp_path, monkeypatch):
    checksums = checkpoint._checksums

    def slowly(folder):
        time.sleep(0.5)
        return checksums(folder)

    def refuse(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_checksums", slowly)
        patch.setattr("llamagen.training.loop._Run._export", refuse)
        with pytest.raises(OSError, match="no space left"):
            make_run(tmp_path / "run")
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert latest_checkpoint(kept.parent).path == kept


def test_continues_from_the_checkpoint_before_a_damaged_one(make_run, tmp_path, caplog):
    make_run(tmp_path / "whole")
    make_run(tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "step-0000004" / "state.pt").write_bytes(b"")
    make_run(tmp_path / "parts")
    assert "step-0000004 is damaged" in caplog.text
    assert_same_state(state(tmp_path / "parts", 4), state(tmp_path / "whole", 4))


def test_finished_run(make_run, tmp_path):
    first = make_run(tmp_path / "run")
    again = make_run(tmp_path / "run")
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert again.model.is_dir()


def test_callers_random_numbers_are_left_alone(make_run, tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    make_run(tmp_path / "run", steps=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_differ(make_run, tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / str(seed), steps=3, seed=seed)
    losses = [records(tmp_path / str(seed))[1]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


def _train_with_small_files(words):
    """The system refuses to write more, as it does on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    main(words)


def test_a_disk_that_fills_up(digits, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_here(digits, whole, steps=12)
    train_here(digits, run, steps=6)
    words = training_command(digits, run, steps=12)
    stopped = forked.start(__name__, "_train_with_small_files", words, log=tmp_path / "log")
    stopped.join(300)
    assert stopped.exitcode == 1
    last = (tmp_path / "log.err").read_text().strip().splitlines()[-1]
    assert last.startswith("llamagen: error: ")
    assert "File too large" in last
    # What was saved before is whole, and the run ends as if nothing had happened.
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-0000003",
        "step-0000006",
    }
    train_here(digits, run, steps=12)
    assert records(run)[-1] == records(whole)[-1]


def training_command(digits, out, *, steps):
    """The words of a command that saves every third step."""
    flags = "--size 16 --validation-fraction 0.2 --codebook-size 32 --codebook-dim 4 "
    flags += "--base-channels 8 --channel-multipliers 1 1 2 --norm-groups 4 --z-channels 8 "
    flags += f"--encoder-blocks 1 --decoder-blocks 1 --dropout 0.1 --batch-size 4 --steps {steps} "
    flags += "--precision float32 --device cpu --log-every 5 --save-every 3 --seed 3"
    return ["train", "tokenizer", "--data", str(digits), "--out", str(out), *flags.split()]


def train_here(digits, out, *, steps):
    """Run the command in this process."""
    with pytest.raises(SystemExit) as ended:
        main(training_command(digits, out, steps=steps))
    assert not ended.value.code


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.long])])
def test_killed_process(digits, tmp_path, kills):
    steps = 12 + 5 * kills
    train_here(digits, tmp_path / "whole", steps=steps)
    moments = random.Random()
    for _ in range(kills):
        words = training_command(digits, tmp_path / "killed", steps=steps)
        process = forked.start("llamagen.cli.main", "main", words, log=tmp_path / "log")
        checkpoints = tmp_path / "killed" / "checkpoints"
        known = set(checkpoints.glob("step-*"))
        # Until this process has saved something, then at any moment: in a save as well.
        while process.is_alive() and not set(checkpoints.glob("step-*")) - known:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.3))
        process.kill()
        process.join()
    train_here(digits, tmp_path / "killed", steps=steps)
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert not list(checkpoints.glob(".*")), "what the killed process left is cleared away"
