"""Training of the class-conditional transformer (paper section 3.2).

Shapes: B images, T codes of an image, V views of an image.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from llamagen.checkpoints import load_tokenizer
from llamagen.data.codes import CodeSet, load_or_extract, tokenizer_fingerprint
from llamagen.data.images import ImageFolder, SkippedFiles
from llamagen.data.order import DataOrder
from llamagen.data.views import Views
from llamagen.devices import find_device
from llamagen.errors import InputError
from llamagen.labels import Labels
from llamagen.pictures import image_grid, save_png
from llamagen.pipeline import Pipeline
from llamagen.tokenizer import ImageTokenizer
from llamagen.training.config import TransformerTraining
from llamagen.training.loop import Batch, Losses, Task, TrainingResult, fit, own_random_numbers
from llamagen.training.losses import bits, code_loss
from llamagen.training.run_folder import SKIPPED_NAME, open_run, start_run
from llamagen.training.sources import Images, find_run_images
from llamagen.transformer import Transformer

PIPELINE_FOLDER = "pipeline"
"""The exported pipeline, in the run's folder."""
CODES_FOLDER = "codes"
"""The codes of the images, in the run's folder."""

_SHEET_CLASSES = 10
_SHEET_SIDE = 64
"""Smaller images are enlarged to about this many pixels on a sheet."""


def train_transformer(recipe: TransformerTraining, *, quiet: bool = False) -> TrainingResult:
    """Trains a transformer, or goes on with it if the run's folder holds a checkpoint.

    The images are encoded once, at the start; the codes stay in the run's folder.

    Args:
        recipe: the whole run.
        quiet: no progress on the terminal.

    Returns:
        The last metrics; ``model`` is a folder for ``Pipeline.from_pretrained``.

    Raises:
        FileNotFoundError: a folder does not exist.
        InputError: recipe, images, tokenizer and the run's folder do not fit together.
        TrainingInterrupted: the process was asked to stop; the run was saved.
    """
    recipe = open_run(recipe)
    if recipe.tokenizer is None:
        raise InputError("no image tokenizer was named; give --tokenizer a folder or a name")
    images = find_run_images(recipe.data, recipe.validation_data, recipe.images, labelled=True)
    # float32: the codes are made once and learnt many times.
    tokenizer = load_tokenizer(
        recipe.tokenizer, device=find_device(recipe.loop.device), dtype=torch.float32
    )
    names = _class_names(recipe, images.training)
    config = recipe.model.config(
        codebook_size=tokenizer.config.codebook_size,
        grid=tokenizer.config.grid_of(*recipe.images.shape),
        num_classes=len(names),
    )
    start_run(recipe)
    skipped = SkippedFiles(recipe.out / SKIPPED_NAME)
    training, validation = _codes(recipe, tokenizer, images, skipped)
    training.check_fits(config)
    with own_random_numbers(recipe.loop.device, recipe.loop.seed):
        transformer = Transformer(config)
    task = TransformerTask(
        recipe,
        Pipeline(
            tokenizer,
            transformer,
            labels=Labels(names),
            name=recipe.out.name,
            sampling=recipe.sampling,
        ),
        training,
        validation,
        data={
            **images.identity,
            "the number of readable images": str(len(training)),
            "the image tokenizer": tokenizer_fingerprint(tokenizer),
        },
        skipped=skipped,
    )
    return fit(task, recipe.loop, recipe.out, quiet=quiet)


def _class_names(recipe: TransformerTraining, images: ImageFolder) -> tuple[str, ...]:
    """One name per class of the model: those of the data, then numbers for the rest."""
    found = images.class_names
    wanted = recipe.num_classes or len(found)
    if wanted < len(found):
        raise InputError(
            f"num_classes is {wanted}, but {images.root} has {len(found)} classes; "
            f"raise it or leave it out"
        )
    return found + Labels.numbered(wanted).names[len(found) :]


def _codes(
    recipe: TransformerTraining, tokenizer: ImageTokenizer, images: Images, skipped: SkippedFiles
) -> tuple[CodeSet, CodeSet | None]:
    """Codes of the training and of the validation images."""
    height, width = recipe.images.shape
    sets = {
        "training": (images.training, Views(height=height, width=width, kind=recipe.views)),
        "validation": (images.validation, Views(height=height, width=width)),
    }
    codes = {
        name: load_or_extract(
            recipe.out / CODES_FOLDER / f"{name}.npz",
            tokenizer,
            folder,
            views,
            skipped=skipped,
            workers=recipe.images.workers,
        )
        for name, (folder, views) in sets.items()
        if len(folder) > 0
    }
    return codes["training"], codes.get("validation")


