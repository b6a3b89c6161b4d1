"""The training loop of both models; what differs between them is a ``Task``.

Every random number of a step comes from the run's seed and the step's number, so an interrupted
run continues exactly, and what happens between steps (validation, samples) cannot change it.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from llamagen.training import optimizer as optim
from llamagen.training import parallel, trackers
from llamagen.training.checkpoint import (
    CHECKPOINTS_NAME,
    Checkpoint,
    CheckpointWriter,
    latest_checkpoint,
)
from llamagen.training.config import LoopConfig
from llamagen.training.metrics import Meter, peak_flops
from llamagen.training.run_folder import check_same_data
from llamagen.training.task import Batch, Task

_OPTIMIZERS = {"model": "optimizer", "adversary": "adversary_optimizer"}
_CURVES_EVERY = 60.0
"""Seconds between pictures of the metrics: each takes as long as many steps of a small model."""
_NORMS = {"model": "grad_norm", "adversary": "discriminator_grad_norm"}

_log = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved; the message says how to continue."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of a finished run in the folder ``out``."""

    out: Path
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
    recipe: Mapping[str, Any] = {},
) -> TrainingResult:
    """Train ``task`` until the configured step, from the beginning or from a checkpoint.

    All processes of the run call it, within ``distributed.process_group``. ``out`` is the run's
    folder; ``quiet`` shows no progress on the terminal; ``recipe`` describes the run to trackers.

    InputError if the data has changed since the run began, the run is past the wanted steps, the
    processes cannot share a batch, the gradients stay infinite or not a number, or another process
    was lost. TrainingInterrupted, once the run is saved, if the process was asked to stop; OSError
    if a checkpoint could not be written: the earlier ones are intact.
    """
    with own_random_numbers(config.device), _lost_processes(out):
        _ = task.data  # of the files as they are before the first step
        run = _Run(task, config, out, quiet=quiet, recipe=recipe)
        with contextlib.closing(run), _stop_signals() as signals:
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
                    run.draw_curves()
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
    with (
        own_random_numbers(config.device),
        contextlib.closing(_Run(task, config, out, quiet=True, recipe={})) as run,
    ):
        batches = task.batches(0, steps)
        return [run.take_step(batches) for _ in range(steps)][-1]


