"""The training loop of both models.

What differs between them is a ``Task``. Every random number of a step comes from the run's seed
and the step's number, so a run that is interrupted goes on exactly as it would have, and what
happens between steps (validation, samples) cannot change it. Longer than most files: it is one
loop, and reads from top to bottom.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamagen.support import distributed
from llamagen.support.devices import find_device
from llamagen.support.errors import InputError
from llamagen.training import curves, metrics
from llamagen.training.checkpoint import Checkpoint, CheckpointWriter, latest_checkpoint
from llamagen.training.config import LoopConfig
from llamagen.training.console import Console
from llamagen.training.ema import Ema
from llamagen.training.optimizer import (
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from llamagen.training.parallel import (
    callable_form,
    gradients_stay_here,
    number,
    place,
    release_gathered,
    require_shares,
    shards_model,
    whole_state,
)
from llamagen.training.run_folder import check_same_data, checkpoint_folder
from llamagen.training.signals import StopRequest
from llamagen.training.task import Batch, Task
from llamagen.training.throughput import peak_flops
from llamagen.training.trackers import open_trackers

_log = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved; the message says how to go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run ended with."""

    out: Path
    """The run's folder."""
    model: Path
    """The exported model's folder."""
    steps: int
    seconds: float
    """Time spent training, over all parts of the run, with validation and samples."""
    train: dict[str, float]
    """The last logged training metrics."""
    validation: dict[str, float]
    """The last validation's metrics; empty without validation images."""
    skipped: int
    """Files that could not be read."""


