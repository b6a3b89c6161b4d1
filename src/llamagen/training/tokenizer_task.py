"""Training of the image tokenizer (paper section 3.1).

Shapes: B images, H x W pixels, h x w grid, K codes, E codebook dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import llamagen.storage as storage
from llamagen.data.images import ImageFolder, SkippedFiles
from llamagen.data.loader import image_views, training_batches
from llamagen.data.order import DataOrder
from llamagen.data.views import Augmentation, Views
from llamagen.evaluation.metrics import psnr
from llamagen.pictures import image_grid, save_png, to_pil
from llamagen.tokenizer import ImageTokenizer, images_to_uint8, uint8_to_images
from llamagen.training.config import TokenizerTraining
from llamagen.training.loop import Batch, Losses, Task, TrainingResult, fit, own_random_numbers
from llamagen.training.losses import mean_psnr, tokenizer_terms, total_loss
from llamagen.training.run_folder import SKIPPED_NAME, open_run, start_run
from llamagen.training.sources import Images, find_run_images
from llamagen.training.usage import CodebookUsage

MODEL_FOLDER = "tokenizer"
"""The exported model, in the run's folder."""

_USAGE_WINDOW = 65536
"""Codes over which usage is counted, as in the published training."""
_SHEET_IMAGES = 16
_SHEET_SIDE = 64
"""Smaller images are enlarged to about this many pixels on a sheet."""


def train_tokenizer(recipe: TokenizerTraining, *, quiet: bool = False) -> TrainingResult:
    """Trains an image tokenizer, or goes on with it if the run's folder holds a checkpoint.

    Args:
        recipe: the whole run.
        quiet: no progress on the terminal.

    Returns:
        The last metrics; ``model`` is a folder for ``ImageTokenizer.from_pretrained``.

    Raises:
        FileNotFoundError: a folder does not exist.
        InputError: recipe, images and the run's folder do not fit together.
        TrainingInterrupted: the process was asked to stop; the run was saved.
    """
    recipe = open_run(recipe)
    images = find_run_images(recipe.data, recipe.validation_data, recipe.images, labelled=False)
    start_run(recipe)
    with own_random_numbers(recipe.loop.device, recipe.loop.seed):
        task = TokenizerTask(recipe, images)
    return fit(task, recipe.loop, recipe.out, quiet=quiet)


