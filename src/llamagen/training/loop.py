"""The training loop of both models.

What differs between them is a ``Task``. Every random number of a step comes from the run's seed
and the step's number, so a run that is interrupted goes on exactly as it would have, and what
happens between steps (validation, samples) cannot change it.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llamagen.devices import find_device
from llamagen.errors import InputError
from llamagen.training import curves, metrics
from llamagen.training.checkpoint import latest_checkpoint, save_checkpoint
from llamagen.training.config import LoopConfig
from llamagen.training.console import Console
from llamagen.training.ema import Ema
from llamagen.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from llamagen.training.run_folder import check_same_data, checkpoint_folder
from llamagen.training.signals import StopRequest

Batch = dict[str, Tensor]
"""Named tensors with one row per image."""

_log = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved; the message says how to go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """What a task computes of a batch."""

    total: Tensor
    """Scalar, to be minimised by the model."""
    metrics: dict[str, Tensor]
    """Scalars to be logged, without gradients."""
    adversary: Tensor | None = None
    """Scalar, to be minimised by the adversary; it leads back to nothing of the model."""


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


class Task(abc.ABC):
    """What is trained, on what, and how one sees how well."""

    name: ClassVar[str]
    panels: ClassVar[Mapping[str, Sequence[str]]]
    """The curves: title -> metrics."""
    model: nn.Module
    adversary: nn.Module | None = None
    """Trained against the model, with an optimiser of its own; always in training mode."""
    adversary_lr: float = 0.0
    """The adversary's learning rate where the model's is the recipe's; both follow one schedule."""
    data: Mapping[str, str]
    """Identity of everything that the run reads, by name."""

    def prepare(self) -> None:  # noqa: B027
        """Called once before the first step of a new run, with the model on its device."""

    @abc.abstractmethod
    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of the steps from ``first`` up to but not including ``last``."""

    @abc.abstractmethod
    def losses(
        self, model: nn.Module, batch: Batch, *, step: int, adversary: nn.Module | None
    ) -> Losses:
        """Of one batch, or of a part of it.

        Args:
            model: ``self.model`` as it is to be called: perhaps in a wrapper of torch.
            batch: this process's rows, on its device.
            step: finished steps.
            adversary: ``self.adversary``, likewise.
        """

    def after_step(self, step: int) -> None:  # noqa: B027
        """Called in every process after the weights have moved in step ``step``."""

    def statistics(self) -> dict[str, float]:
        """Further numbers to log, of the recent batches together."""
        return {}

    @abc.abstractmethod
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on held-out images; empty if there are none."""

    @abc.abstractmethod
    def draw_samples(self, model: nn.Module, path: Path) -> None:
        """Writes a picture that shows what the model can do."""

    @abc.abstractmethod
    def export(self, model: nn.Module, out: Path) -> Path:
        """Writes the model's folder into the run's; returns it."""

    @abc.abstractmethod
    def skipped(self) -> int:
        """Files that could not be read so far."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside model and optimiser."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Takes up what ``state_dict`` returned."""


def fit(task: Task, config: LoopConfig, out: Path, *, quiet: bool = False) -> TrainingResult:
    """Trains ``task`` until the configured step, from the beginning or from a checkpoint.

    Raises:
        InputError: the data has changed since the run began, the run is past the wanted steps,
            or the loss is not finite.
        TrainingInterrupted: the process was asked to stop; the run was saved.
    """
    with own_random_numbers(config.device):
        run = _Run(task, config, out, quiet=quiet)
        with run.console, StopRequest() as stop:
            batches = task.batches(run.step, config.steps)
            while run.step < config.steps:
                run.take_step(batches)
                if run.due(config.log_every):
                    run.log_metrics()
                if run.due(config.validate_every):
                    run.validate()
                if run.due(config.sample_every):
                    run.draw_samples()
                if run.due(config.save_every) or stop.requested:
                    run.save()
                if stop.requested and run.step < config.steps:
                    raise TrainingInterrupted(
                        f"stopped after step {run.step} of {config.steps}; everything is saved in "
                        f"{out}, and the same command goes on from there"
                    )
        return run.result()