def fit(
    task: Task,
    config: LoopConfig,
    out: Path,
    *,
    quiet: bool = False,
    run: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Trains ``task`` until the configured step, from the beginning or from a checkpoint.

    To be called in every process of the run, within ``distributed.process_group``.

    Args:
        task: what to train.
        config: how.
        out: the run's folder.
        quiet: no progress on the terminal.
        run: what trackers are told of the run.

    Raises:
        InputError: the data has changed since the run began, the run is past the wanted steps,
            the batch cannot be split over the processes, the gradients stay infinite or not a
            number, or another process was lost.
        TrainingInterrupted: the process was asked to stop; the run was saved.
        OSError: a checkpoint could not be written; the ones before are whole.
    """
    require_shares(config)
    with own_random_numbers(config.device), _lost_processes(out):
        training = _Run(task, config, out, quiet=quiet, about=run or {})
        with training.closing(), StopRequest() as stop:
            batches = task.batches(training.step, config.steps)
            while training.step < config.steps:
                training.take_step(batches)
                stopping = distributed.any_of(stop.requested)
                if training.due(config.log_every):
                    training.log_metrics()
                if training.due(config.validate_every):
                    training.validate()
                if training.due(config.sample_every):
                    training.draw_samples()
                if training.due(config.save_every) or stopping:
                    training.save()
                if stopping and training.step < config.steps:
                    training.finish()
                    raise TrainingInterrupted(
                        f"stopped after step {training.step} of {config.steps}; everything is "
                        f"saved in {out}, and the same command goes on from there"
                    )
            training.finish()
        return training.result()


def try_steps(task: Task, config: LoopConfig, out: Path, *, steps: int) -> list[float]:
    """Takes the first steps of a run and keeps nothing of it.

    Args:
        task: what to train; its model is changed.
        config: how.
        out: an empty folder for temporary files.
        steps: how many.

    Returns:
        Seconds that each step took.
    """
    require_shares(config)
    seconds = []
    with own_random_numbers(config.device):
        training = _Run(task, config, out, quiet=True, about={})
        with training.closing():
            batches = task.batches(0, steps)
            for _ in range(steps):
                start = time.perf_counter()
                training.take_step(batches)
                # The gradients' norm has been read: nothing is left to wait for on a GPU.
                seconds.append(time.perf_counter() - start)
    return seconds


class _Run:
    """A task on its way: everything that changes from step to step."""

    def __init__(
        self, task: Task, config: LoopConfig, out: Path, *, quiet: bool, about: Mapping[str, Any]
    ) -> None:
        self.task, self.config, self.out = task, config, out
        self.device = find_device(config.device)
        self.step = 0
        self.seconds = 0.0
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self.meter = metrics.Meter()
        self._exported: Path | None = None
        self._clock = time.perf_counter()
        self._step_seconds = 0.0
        self._steps_timed = 0
        checkpoint = latest_checkpoint(checkpoint_folder(out))
        if checkpoint is not None:
            check_same_data(checkpoint.about["data"], task.data, out)
            if checkpoint.step > config.steps:
                raise InputError(
                    f"the run in {out} is at step {checkpoint.step} already; "
                    f"give `steps` a larger number than that, or another `out`"
                )
        self._place(config, new=checkpoint is None)
        self.ema = Ema(task.model, config.ema_decay) if config.ema_decay > 0 else None
        self.optimizers = self._make_optimizers()
        if checkpoint is not None:
            self._restore(checkpoint)
        self.writer = CheckpointWriter(
            checkpoint_folder(out), keep=config.keep_checkpoints, keep_every=config.keep_every
        )
        main = distributed.is_main()
        self.log = metrics.MetricsLog(
            out / metrics.FILE_NAME if main else None, last_step=self.step
        )
        self.trackers = open_trackers(config.trackers if main else (), out, about)
        self.console = Console(
            steps=config.steps,
            first=self.step,
            description=f"training {task.name}",
            quiet=quiet or not main,
        )
        if checkpoint is not None:
            self.console.line(f"going on after step {self.step} of the run in {out}")

    def _place(self, config: LoopConfig, *, new: bool) -> None:
        """Puts the models where they are trained; the first weights are there afterwards."""
        task = self.task
        if config.compile:
            for block in task.blocks():
                block.compile()
        place(task.module.train(), config, self.device, units=task.blocks())
        if new:
            task.prepare()
        self.called = callable_form(task.module, self.device)
        self.called_adversary = None
        if task.adversary is not None:
            task.adversary.to(self.device).train()
            self.called_adversary = callable_form(task.adversary, self.device)

    def _make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        made: dict[str, torch.optim.Optimizer] = {}
        made["optimizer"] = make_optimizer(self.task.model, self.config, lr=self.config.lr)
        if self.task.adversary is not None:
            lr = self.task.adversary_lr
            made["adversary_optimizer"] = make_optimizer(self.task.adversary, self.config, lr=lr)
        return made

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Closes what is open in the end, however it ends."""
        with self.console:
            try:
                yield
            finally:
                self.writer.close()
                for tracker in self.trackers:
                    tracker.close()

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def take_step(self, batches: Iterator[Batch]) -> None:
        """Fetches a batch and updates the weights with it."""
        start = time.perf_counter()
        batch = {name: rows.to(self.device) for name, rows in next(batches).items()}
        _seed_step(self.config.seed, self.step)
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, learning_rate(self.config, self.step))
        seen = self._backward(batch)
        norms = {
            f"{name}grad_norm": number(
                nn.utils.clip_grad_norm_(model.parameters(), self.config.clip_norm or math.inf)
            )
            for name, model in self._trained().items()
        }
        self.step += 1
        if all(map(math.isfinite, norms.values())):
            self._skipped_in_a_row = 0
            for optimizer in self.optimizers.values():
                optimizer.step()
            if self.ema is not None:
                self.ema.update(self.step)
            self.task.after_step(self.step)
            for values in seen:
                self.meter.add(values)
            self.meter.add({name: torch.tensor(norm) for name, norm in norms.items()})
        else:
            self._skip_step(norms)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self._step_seconds += time.perf_counter() - start
        self._steps_timed += 1
        self.console.stepped()

    def _trained(self) -> dict[str, nn.Module]:
        """The models by the prefix of their metrics."""
        trained = {"": self.task.model}
        if self.task.adversary is not None:
            trained["discriminator_"] = self.task.adversary
        return trained

    def _backward(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Adds up the gradients of a batch; returns the metrics of its parts."""
        parts = self.config.gradient_accumulation
        chunks = {name: rows.chunk(parts) for name, rows in batch.items()}
        called = [self.called, *([self.called_adversary] if self.called_adversary else [])]
        seen = []
        for index in range(parts):
            with gradients_stay_here(*called, when=index + 1 < parts):
                with autocast(self.device, self.config):
                    losses = self.task.losses(
                        self.called,
                        {name: rows[index] for name, rows in chunks.items()},
                        step=self.step,
                        adversary=self.called_adversary,
                    )
                (losses.total / parts).backward()
                if losses.adversary is not None:
                    (losses.adversary / parts).backward()
            seen.append({"loss": losses.total.detach(), **losses.metrics})
        return seen

    def _skip_step(self, norms: Mapping[str, float]) -> None:
        """Leaves the weights as they are, since there are no gradients to change them with."""
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        named = ", ".join(f"{name} {norm}" for name, norm in norms.items())
        self.console.line(f"step {self.step} is skipped: {named}")
        if self._skipped_in_a_row > self.config.max_skipped_steps:
            self.writer.wait()
            raise InputError(
                f"the gradients of {self._skipped_in_a_row} steps in a row, up to {self.step}, "
                f"were infinite or not a number; the last checkpoint is whole; lower `lr`, raise "
                f"`warmup_steps` or use `precision` float32"
            )

    def log_metrics(self) -> None:
        """Logs the means since the last time."""
        self.writer.check()
        values = self.meter.means()
        values |= self.task.statistics()
        values["lr"] = learning_rate(self.config, self.step - 1) * self.config.lr
        values["skipped_steps"] = self.skipped_steps
        values |= self._speed()
        self.meter.clear()
        self._record("train", values)

    def _speed(self) -> dict[str, float]:
        """What was computed per second since the last time, by all processes together."""
        seconds = max(self._step_seconds, 1e-9)
        images = self._steps_timed * self.config.batch_size / seconds
        self._step_seconds, self._steps_timed = 0.0, 0
        values = {"images_per_second": images}
        values |= {
            f"{name}_per_second": images * count
            for name, count in self.task.units_per_image.items()
        }
        work = self.task.flops_per_image()
        peak = peak_flops(self.device, self.config.precision)
        if work is not None and peak is not None:
            values["mfu"] = images * work / (peak * distributed.world_size())
        return values

    def _record(self, split: str, values: dict[str, float]) -> None:
        self.log.add(self.step, split, values)
        self.console.metrics(self.step, split, values)
        for tracker in self.trackers:
            tracker.metrics(self.step, split, values)

    @contextlib.contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Within this context the task's model has the weights that are looked at and exported."""
        release_gathered(self.task.module)
        with contextlib.ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.in_place())
            stack.enter_context(_evaluating(self.task.module))
            yield
            release_gathered(self.task.module)

    def validate(self) -> None:
        """Logs the metrics on held-out images."""
        with self._evaluated(), autocast(self.device, self.config):
            values = self.task.validate()
        if values:
            self._record("validation", values)

    def draw_samples(self) -> None:
        """Writes this step's sheet of samples."""
        path = self.out / "samples" / f"step-{self.step:07d}.png"
        with self._evaluated(), self._whole_model(self.device) as model:
            if model is not None:
                self.task.draw_samples(model, path)
                for tracker in self.trackers:
                    tracker.picture(self.step, "samples", path)

    @contextlib.contextmanager
    def _whole_model(self, device: torch.device) -> Iterator[nn.Module | None]:
        """All of the model, in the main process; None in the others, which wait for it."""
        if shards_model(self.config):
            state = whole_state(self.task.model)
            model = self.task.whole_model(state).to(device) if distributed.is_main() else None
        else:
            model = self.task.module if distributed.is_main() else None
        try:
            yield model
        finally:
            distributed.barrier()

    def save(self) -> None:
        """Begins to write a checkpoint; writes the model's folder and the curves."""
        self.seconds += time.perf_counter() - self._clock
        self._clock = time.perf_counter()
        self.writer.save(
            step=self.step,
            tensors=self._tensors(),
            state={
                "meter": self.meter.state_dict(),
                "task": self.task.state_dict(),
                "seconds": self.seconds,
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self._skipped_in_a_row,
            },
            about={"data": dict(self.task.data), "model": self.task.describe()},
        )
        if self.config.export or self.step == self.config.steps:
            self._export()
        if distributed.is_main():
            self._draw_curves()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that is large, by its place in a checkpoint."""
        tensors = {"model": self.task.model.state_dict()}
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        if self.task.adversary is not None:
            tensors["adversary"] = self.task.adversary.state_dict()
        models = {"optimizer": self.task.model, "adversary_optimizer": self.task.adversary}
        for name, optimizer in self.optimizers.items():
            model = models[name]
            assert model is not None
            tensors[name] = optimizer_tensors(model, optimizer)
        return tensors

    def _export(self) -> None:
        with self._evaluated(), self._whole_model(torch.device("cpu")) as model:
            if model is not None:
                self._exported = self.task.export(model, self.out)

    def _draw_curves(self) -> None:
        try:
            curves.draw_curves(self.log.records, self.task.panels, self.out / curves.FILE_NAME)
        except InputError as error:
            # The numbers are in metrics.jsonl; a picture is not worth ending a run for.
            _log.warning("no curves: %s", error)

    def _restore(self, checkpoint: Checkpoint) -> None:
        # In place: what the models and optimisers hold are these very tensors.
        checkpoint.read_tensors(self._tensors())
        state = checkpoint.read_state()
        self.step = checkpoint.step
        self.seconds = state["seconds"]
        self.skipped_steps = state["skipped_steps"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.meter.load_state_dict(state["meter"], self.device)
        self.task.load_state_dict(state["task"])

    def finish(self) -> None:
        """Waits until the last checkpoint is whole."""
        self.writer.wait()

    def result(self) -> TrainingResult:
        """What there is now that the last step is done."""
        if not distributed.gathered(self._exported)[0]:
            # The run had ended before; its model's folder may have been moved away since.
            self._export()
        exported = distributed.gathered(self._exported)[0]
        assert exported is not None
        return TrainingResult(
            out=self.out,
            model=exported,
            steps=self.step,
            seconds=self.seconds,
            train=self.log.latest("train"),
            validation=self.log.latest("validation"),
            skipped=self.task.skipped(),
        )


@contextlib.contextmanager
def _lost_processes(out: Path) -> Iterator[None]:
    """Says in one line what it means when another process of the run is gone."""
    try:
        yield
    except RuntimeError as error:
        if distributed.world_size() == 1 or not distributed.is_lost_peer(error):
            raise
        raise InputError(
            f"process {distributed.rank()} lost another process of this run, whose own message "
            f"says why ({str(error).splitlines()[0]}); the same command goes on from the last "
            f"checkpoint in {out}"
        ) from error


@contextlib.contextmanager
def own_random_numbers(device: str, seed: int = 0) -> Iterator[None]:
    """Starts torch's generators from ``seed``; afterwards they are the caller's again."""
    where = find_device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _seed_step(seed: int, step: int) -> None:
    # Hashed: the CPU's generator looks at 32 bits of a seed only, and steps must not share them
    # with the seeds of other runs. Processes have different images, so different dropout.
    own = f" {distributed.rank()}" if distributed.rank() else ""
    digest = hashlib.sha256(f"{seed} {step}{own}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))


def autocast(device: torch.device, config: LoopConfig) -> torch.autocast:
    """The precision of a run's forward passes."""
    enabled = config.precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
