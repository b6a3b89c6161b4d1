"""Training of the transformer, on classes or captions (paper section 3.2).

Shapes: B images, T codes of an image.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llamagen.checkpoints import load_tokenizer, resolve_pipeline
from llamagen.checkpoints.sources import Source
from llamagen.data.images import CorruptImageError, SkippedFiles
from llamagen.data.live_codes import CodeSource, LiveCodes
from llamagen.data.loader import DataOrder
from llamagen.data.store import CodeStore
from llamagen.generation.request import check_schedule, uniform_draws
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.pipeline import Pipeline
from llamagen.support import content, distributed
from llamagen.support import labels as label_files
from llamagen.support.devices import find_device
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from llamagen.support.pictures import image_grid, save_png
from llamagen.text.features import TextStore
from llamagen.training.config import TransformerTraining
from llamagen.training.data import CodeSplits, find_codes
from llamagen.training.loop import TrainingResult, fit, own_random_numbers
from llamagen.training.lora import save_adapter
from llamagen.training.metrics import training_flops
from llamagen.training.next_code import (
    FeatureConditioning,
    NextCodeModel,
    captions_of_rows,
    most_likely_caption,
)
from llamagen.training.parallel import shards_model
from llamagen.training.recipes import recipe_to_dict
from llamagen.training.run_folder import (
    SKIPPED_NAME,
    TEXT_ENCODER,
    VALIDATION_CODES,
    lock_run,
    open_run,
)
from llamagen.training.task import Batch, Losses, Task
from llamagen.training.transformer_start import Start, find_start

PIPELINE_FOLDER = "pipeline"
"""The exported pipeline, in the run's folder."""
ADAPTER_FOLDER = "adapter"
"""The LoRA adapter of a fine-tuned model, in the run's folder."""

_SHEET_CLASSES = 10
_SHEET_TEXT = 24
"""Characters of a caption that are shown below an image."""


def train_transformer(recipe: TransformerTraining, *, quiet: bool = False) -> TrainingResult:
    """Train a transformer, or resume the run in the recipe's folder; ``quiet`` shows no progress.

    Images are encoded once, at the start, and the codes stay in the run's folder; or each time
    they are read, or not at all if the recipe names a store of codes. The result's ``model`` is a
    folder for ``Pipeline.from_pretrained``. Raises as ``train_tokenizer`` does.
    """
    with distributed.process_group(recipe.loop.device), lock_run(recipe.out):
        recipe = open_run(recipe)
        task = make_task(recipe)
        return fit(task, recipe.loop, recipe.out, quiet=quiet, recipe=recipe_to_dict(recipe))


def make_task(recipe: TransformerTraining) -> TransformerTask:
    """Return the task of a recipe, its data read and its model built; for errors see above."""
    source: Source | None = recipe.tokenizer
    if source is None and recipe.init is not None:
        source = resolve_pipeline(recipe.init).tokenizer
    if source is None:
        raise InputError("no image tokenizer was named; give `tokenizer` a folder or a name")
    with distributed.main_first():
        # float32: the codes are made once and used many times.
        device = find_device(recipe.loop.device)
        tokenizer = load_tokenizer(source, device=device, dtype=torch.float32)
    codes = find_codes(recipe, tokenizer)
    by_class = recipe.condition == "class"
    start = find_start(
        recipe,
        codebook_size=tokenizer.config.codebook_size,
        grid=codes.training.grid,
        class_names=_class_names(recipe.num_classes, codes.training) if by_class else (),
    )
    codes.training.check_fits(start.config)
    with own_random_numbers(recipe.loop.device):
        return TransformerTask(start, tokenizer, codes)


def _class_names(num_classes: int | None, codes: CodeSource) -> tuple[str, ...]:
    """Return a name for each class of the model: those of the data, then numbers for the rest."""
    if codes.labels is None:
        raise InputError(
            f"the codes in {codes.folder} have no labels; make them from images in class folders"
        )
    found = codes.class_names or Labels.numbered(int(codes.labels.max()) + 1).names
    wanted = num_classes or len(found)
    if wanted < len(found):
        raise InputError(
            f"num_classes is {wanted}, but {codes.folder} has {len(found)} classes; "
            f"raise it or leave it out"
        )
    return found + Labels.numbered(wanted).names[len(found) :]