class _Run:
    """A task on its way: everything that changes from step to step."""

    def __init__(self, task: Task, config: LoopConfig, out: Path, *, quiet: bool) -> None:
        self.task, self.config, self.out = task, config, out
        self.device = find_device(config.device)
        self.step = 0
        self.seconds = 0.0
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
                    f"give --steps a larger number than that, or another --out"
                )
        task.model.to(self.device).train()
        if checkpoint is None:
            task.prepare()
        self.ema = Ema(task.model, config.ema_decay) if config.ema_decay > 0 else None
        self.optimizer = make_optimizer(task.model, config)
        if checkpoint is not None:
            self._restore(checkpoint.step, checkpoint.state)
        self.log = metrics.MetricsLog(out / metrics.FILE_NAME, last_step=self.step)
        self.console = Console(
            steps=config.steps, first=self.step, description=f"training {task.name}", quiet=quiet
        )
        if checkpoint is not None:
            self.console.line(f"going on after step {self.step} of the run in {out}")

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated, sampled and exported."""
        return self.task.model if self.ema is None else self.ema.model

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def take_step(self, batches: Iterator[Batch]) -> None:
        """Fetches a batch and updates the weights with it."""
        start = time.perf_counter()
        batch = {name: rows.to(self.device) for name, rows in next(batches).items()}
        _seed_step(self.config.seed, self.step)
        set_learning_rate(self.optimizer, learning_rate(self.config, self.step))
        self._backward(batch)
        if self.config.clip_norm > 0:
            norm = nn.utils.clip_grad_norm_(self.task.model.parameters(), self.config.clip_norm)
            self.meter.add({"grad_norm": norm})
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        self._step_seconds += time.perf_counter() - start
        self._steps_timed += 1
        self.console.stepped()

    def _backward(self, batch: Batch) -> None:
        parts = self.config.gradient_accumulation
        chunks = {name: rows.chunk(parts) for name, rows in batch.items()}
        for index in range(parts):
            with _autocast(self.device, self.config):
                losses = self.task.losses(
                    self.task.model, {name: rows[index] for name, rows in chunks.items()}
                )
            (losses.total / parts).backward()
            self.meter.add({"loss": losses.total, **losses.metrics})

    def log_metrics(self) -> None:
        """Logs the means since the last time."""
        values = self.meter.means()
        metrics.require_finite(values, self.step)
        values |= self.task.statistics()
        values["lr"] = learning_rate(self.config, self.step - 1)
        images = self._steps_timed * self.config.batch_size
        values["images_per_second"] = images / max(self._step_seconds, 1e-9)
        self.meter.clear()
        self._step_seconds, self._steps_timed = 0.0, 0
        self.log.add(self.step, "train", values)
        self.console.metrics(self.step, "train", values)

    def validate(self) -> None:
        """Logs the metrics on held-out images."""
        model = self.evaluated
        with _evaluating(model), _autocast(self.device, self.config):
            values = self.task.validate(model)
        if values:
            self.log.add(self.step, "validation", values)
            self.console.metrics(self.step, "validation", values)

    def draw_samples(self) -> None:
        """Writes this step's sheet of samples."""
        model = self.evaluated
        with _evaluating(model):
            self.task.draw_samples(model, self.out / "samples" / f"step-{self.step:07d}.png")

    def save(self) -> None:
        """Writes a checkpoint, the model's folder and the curves."""
        metrics.require_finite(self.meter.means(), self.step)
        self.seconds += time.perf_counter() - self._clock
        self._clock = time.perf_counter()
        save_checkpoint(
            checkpoint_folder(self.out),
            step=self.step,
            state={
                "model": self.task.model.state_dict(),
                "ema": None if self.ema is None else self.ema.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "meter": self.meter.state_dict(),
                "task": self.task.state_dict(),
                "seconds": self.seconds,
            },
            about={"data": dict(self.task.data)},
            keep=self.config.keep_checkpoints,
        )
        self._export()
        self._draw_curves()

    def _export(self) -> None:
        with _evaluating(self.evaluated):
            self._exported = self.task.export(self.evaluated, self.out)

    def _draw_curves(self) -> None:
        try:
            curves.draw_curves(self.log.records, self.task.panels, self.out / curves.FILE_NAME)
        except InputError as error:
            # The numbers are in metrics.jsonl; a picture is not worth ending a run for.
            _log.warning("no curves: %s", error)

    def _restore(self, step: int, state: Mapping[str, Any]) -> None:
        self.step = step
        self.seconds = state["seconds"]
        self.task.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meter.load_state_dict(state["meter"], self.device)
        self.task.load_state_dict(state["task"])

    def result(self) -> TrainingResult:
        """What there is now that the last step is done."""
        if self._exported is None:
            # The run had ended before; its model's folder may have been moved away since.
            self._export()
        assert self._exported is not None
        return TrainingResult(
            out=self.out,
            model=self._exported,
            steps=self.step,
            seconds=self.seconds,
            train=self.log.latest("train"),
            validation=self.log.latest("validation"),
            skipped=self.task.skipped(),
        )


@contextlib.contextmanager
def own_random_numbers(device: str, seed: int = 0) -> Iterator[None]:
    """Starts torch's generators from ``seed``; afterwards they are the caller's again."""
    where = find_device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _seed_step(seed: int, step: int) -> None:
    # Hashed: the CPU's generator looks at 32 bits of a seed only, and steps must not share them
    # with the seeds of other runs.
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))


def _autocast(device: torch.device, config: LoopConfig) -> torch.autocast:
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