class TokenizerTask(Task):
    """Reconstruct images through a codebook."""

    name = "tokenizer"
    panels: ClassVar[Mapping[str, Sequence[str]]] = {
        "loss": ("loss", "reconstruction", "codebook"),
        "PSNR (dB)": ("psnr",),
        "share of the codes in use": ("codebook_usage",),
        "norm of the gradients": ("grad_norm",),
    }
    model: ImageTokenizer

    def __init__(self, recipe: TokenizerTraining, images: Images) -> None:
        """A task with a new model, from torch's global random numbers."""
        self.recipe = recipe
        self.images = images
        self.data = images.identity
        self.model = ImageTokenizer(recipe.model)
        self._order = DataOrder(
            count=len(images.training), batch_size=recipe.loop.batch_size, seed=recipe.loop.seed
        )
        self._usage = CodebookUsage(recipe.model.codebook_size, window=_USAGE_WINDOW)
        self._skipped = SkippedFiles(recipe.out / SKIPPED_NAME)

    def prepare(self) -> None:
        """Gives the codebook its first vectors, if they are to come from the data."""
        if self.recipe.codebook_init == "data":
            init_codebook(self.model, self._latents())

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Augmented images as bytes."""
        height, width = self.recipe.images.shape
        augmentation = Augmentation(
            height=height,
            width=width,
            max_scale=self.recipe.augmentation.crop_scale,
            flip=self.recipe.augmentation.flip,
        )
        for batch in training_batches(
            self.images.training.paths,
            self._order,
            augmentation,
            first=first,
            last=last,
            workers=self.recipe.images.workers,
        ):
            self._skipped.add(batch.skipped)
            yield {"pixels": batch.pixels}

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Reconstruction and codebook terms."""
        images = uint8_to_images(batch["pixels"])
        output = model(images)
        terms = tokenizer_terms(output, images, self.model.quantize, self.recipe.loss)
        self._usage.add(output.quantized.codes)
        metrics = {name: term.value for name, term in terms.items()}
        metrics["psnr"] = mean_psnr(output.reconstruction.detach(), images)
        return Losses(total=total_loss(terms), metrics=metrics)

    def statistics(self) -> dict[str, float]:
        """Codebook usage of the last images."""
        return {"codebook_usage": self._usage.share()}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Reconstruction error, PSNR and codebook usage on the held-out images."""
        sums = {"reconstruction": 0.0, "psnr": 0.0}
        count = 0
        used = torch.zeros(self.model.config.codebook_size, dtype=torch.bool)
        for images in self._fixed_images(self.images.validation):
            output = model(images)
            terms = tokenizer_terms(output, images, self.model.quantize, self.recipe.loss)
            before, after = (
                images_to_uint8(x).cpu().numpy() for x in (images, output.reconstruction)
            )
            sums["reconstruction"] += float(terms["reconstruction"].value) * len(images)
            sums["psnr"] += float(psnr(before, after).clip(max=100.0).sum())
            used[output.quantized.codes.flatten().cpu()] = True
            count += len(images)
        if count == 0:
            return {}
        means = {name: total / count for name, total in sums.items()}
        return {**means, "codebook_usage": float(used.float().mean())}

    def draw_samples(self, model: nn.Module, path: Path) -> None:
        """Images and, below each, its reconstruction."""
        shown = self.images.validation if len(self.images.validation) else self.images.training
        before = torch.cat(list(self._fixed_images(shown.thinned(_SHEET_IMAGES))))
        after = model(before).reconstruction
        columns = min(8, len(before))
        rows = []
        for start in range(0, len(before), columns):
            part = slice(start, start + columns)
            rows += to_pil(before[part]) + to_pil(after[part])
        scale = max(1, _SHEET_SIDE // before.shape[-1])
        save_png(image_grid(rows, columns=columns, scale=scale), path)

    def export(self, model: nn.Module, out: Path) -> Path:
        """Writes the tokenizer's folder."""
        assert isinstance(model, ImageTokenizer)
        with storage.atomic_folder(out / MODEL_FOLDER) as temporary:
            model.save_pretrained(temporary)
        return out / MODEL_FOLDER

    def skipped(self) -> int:
        """Files that could not be read so far."""
        return len(self._skipped)

    def state_dict(self) -> dict[str, Any]:
        """The usage window."""
        return {"usage": self._usage.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state_dict`` returned."""
        self._usage.load_state_dict(state["usage"])

    def _fixed_images(self, folder: ImageFolder) -> Iterator[Tensor]:
        """Centre crops of the folder's images, in batches (B, 3, H, W)."""
        height, width = self.recipe.images.shape
        for batch in image_views(
            folder.paths,
            Views(height=height, width=width),
            batch_size=self.recipe.loop.batch_size // self.recipe.loop.gradient_accumulation,
            workers=self.recipe.images.workers,
        ):
            self._skipped.add(batch.skipped)
            if len(batch.indices) > 0:
                yield uint8_to_images(batch.pixels.squeeze(1).to(self.model.device))

    @torch.no_grad()
    def _latents(self) -> Tensor:
        """At least K latents (N, E) of the first training images, as they are compared."""
        rows, columns = self.model.config.grid_of(*self.recipe.images.shape)
        per_batch = self.recipe.loop.batch_size * rows * columns
        steps = math.ceil(self.model.config.codebook_size / per_batch)
        latents = []
        for batch in self.batches(0, steps):
            images = uint8_to_images(batch["pixels"].to(self.model.device))
            compared = self.model.quantize.compared(self.model.encode_latents(images))
            latents.append(compared.movedim(1, -1).flatten(0, -2))
        return torch.cat(latents)


@torch.no_grad()
def init_codebook(tokenizer: ImageTokenizer, latents: Tensor) -> None:
    """Makes latents (N, E), N at least K, the codebook: K of them, drawn at random.

    A code that starts far from all latents is never the nearest, and so never learns.
    """
    codebook = tokenizer.quantize.embedding.weight
    drawn = torch.randperm(len(latents))[: len(codebook)]
    codebook.copy_(latents[drawn.to(latents.device)])