class TransformerTask(Task):
    """Predict each code from the class or caption and the previous codes."""

    name = "transformer"
    module: NextCodeModel

    def __init__(self, start: Start, tokenizer: ImageTokenizer, codes: CodeSplits) -> None:
        """Make a task with a new model, which has its weights after ``prepare``."""
        recipe, loop = start.recipe, start.recipe.loop
        self.recipe, self.start = recipe, start
        # Before the first sheet of samples is drawn, or a model is exported.
        check_schedule(recipe.sampling, start.config.order, start.config.num_codes)
        with torch.device("meta") if shards_model(loop) else contextlib.nullcontext():
            self.module = start.build()
        self.module.transformer.recompute_blocks = loop.activation_checkpointing == "blocks"
        self.model = self.module.saved
        self._conditioning = start.conditioning(self.module)
        self._conditioning.check(codes.training, codes.train_rows)
        self.panels = {
            "loss in bits per code": ("bits_per_code",),
            "norm of the gradients": ("grad_norm",),
        }
        self.about = start.describe()
        self.blocks = list(self.module.transformer.layers)
        self.units_per_image = {"tokens": float(math.prod(codes.training.grid))}
        self.flops_per_image = training_flops(start.config)
        data = {
            "the image tokenizer": tokenizer.fingerprint(),
            "the training codes": codes.training.identity,
            "the number of training images": str(len(codes.train_rows)),
        }
        if start.text.encoder is not None:
            data[TEXT_ENCODER] = start.text.encoder.fingerprint()
        if codes.validation is not codes.training:
            data[VALIDATION_CODES] = codes.validation.identity
        # Codes that the run itself made follow from what their identity says.
        stores = {
            "the training codes": None if recipe.codes is None else codes.training,
            VALIDATION_CODES: None if recipe.validation_codes is None else codes.validation,
            "the text features": start.text.features,
        }
        with distributed.main_first():
            for name, store in stores.items():
                if isinstance(store, CodeStore | TextStore):
                    data[name] = content.identity(store.identity, store.content_digest())
        self.data = data
        self._tokenizer, self._codes = tokenizer, codes
        # Files that have no codes since they could not be read.
        sources = {source.folder: source for source in (codes.training, codes.validation)}
        skipped = [pair for source in sources.values() for pair in source.skipped()]
        self._skipped = len(skipped)
        if distributed.is_main():
            SkippedFiles(recipe.out / SKIPPED_NAME).add(
                CorruptImageError(Path(key), reason) for key, reason in skipped
            )
        self._order = DataOrder(
            count=len(codes.train_rows),
            batch_size=loop.batch_size,
            seed=loop.seed,
            group=recipe.text.length_group if recipe.condition == "text" else 1,
            lengths=self._caption_lengths,
        )

    def _caption_lengths(self, indices: Sequence[int]) -> list[int]:
        """Return the characters of the most likely captions, which costs no tokenisation."""
        rows = self._codes.train_rows[np.array(indices)]
        captions = captions_of_rows(self._codes.training, rows)
        return [len(most_likely_caption(each)) for each in captions]

    def prepare(self) -> None:
        """See ``Task``."""
        self.start.fill(self.module)

    def whole_model(self, state: Mapping[str, Tensor]) -> nn.Module:
        """See ``Task``; low-rank matrices are merged into it."""
        return self.start.whole(state)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Yield codes of one view per image, conditions, and which of them are dropped."""
        store, dropout = self._codes.training, self.recipe.condition_dropout
        for step in range(first, last):
            samples = distributed.share(self._order.batch(step))
            # One for each image: its process and its part of the batch make no difference.
            rngs = [self._order.random(sample) for sample in samples]
            views = np.array([rng.randrange(store.views) for rng in rngs])
            indices = np.array([sample.index for sample in samples])
            rows = store.readable(self._codes.train_rows[indices])
            drop = torch.tensor([rng.random() < dropout for rng in rngs])
            condition = self._conditioning.batch(store, rows, rngs)
            ordered = self._in_order(
                _codes(store, rows, views), (rng.getrandbits(63) for rng in rngs)
            )
            given = self._noisy(ordered["codes"], rngs)
            yield {**condition, **ordered, "input": given, "drop": drop}

    def _in_order(self, codes: Tensor, seeds: Iterable[int]) -> Batch:
        """Return codes (B, T) as they are predicted; in a random order of the seeds: "order"."""
        if self.start.config.order == "raster":
            return {"codes": codes}
        order = uniform_draws(list(seeds), codes.shape[1]).argsort(dim=1, stable=True)
        return {"codes": codes.gather(1, order), "order": order}

    def _noisy(self, codes: Tensor, rngs: Sequence[random.Random]) -> Tensor:
        """Return all codes (B, T) but the last of each image, some replaced by random ones."""
        given, noise = codes[:, :-1], self.recipe.code_noise
        if noise == 0:
            return given
        generators = [np.random.Generator(np.random.Philox(rng.getrandbits(64))) for rng in rngs]
        length, size = given.shape[1], self.start.config.codebook_size
        noisy = np.stack([g.random(length) < g.random() * noise for g in generators])
        others = np.stack([g.integers(size, size=length) for g in generators])
        return torch.where(torch.from_numpy(noisy), torch.from_numpy(others), given)

    def losses(
        self, model: nn.Module, batch: Batch, *, step: int, adversary: nn.Module | None
    ) -> Losses:
        """Return the cross-entropy of all codes, and the loss of the code sets if it is used."""
        del step, adversary
        loss, *auxiliary = self._loss(model, batch).reshape(-1)
        metrics = {"bits_per_code": loss.detach() / math.log(2.0)}
        if "weights" in batch:
            metrics["without_caption"] = 1.0 - batch["weights"].mean()
        for each in auxiliary:
            metrics["code_set_loss"] = each.detach()
            loss = loss + self.recipe.text.code_set_weight * each
        return Losses(total=loss, metrics=metrics)

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(
            batch["input"],
            self._conditioning.model_input(batch),
            batch["codes"],
            condition_mask=batch.get("mask"),
            drop_condition=batch.get("drop"),
            order=batch.get("order"),
            weights=batch.get("weights"),
        )

    def validate(self) -> dict[str, float]:
        """Return the loss on the held-out images, with their labels or most likely captions."""
        rows, store = self._codes.val_rows, self._codes.validation
        if len(rows) == 0:
            return {}
        loop, total = self.recipe.loop, 0.0
        size = loop.batch_size // loop.gradient_accumulation  # of all processes together
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            own = part[list(distributed.share(range(len(part))))]
            # A sharded model is called by all processes or by none.
            used = own if len(own) else rows[:1]
            # An image always has the same order.
            batch = self._in_order(_codes(store, used, 0), used.tolist())
            batch["input"] = batch["codes"][:, :-1]
            batch |= self._conditioning.batch(store, used, None)
            batch = {name: rows.to(find_device(loop.device)) for name, rows in batch.items()}
            total += float(self._loss(self.module, batch)) * len(own)
        loss = distributed.summed({"loss": total})["loss"] / len(rows)
        return {"loss": loss, "bits_per_code": loss / math.log(2.0)}

    def draw_samples(self, model: nn.Module, path: Path) -> None:
        """Draw images of a few classes, one per column, or of held-out captions; of fixed seeds."""
        prompts, names, columns = self._prompts()
        pipeline = self._pipeline_of(model)
        if isinstance(self._conditioning, FeatureConditioning):
            # The encoder that made them need not be here.
            embeds, mask, _ = self._conditioning.texts([str(prompt) for prompt in prompts])
            images = pipeline(prompt_embeds=embeds, prompt_attention_mask=mask, seed=0).images
        else:
            images = pipeline(prompts, seed=0).images
        save_png(image_grid(images, columns=columns, captions=names, scale=None), path)

    def _prompts(self) -> tuple[Sequence[str | int], list[str], int]:
        """Return the prompts of a sheet, the text below each image, and the number of columns."""
        labels, count = self.start.labels, self.recipe.sample_images
        if labels is not None:
            columns = min(_SHEET_CLASSES, len(labels), count)
            shown = [i % columns * len(labels) // columns for i in range(count)]
            return shown, [labels.name(label) for label in shown], columns
        texts: list[str] = []
        codes = self._codes
        for store, rows in (codes.validation, codes.val_rows), (codes.training, codes.train_rows):
            some = rows[np.arange(min(count, len(rows))) * len(rows) // count]
            texts = texts or [most_likely_caption(e) for e in captions_of_rows(store, some) if e]
        short = [t if len(t) <= _SHEET_TEXT else f"{t[: _SHEET_TEXT - 1]}…" for t in texts]
        return texts, short, min(_SHEET_CLASSES, len(texts))

    def export(self, model: nn.Module, out: Path) -> Path:
        """Write the pipeline's folder; with LoRA, of merged weights, and the adapter's as well."""
        lora = self.recipe.lora
        if lora.lora_rank > 0:
            assert isinstance(model, NextCodeModel)
            state = model.saved.state_dict()
            save_adapter(state, lora, out / ADAPTER_FOLDER, base=str(self.recipe.init))
            if self.start.labels is not None:
                self.start.labels.save(out / ADAPTER_FOLDER / label_files.FILE_NAME)
            model = self.whole_model(state)
        self._pipeline_of(model).save_pretrained(out / PIPELINE_FOLDER)
        return out / PIPELINE_FOLDER

    def skipped(self) -> int:
        """See ``Task``."""
        training = self._codes.training
        return self._skipped + (training.damaged if isinstance(training, LiveCodes) else 0)

    def _pipeline_of(self, model: nn.Module) -> Pipeline:
        assert isinstance(model, NextCodeModel)
        return self.start.pipeline(self._tokenizer, model)


def _codes(store: CodeSource, rows: np.ndarray, views: np.ndarray | int) -> Tensor:
    """Return codes (B, T) of the given rows and views."""
    codes = store.rows(rows, views).reshape(len(rows), -1)
    return torch.from_numpy(codes.astype(np.int64))
