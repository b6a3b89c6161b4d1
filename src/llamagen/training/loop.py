"""The training loop of both models.

What differs between them is a ``Task``. Every random number of a step comes from the run's seed
and the step's number, so an interrupted run continues exactly, and what happens between steps
(validation, samples) cannot change it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamagen.support import distributed
from llamagen.support.devices import find_device
from llamagen.support.errors import InputError
from llamagen.training import trackers
from llamagen.training.checkpoint import Checkpoint, CheckpointWriter, latest_checkpoint
from llamagen.training.config import LoopConfig
from llamagen.training.metrics import Meter, peak_flops
from llamagen.training.optimizer import (
    Ema,
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
from llamagen.training.task import Batch, Task

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OPTIMIZERS = {"model": "optimizer", "adversary": "adversary_optimizer"}
_NORMS = {"model": "grad_norm", "adversary": "discriminator_grad_norm"}

_log = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved; the message says how to continue."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of a finished run."""

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
    recipe: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train ``task`` until the configured step, from the beginning or from a checkpoint.

    All processes of the run call it, within ``distributed.process_group``.

    Args:
        task: what to train.
        config: how.
        out: the run's folder.
        quiet: no progress on the terminal.
        recipe: description of the run for trackers.

    Raises:
        InputError: the data has changed since the run began, the run is past the wanted steps,
            the batch cannot be split over the processes, the gradients stay infinite or not a
            number, or another process was lost.
        TrainingInterrupted: the process was asked to stop; the run was saved.
        OSError: a checkpoint could not be written; the earlier ones are intact.
    """
    require_shares(config)
    with own_random_numbers(config.device), _lost_processes(out):
        run = _Run(task, config, out, quiet=quiet, recipe=recipe or {})
        with run.closing(), _stop_signals() as signals:
            batches = task.batches(run.step, config.steps)
            while run.step < config.steps:
                run.take_step(batches)
                stopping = distributed.any_of(bool(signals))
                if run.due(config.log_every):
                    run.log_metrics()
                if run.due(config.validate_every):
                    run.validate()
                if run.due(config.sample_every):
                    run.draw_samples()
                if run.due(config.save_every) or stopping:
                    run.save()
                if stopping and run.step < config.steps:
                    run.writer.wait()
                    raise TrainingInterrupted(
                        f"stopped after step {run.step} of {config.steps}; everything is "
                        f"saved in {out}, and the same command goes on from there"
                    )
            run.writer.wait()
        return run.result()


def time_steps(task: Task, config: LoopConfig, out: Path, *, steps: int) -> float:
    """Take the first steps of a run and keep nothing of it; return the seconds of the last one.

    ``task``'s model is changed; ``out`` is an empty folder for temporary files.
    """
    require_shares(config)
    seconds = 0.0
    with own_random_numbers(config.device):
        run = _Run(task, config, out, quiet=True, recipe={})
        with run.closing():
            batches = task.batches(0, steps)
            for _ in range(steps):
                start = time.perf_counter()
                # Reads the gradients' norm: nothing is left to wait for on a GPU.
                run.take_step(batches)
                seconds = time.perf_counter() - start
    return seconds


class _Run:
    """A task in training: everything that changes from step to step."""

    def __init__(
        self, task: Task, config: LoopConfig, out: Path, *, quiet: bool, recipe: Mapping[str, Any]
    ) -> None:
        self.task, self.config, self.out = task, config, out
        self.device = find_device(config.device)
        self.step = 0
        self.seconds = 0.0
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self.meter = Meter()
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
        self._place(new=checkpoint is None)
        self.ema = Ema(task.model, config.ema_decay) if config.ema_decay > 0 else None
        if checkpoint is not None:
            self._restore(checkpoint)
        self.writer = CheckpointWriter(
            checkpoint_folder(out), keep=config.keep_checkpoints, keep_every=config.keep_every
        )
        main = distributed.is_main()
        self.log = trackers.MetricsLog(
            out / trackers.METRICS_NAME if main else None, last_step=self.step
        )
        optional = config.trackers if main else ()
        others = [trackers.TRACKERS[name](out, recipe) for name in optional]
        self.console = trackers.Console(
            steps=config.steps,
            first=self.step,
            description=f"training {task.name}",
            quiet=quiet or not main,
        )
        self.trackers: list[trackers.Tracker] = [self.log, self.console, *others]
        if checkpoint is not None:
            self.console.line(f"going on after step {self.step} of the run in {out}")

    def _place(self, *, new: bool) -> None:
        """Move the models to their devices, with their first weights if the run is new."""
        task, config = self.task, self.config
        if config.compile:
            for block in task.blocks():
                block.compile()
        place(task.module.train(), config, self.device, units=task.blocks())
        if new:
            task.prepare()
        self.models: dict[str, nn.Module] = {"model": task.model}
        self.called = [callable_form(task.module, self.device)]
        rates = {"model": config.lr, "adversary": task.adversary_lr}
        if task.adversary is not None:
            self.models["adversary"] = task.adversary.to(self.device).train()
            self.called.append(callable_form(task.adversary, self.device))
        self.optimizers = {
            name: make_optimizer(model, config, lr=rates[name])
            for name, model in self.models.items()
        }

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Close writer and trackers when the block ends, with an error or without."""
        try:
            yield
        finally:
            self.writer.close()
            for tracker in self.trackers:
                tracker.close()

    def due(self, every: int) -> bool:
        """Return whether an action that is due every so many steps, and at the end, is due."""
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def take_step(self, batches: Iterator[Batch]) -> None:
        """Fetch a batch and update the weights with it."""
        start = time.perf_counter()
        batch = {name: rows.to(self.device) for name, rows in next(batches).items()}
        _seed_step(self.config.seed, self.step)
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, learning_rate(self.config, self.step))
        seen = self._backward(batch)
        max_norm = self.config.clip_norm or math.inf
        norms = {
            _NORMS[name]: number(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
            for name, model in self.models.items()
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

    def _backward(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Accumulate the gradients of a batch; return the metrics of its parts."""
        parts = self.config.gradient_accumulation
        chunks = {name: rows.chunk(parts) for name, rows in batch.items()}
        model, *adversaries = self.called
        seen = []
        for index in range(parts):
            with gradients_stay_here(*self.called, when=index + 1 < parts):
                with autocast(self.device, self.config):
                    losses = self.task.losses(
                        model,
                        {name: rows[index] for name, rows in chunks.items()},
                        step=self.step,
                        adversary=adversaries[0] if adversaries else None,
                    )
                (losses.total / parts).backward()
                if losses.adversary is not None:
                    (losses.adversary / parts).backward()
            seen.append({"loss": losses.total.detach(), **losses.metrics})
        return seen

    def _skip_step(self, norms: Mapping[str, float]) -> None:
        """Count a step whose gradients are not finite; the weights stay as they are."""
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
        """Log the means since the last time."""
        self.writer.check()
        values = self.meter.means()
        values |= self.task.statistics()
        values["lr"] = learning_rate(self.config, self.step - 1) * self.config.lr
        values["skipped_steps"] = self.skipped_steps
        values |= self._speed()
        self.meter.clear()
        self._record("train", values)

    def _speed(self) -> dict[str, float]:
        """Return the throughput since the last time, of all processes together."""
        seconds = max(self._step_seconds, 1e-9)
        images = self._steps_timed * self.config.batch_size / seconds
        self._step_seconds, self._steps_timed = 0.0, 0
        values = {"images_per_second": images}
        values |= {
            f"{name}_per_second": images * count
            for name, count in self.task.units_per_image.items()
        }
        flops = self.task.flops_per_image()
        peak = peak_flops(self.device, self.config.precision)
        if flops is not None and peak is not None:
            values["mfu"] = images * flops / (peak * distributed.world_size())
        return values

    def _record(self, split: str, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.metrics(self.step, split, values)

    @contextlib.contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Run a block in eval mode, without gradients, with the mean weights if there are any."""
        module = self.task.module
        release_gathered(module)
        with contextlib.ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.in_place())
            stack.callback(module.train, module.training)
            module.eval()
            stack.enter_context(torch.no_grad())
            yield
            release_gathered(module)

    def validate(self) -> None:
        """Log the metrics on held-out images."""
        with self._evaluated(), autocast(self.device, self.config):
            values = self.task.validate()
        if values:
            self._record("validation", values)

    def draw_samples(self) -> None:
        """Write this step's sheet of samples."""
        path = self.out / "samples" / f"step-{self.step:07d}.png"
        with self._evaluated(), self._whole_model(self.device) as model:
            if model is not None:
                self.task.draw_samples(model, path)
                for tracker in self.trackers:
                    tracker.picture(self.step, "samples", path)

    @contextlib.contextmanager
    def _whole_model(self, device: torch.device) -> Iterator[nn.Module | None]:
        """Yield the unsharded model in the main process, None in the others, which wait for it."""
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
        """Begin to write a checkpoint; write the model's folder and the curves."""
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
            try:
                path = self.out / trackers.CURVES_NAME
                trackers.draw_curves(self.log.records, self.task.panels, path)
            except InputError as error:
                # The numbers are in metrics.jsonl: not worth ending a run for.
                _log.warning("no curves: %s", error)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return models, mean weights and optimisers by their names in a checkpoint."""
        tensors = {name: model.state_dict() for name, model in self.models.items()}
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        for name, optimizer in self.optimizers.items():
            tensors[_OPTIMIZERS[name]] = optimizer_tensors(self.models[name], optimizer)
        return tensors

    def _export(self) -> None:
        with self._evaluated(), self._whole_model(torch.device("cpu")) as model:
            if model is not None:
                self._exported = self.task.export(model, self.out)

    def _restore(self, checkpoint: Checkpoint) -> None:
        # In place: models and optimisers hold these very tensors.
        checkpoint.read_tensors(self._tensors())
        state = checkpoint.read_state()
        self.step = checkpoint.step
        self.seconds = state["seconds"]
        self.skipped_steps = state["skipped_steps"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.meter.load_state_dict(state["meter"], self.device)
        self.task.load_state_dict(state["task"])

    def result(self) -> TrainingResult:
        """Return the result of the finished run."""
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
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list that the first Ctrl-C or SIGTERM is appended to; a second one acts as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)
        previous.clear()

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        restore()

    # Python allows handlers in the main thread only.
    if threading.current_thread() is threading.main_thread():
        for each in _SIGNALS:
            previous[each] = signal.signal(each, receive)
    try:
        yield received
    finally:
        restore()


@contextlib.contextmanager
def _lost_processes(out: Path) -> Iterator[None]:
    """Turn the errors of a lost process into one line."""
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
    """Seed torch's generators for a block; restore the caller's state afterwards."""
    where = find_device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _seed_step(seed: int, step: int) -> None:
    # Hashed: the CPU's generator uses 32 bits of a seed only, and steps must not share them with
    # the seeds of other runs. Processes have different images, so different dropout.
    own = f" {distributed.rank()}" if distributed.rank() else ""
    digest = hashlib.sha256(f"{seed} {step}{own}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))


def autocast(device: torch.device, config: LoopConfig) -> torch.autocast:
    """Return the precision of a run's forward passes, as a context."""
    enabled = config.precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