class _Run:
    """A task in training: everything that changes from step to step."""

    def __init__(
        self, task: Task, config: LoopConfig, out: Path, *, quiet: bool, recipe: Mapping[str, Any]
    ) -> None:
        parallel.require_shares(config)
        self.task, self.config, self.out = task, config, out
        self.device = find_device(config.device)
        self.autocast = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16"
        )
        self.step = 0
        self.seconds = 0.0
        self.skipped_steps = self._skipped_in_a_row = 0
        self.meter = Meter()
        self._exported: Path | None = None
        self._clock = self._curves_drawn = time.perf_counter()
        self._step_seconds: list[float] = []
        folder = out / CHECKPOINTS_NAME
        checkpoint = latest_checkpoint(folder)
        if checkpoint is not None:
            check_same_data(checkpoint.about["data"], task.data, out)
            if checkpoint.step > config.steps:
                raise InputError(
                    f"the run in {out} is at step {checkpoint.step} already; "
                    f"give `steps` a larger number than that, or another `out`"
                )
        self._place(new=checkpoint is None)
        self.ema = optim.Ema(task.model, config.ema_decay) if config.ema_decay > 0 else None
        if checkpoint is not None:
            self._restore(checkpoint)
        self.writer = CheckpointWriter(
            folder, keep=config.keep_checkpoints, keep_every=config.keep_every
        )
        main = distributed.is_main()
        log_path = out / trackers.METRICS_NAME if main else None
        self.log = trackers.MetricsLog(log_path, last_step=self.step)
        others = [trackers.TRACKERS[name](out, recipe) for name in config.trackers if main]
        self.console = trackers.Console(
            steps=config.steps, first=self.step, name=task.name, quiet=quiet or not main
        )
        self.trackers: list[trackers.Tracker] = [self.log, self.console, *others]
        if checkpoint is not None:
            self.console.line(f"going on after step {self.step} of the run in {out}")
        elif task.note is not None:
            self.console.line(task.note)

    def _place(self, *, new: bool) -> None:
        """Move the models to their devices, with their first weights if the run is new."""
        task, config = self.task, self.config
        if config.compile:
            for block in task.blocks:
                block.compile()
        parallel.place(task.module.train(), config, self.device, units=task.blocks)
        if new:
            task.prepare()
        self.models: dict[str, nn.Module] = {"model": task.model}
        modules = {"model": task.module}
        if task.adversary is not None:
            self.models["adversary"] = modules["adversary"] = task.adversary.to(self.device).train()
        self.called = {
            name: parallel.callable_form(each, self.device) for name, each in modules.items()
        }
        rates = {"model": config.lr, "adversary": task.adversary_lr}
        self.optimizers = {
            name: optim.make_optimizer(model, config, lr=rates[name])
            for name, model in self.models.items()
        }

    def close(self) -> None:
        self.writer.close()
        for tracker in self.trackers:
            tracker.close()

    def due(self, every: int) -> bool:
        """Return whether what is done every so many steps, and at the end, is due."""
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def take_step(self, batches: Iterator[Batch]) -> float:
        """Fetch a batch and update the weights with it; return the seconds that it took."""
        start = time.perf_counter()
        batch = {name: rows.to(self.device) for name, rows in next(batches).items()}
        # Processes have different images, so different dropout.
        others = (distributed.rank(),) if distributed.rank() else ()
        torch.manual_seed(parallel.seed_of(self.config.seed, self.step, *others))
        rate = optim.learning_rate(self.config, self.step)
        for group in (group for each in self.optimizers.values() for group in each.param_groups):
            group["lr"] = rate * group["full_lr"]
        seen = self._backward(batch)
        max_norm = self.config.clip_norm or math.inf
        # Reading them waits for a GPU, so that a step's time is that of its computation.
        norms = {
            _NORMS[name]: parallel.number(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
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
        self._step_seconds.append(time.perf_counter() - start)
        self.console.stepped()
        return self._step_seconds[-1]

    def _backward(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Accumulate the gradients of a batch; return the metrics of its parts."""
        parts = self.config.gradient_accumulation
        chunks = {name: rows.chunk(parts) for name, rows in batch.items()}
        seen = []
        for index in range(parts):
            with parallel.gradients_stay_here(*self.called.values(), when=index + 1 < parts):
                with self.autocast:
                    losses = self.task.losses(
                        self.called["model"],
                        {name: rows[index] for name, rows in chunks.items()},
                        step=self.step,
                        adversary=self.called.get("adversary"),
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
        self.writer.check()
        values = {
            **self.meter.means(),
            **self.task.statistics(),
            "lr": optim.learning_rate(self.config, self.step - 1) * self.config.lr,
            "skipped_steps": self.skipped_steps,
            **self._speed(),
        }
        self.meter.clear()
        self._record("train", values)

    def _speed(self) -> dict[str, float]:
        """Return the throughput since the last time, of all processes together."""
        seconds = max(sum(self._step_seconds), 1e-9)
        images = len(self._step_seconds) * self.config.batch_size / seconds
        self._step_seconds.clear()
        units = {"images": 1.0, **self.task.units_per_image}
        values = {f"{name}_per_second": images * count for name, count in units.items()}
        flops, peak = self.task.flops_per_image, peak_flops(self.device, self.config.precision)
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
        parallel.release_gathered(module)
        with self.ema.in_place() if self.ema else contextlib.nullcontext(), torch.no_grad():
            module.eval()
            try:
                yield
                parallel.release_gathered(module)
            finally:
                module.train()

    def validate(self) -> None:
        with self._evaluated(), self.autocast:
            values = self.task.validate()
        if values:
            self._record("validation", values)

    def draw_samples(self) -> None:
        path = self.out / "samples" / f"step-{self.step:07d}.png"
        with self._whole_model(self.device) as model:
            if model is not None:
                self.task.draw_samples(model, path)
                for tracker in self.trackers:
                    tracker.picture(self.step, "samples", path)

    @contextlib.contextmanager
    def _whole_model(self, device: torch.device) -> Iterator[nn.Module | None]:
        """Yield the whole model, evaluated, in the main process; the others get None and wait."""
        with self._evaluated():
            model = self.task.module if distributed.is_main() else None
            if parallel.shards_model(self.config):
                state = parallel.whole_state(self.task.model)
                if model is not None:
                    model = self.task.whole_model(state).to(device)
            try:
                yield model
            finally:
                distributed.barrier()

    def save(self) -> None:
        """Begin to write a checkpoint; write the model's folder, and now and then the curves."""
        self.seconds += time.perf_counter() - self._clock
        self._clock = time.perf_counter()
        is_last = self.step == self.config.steps
        state = {
            "meter": self.meter.state_dict(),
            "task": self.task.state_dict(),
            "seconds": self.seconds,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
        }
        about = {"data": dict(self.task.data), "model": self.task.about}
        self.writer.save(step=self.step, tensors=self._tensors(), state=state, about=about)
        if self.config.export or is_last:
            self._export()
        if is_last or self._clock - self._curves_drawn >= _CURVES_EVERY:
            self.draw_curves()

    def draw_curves(self) -> None:
        self._curves_drawn = time.perf_counter()
        if distributed.is_main():
            path = self.out / trackers.CURVES_NAME
            try:
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
            tensors[_OPTIMIZERS[name]] = optim.optimizer_tensors(self.models[name], optimizer)
        return tensors

    def _export(self) -> None:
        with self._whole_model(torch.device("cpu")) as model:
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
        # The run may have ended before, and its model's folder been moved away since.
        if not distributed.gathered(self._exported)[0]:
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
    with contextlib.ExitStack() as restored:

        def receive(number: int, _frame: object) -> None:
            received.append(number)
            restored.close()

        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM):
                restored.callback(signal.signal, each, signal.signal(each, receive))
        yield received


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