class TransformerTask(Task):
    """Predict each code from the class and the codes before it."""

    name = "transformer"
    panels: ClassVar[Mapping[str, Sequence[str]]] = {
        "loss in bits per code": ("bits_per_code",),
        "norm of the gradients": ("grad_norm",),
    }
    model: Transformer

    def __init__(
        self,
        recipe: TransformerTraining,
        pipeline: Pipeline,
        training: CodeSet,
        validation: CodeSet | None,
        *,
        data: Mapping[str, str],
        skipped: SkippedFiles,
    ) -> None:
        """A task that trains the transformer of ``pipeline``."""
        self.recipe = recipe
        self.model = pipeline.transformer
        self.data = data
        self._pipeline = pipeline
        self._training = training
        self._validation = validation
        self._skipped = skipped
        self._order = DataOrder(
            count=len(training), batch_size=recipe.loop.batch_size, seed=recipe.loop.seed
        )

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Codes of one view per image, and labels."""
        views = self._training.codes.shape[1]
        for step in range(first, last):
            draws = self._order.batch(step)
            view = [self._order.random(draw).randrange(views) for draw in draws]
            yield _batch(self._training, np.array([draw.index for draw in draws]), np.array(view))

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Cross-entropy over all codes, some labels replaced by "no class"."""
        codes, labels = batch["codes"], batch["labels"]
        drop = torch.rand(labels.shape, device=labels.device) < self.recipe.class_dropout
        loss = code_loss(model(codes[:, :-1], labels, drop_condition=drop), codes)
        return Losses(total=loss, metrics={"bits_per_code": bits(loss)})

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss on the held-out images, all with their labels."""
        if self._validation is None:
            return {}
        total, count = 0.0, len(self._validation)
        size = self.recipe.loop.batch_size // self.recipe.loop.gradient_accumulation
        for start in range(0, count, size):
            rows = np.arange(start, min(start + size, count))
            batch = _batch(self._validation, rows, np.zeros_like(rows))
            codes, labels = (batch[name].to(self.model.device) for name in ("codes", "labels"))
            total += float(code_loss(model(codes[:, :-1], labels), codes)) * len(rows)
        loss = torch.tensor(total / count)
        return {"loss": float(loss), "bits_per_code": float(bits(loss))}

    def draw_samples(self, model: nn.Module, path: Path) -> None:
        """Images of a few classes, one class per column, with the same seeds every time."""
        pipeline = self._pipeline_of(model)
        labels = pipeline.labels
        assert labels is not None
        columns = min(_SHEET_CLASSES, len(labels), self.recipe.sample_images)
        classes = [i * len(labels) // columns for i in range(columns)]
        prompts = [classes[i % columns] for i in range(self.recipe.sample_images)]
        images = pipeline(prompts, seed=0).images
        save_png(
            image_grid(
                images,
                columns=columns,
                captions=[labels.name(label) for label in prompts],
                scale=max(1, _SHEET_SIDE // images[0].width),
            ),
            path,
        )

    def export(self, model: nn.Module, out: Path) -> Path:
        """Writes the pipeline's folder: tokenizer, transformer and labels."""
        self._pipeline_of(model).save_pretrained(out / PIPELINE_FOLDER)
        return out / PIPELINE_FOLDER

    def skipped(self) -> int:
        """Files that could not be read."""
        return len(self._skipped)

    def _pipeline_of(self, model: nn.Module) -> Pipeline:
        assert isinstance(model, Transformer)
        pipeline = copy.copy(self._pipeline)
        pipeline.transformer = model
        return pipeline


def _batch(codes: CodeSet, rows: np.ndarray, views: np.ndarray) -> Batch:
    """Codes (B, T) and labels (B,) of the given rows and views."""
    assert codes.labels is not None
    chosen = codes.codes[rows, views].reshape(len(rows), -1)
    return {
        "codes": torch.from_numpy(chosen.astype(np.int64)),
        "labels": torch.from_numpy(codes.labels[rows]),
    }
