"""Training of the image tokenizer (paper section 3.1).

Shapes: B images, H x W pixels, h x w grid, K codes, E codebook dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

import llamagen.support.storage as storage
from llamagen.backends.cpu.convolution import accelerate
from llamagen.checkpoints import load_tokenizer
from llamagen.config import TokenizerConfig, config_from_dict, config_to_dict
from llamagen.data.images import ImageCollection, SkippedFiles
from llamagen.data.loader import ImageBatch, image_views
from llamagen.data.views import Augmentation, Views
from llamagen.evaluation.metrics import psnr, ssim
from llamagen.evaluation.networks.lpips import Lpips, load_lpips
from llamagen.models.tokenizer import ImageTokenizer, images_to_uint8, uint8_to_images
from llamagen.support import distributed
from llamagen.support.errors import InputError
from llamagen.support.pictures import arrays_to_pil, image_grid, save_png
from llamagen.training.adversarial import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    make_discriminator,
)
from llamagen.training.checkpoint import CHECKPOINTS_NAME, latest_checkpoint
from llamagen.training.config import TokenizerTraining
from llamagen.training.data import TokenizerImages, tokenizer_images
from llamagen.training.loop import TrainingResult, fit, own_random_numbers
from llamagen.training.losses import Term, mean_psnr, tokenizer_terms, total_loss
from llamagen.training.metrics import CodebookUsage
from llamagen.training.parallel import seeded
from llamagen.training.recipes import recipe_to_dict
from llamagen.training.run_folder import SKIPPED_NAME, lock_run, open_run, start_run
from llamagen.training.task import Batch, Losses, Task

MODEL_FOLDER = "tokenizer"
"""The exported model, in the run's folder."""

_USAGE_WINDOW = 65536
"""Codes over which usage is counted, as in the published training."""
_SHEET_IMAGES = 16


def train_tokenizer(recipe: TokenizerTraining, *, quiet: bool = False) -> TrainingResult:
    """Train a tokenizer, or resume the run in the recipe's folder; ``quiet`` shows no progress.

    The result's ``model`` is a folder for ``ImageTokenizer.from_pretrained``. Raises as ``fit``
    does, FileNotFoundError if a folder does not exist, and InputError if recipe, images and the
    run's folder do not fit together.
    """
    with distributed.process_group(recipe.loop.device), lock_run(recipe.out):
        recipe = open_run(recipe)
        task = make_task(recipe)
        return fit(task, recipe.loop, recipe.out, quiet=quiet, recipe=recipe_to_dict(recipe))


def make_task(recipe: TokenizerTraining) -> TokenizerTask:
    """Return the task of a recipe, its images found and its model built; for errors see above."""
    # Not checked by the recipe itself: recipe files leave `init` to their users.
    if recipe.trained == "decoder" and recipe.init is None:
        raise InputError(
            "trained is decoder, but there is no tokenizer whose codes stay; name one with `init`"
        )
    images, perceptual, lpips = tokenizer_images(recipe), recipe.perceptual, None
    with distributed.main_first():
        if perceptual.perceptual_weight > 0:
            lpips = load_lpips(perceptual.perceptual_weights)
    with own_random_numbers(recipe.loop.device, recipe.loop.seed):
        model = _start(recipe)
        model.config.grid_of(*recipe.images.shape)
        start_run(recipe)
        return TokenizerTask(recipe, images, model, lpips)


def _start(recipe: TokenizerTraining) -> ImageTokenizer:
    """Return the model before its first step."""
    if recipe.init is None:
        return ImageTokenizer(recipe.model)
    checkpoint = latest_checkpoint(recipe.out / CHECKPOINTS_NAME)
    if checkpoint is not None:
        # The model that the run started from may be gone by now.
        values = checkpoint.about["model"]["config"]
        return ImageTokenizer(config_from_dict(TokenizerConfig, values, str(checkpoint.path)))
    with distributed.main_first():
        return load_tokenizer(recipe.init, dtype=torch.float32)


class TokenizerTask(Task):
    """Task of reconstructing images through a codebook."""

    name = "tokenizer"
    model: ImageTokenizer

    def __init__(
        self,
        recipe: TokenizerTraining,
        images: TokenizerImages,
        model: ImageTokenizer,
        lpips: Lpips | None = None,
    ) -> None:
        """Make a task for ``model``; a discriminator is initialised from torch's generator."""
        self.recipe, self.images = recipe, images
        self.model = self.module = accelerate(model)
        if recipe.trained == "decoder":
            for part in (model.encoder, model.quant_conv, model.quantize):
                part.requires_grad_(False)
        self._usage = CodebookUsage(model.config.codebook_size, window=_USAGE_WINDOW)
        self._revived = 0
        self._recent: Tensor | None = None
        self._skipped = SkippedFiles(recipe.out / SKIPPED_NAME)
        self._lpips = lpips
        self._compared = ("reconstruction",) if lpips is None else ("reconstruction", "perceptual")
        self.about = {"kind": ImageTokenizer.kind, "config": config_to_dict(model.config)}
        self.panels = {
            "loss": ("loss", "reconstruction", "codebook", *self._compared[1:]),
            "PSNR (dB)": ("psnr",),
            "share of the codes in use": ("codebook_usage",),
            "norm of the gradients": ("grad_norm",),
        }
        adversarial = recipe.adversarial
        if adversarial.adversarial_weight > 0:
            height, width = recipe.images.shape
            kind = adversarial.discriminator
            self.adversary = make_discriminator(kind, height=height, width=width)
            self.adversary_lr = adversarial.lr(recipe.loop.lr)
            self.panels["adversarial losses"] = ("generator", "discriminator")

    @property
    def note(self) -> str | None:  # type: ignore[override]  # a value of each recipe
        """When codes are first revived, if that is not after ``revive_codes_every``."""
        every, loop = self.recipe.revive_codes_every, self.recipe.loop
        grid = self.model.config.grid_of(*self.recipe.images.shape)
        window = math.ceil(_USAGE_WINDOW / (loop.batch_size * math.prod(grid)))
        first = math.ceil(window / max(1, every)) * every
        if first <= every <= loop.steps:
            return None
        end = f", but the run ends after {loop.steps:,}" if first > loop.steps else ""
        return (
            f"unused codes are known after {_USAGE_WINDOW:,} latents: the first are revived after "
            f"step {first:,}{end}"
        )

    @functools.cached_property
    def data(self) -> Mapping[str, str]:  # type: ignore[override]  # found when it is asked for
        """See ``Task``."""
        return self.images.identity

    def prepare(self) -> None:
        """Initialise the codebook with latents, if the recipe says so."""
        if self.recipe.codebook_init == "data" and self.recipe.init is None:
            init_codebook(self.model, self._latents())

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Yield augmented images as bytes."""
        rank, world_size = distributed.rank(), distributed.world_size()
        for batch in self._read(first=first, last=last, rank=rank, world_size=world_size):
            self._skipped.add(batch.skipped)
            yield {"pixels": batch.pixels}

    def _read(self, **part: int) -> Iterator[ImageBatch]:
        images, changes = self.recipe.images, self.recipe.augmentation
        height, width = images.shape
        augmentation = Augmentation(
            height=height, width=width, max_scale=changes.crop_scale, flip=changes.flip
        )
        return self.images.training.training_batches(augmentation, workers=images.workers, **part)

    def losses(
        self, model: nn.Module, batch: Batch, *, step: int, adversary: nn.Module | None
    ) -> Losses:
        """Return the losses of the model and, once it has begun, of the discriminator."""
        images = uint8_to_images(batch["pixels"])
        output = model(images)
        reconstruction = output.reconstruction.detach()
        terms = self._terms(output, images)
        metrics = {"psnr": mean_psnr(reconstruction, images)}
        adversarial, config = None, self.recipe.adversarial
        if adversary is not None and step >= config.adversarial_start:
            terms["generator"] = self._generator_term(output.reconstruction, terms, metrics)
            real, fake = adversary(images), adversary(reconstruction)
            adversarial = discriminator_loss(config.adversarial_loss, real, fake)
            metrics["discriminator"] = adversarial.detach()
            metrics["logits_real"] = real.detach().float().mean()
            metrics["logits_fake"] = fake.detach().float().mean()
        self._usage.add(output.quantized.codes)
        self._recent = output.quantized.latents.detach()
        metrics |= {name: term.value.detach() for name, term in terms.items()}
        return Losses(total=total_loss(terms), metrics=metrics, adversary=adversarial)

    def _terms(self, output: Any, images: Tensor) -> dict[str, Term]:
        """Return the terms that compare reconstructions with their images."""
        terms = tokenizer_terms(output, images, self.model.quantize, self.recipe.loss)
        if self._lpips is not None:
            distance = self._lpips.to(images.device)(output.reconstruction, images).mean()
            terms["perceptual"] = Term(distance, self.recipe.perceptual.perceptual_weight)
        return terms

    def _generator_term(
        self, reconstruction: Tensor, terms: Mapping[str, Term], metrics: dict[str, Tensor]
    ) -> Term:
        """Return the tokenizer's adversarial term, without gradients of the discriminator."""
        assert self.adversary is not None
        config = self.recipe.adversarial
        # With copies of its buffers: its own training alone updates its running statistics.
        state = {name: tensor.detach() for name, tensor in self.adversary.named_parameters()}
        state |= {name: tensor.clone() for name, tensor in self.adversary.named_buffers()}
        value = generator_loss(
            config.adversarial_loss, functional_call(self.adversary, state, (reconstruction,))
        )
        if not config.adaptive_weight:
            return Term(value, config.adversarial_weight)
        compared = total_loss({name: terms[name] for name in self._compared})
        last_layer = self.model.decoder.conv_out.weight
        scale = distributed.mean(adaptive_weight(compared, value, last_layer))
        metrics["adaptive_weight"] = scale
        return Term(value, config.adversarial_weight * scale)

    def after_step(self, step: int) -> None:
        """Move unused codes onto latents of the batch."""
        every = self.recipe.revive_codes_every
        if every == 0 or step % every != 0 or self._recent is None:
            return
        dead = self._usage.unused()
        latents = self._recent.movedim(1, -1).flatten(0, -2)
        generator = seeded(self.recipe.loop.seed, "revive", step)
        drawn = torch.randperm(len(latents), generator=generator)[: len(dead)]
        dead = dead[: len(drawn)]
        # Their moments in the optimiser have decayed: they had no gradients.
        moved = distributed.broadcast(latents[drawn.to(latents.device)])
        self.model.quantize.replace_codes(dead, moved)
        self._usage.mark_used(dead)
        self._revived += len(dead)

    def statistics(self) -> dict[str, float]:
        """Return the codebook usage of the last images, and how many codes were revived so far."""
        revived = {"revived_codes": self._revived} if self.recipe.revive_codes_every > 0 else {}
        return {"codebook_usage": self._usage.share(), **revived}

    def validate(self) -> dict[str, float]:
        """Return reconstruction error, PSNR, SSIM, LPIPS if trained with, and codebook usage."""
        sums = dict.fromkeys(("count", "reconstruction", "psnr", "ssim", *self._compared[1:]), 0.0)
        used = torch.zeros(self.model.config.codebook_size)
        own = distributed.share(range(len(self.images.validation)))
        for images in self._fixed_images(self.images.validation, own):
            output = self.model(images)
            terms = self._terms(output, images)
            before, after = _pixels(images), _pixels(output.reconstruction)
            sums["count"] += len(images)
            sums["psnr"] += float(psnr(before, after).clip(max=100.0).sum())
            sums["ssim"] += float(ssim(before, after).sum())
            for name in self._compared:
                sums[name] += float(terms[name].value) * len(images)
            used[output.quantized.codes.flatten().cpu()] = 1.0
        sums, used = distributed.summed(sums), distributed.maximum(used)
        count = sums.pop("count")
        if count == 0:
            return {}
        usage = {"codebook_usage": float(used.mean())}
        return {name: total / count for name, total in sums.items()} | usage

    def draw_samples(self, model: nn.Module, path: Path) -> None:
        """Draw images and, below each, its reconstruction."""
        shown = self.images.shown.thinned(_SHEET_IMAGES)
        before = torch.cat(list(self._fixed_images(shown, range(len(shown)))))
        originals = arrays_to_pil(_pixels(before))
        decoded = arrays_to_pil(_pixels(model(before).reconstruction))
        rows = []
        for start in range(0, len(before), 8):
            rows += originals[start : start + 8] + decoded[start : start + 8]
        save_png(image_grid(rows, columns=min(8, len(before)), scale=None), path)

    def export(self, model: nn.Module, out: Path) -> Path:
        """Write the tokenizer's folder."""
        assert isinstance(model, ImageTokenizer)
        with storage.atomic_folder(out / MODEL_FOLDER) as temporary:
            model.save_pretrained(temporary)
        return out / MODEL_FOLDER

    def skipped(self) -> int:
        """See ``Task``."""
        return len(self._skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the codebook usage and the position in streamed data."""
        gathered = distributed.gathered(self.images.training.state_dict())
        places = {rank: place for own in gathered for rank, place in own.items()}
        return {"usage": self._usage.state_dict(), "revived": self._revived, "places": places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Task``."""
        self._usage.load_state_dict(state["usage"])
        self._revived = state["revived"]
        self.images.training.load_state_dict(state["places"])

    def _fixed_images(self, images: ImageCollection, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield centre crops of some images, in batches (B, 3, H, W)."""
        height, width = self.recipe.images.shape
        for batch in image_views(
            images,
            Views(height=height, width=width),
            batch_size=max(1, self.recipe.loop.part_size(distributed.world_size())),
            workers=self.recipe.images.workers,
            indices=indices,
        ):
            self._skipped.add(batch.skipped)
            if len(batch.indices) > 0:
                yield uint8_to_images(batch.pixels.squeeze(1).to(self.model.device))

    @torch.no_grad()
    def _latents(self) -> Tensor:
        """Return at least K latents (N, E) of the first training images, as they are quantised."""
        rows, columns = self.model.config.grid_of(*self.recipe.images.shape)
        per_batch = self.recipe.loop.batch_size * rows * columns
        steps = math.ceil(self.model.config.codebook_size / per_batch)
        latents, places = [], self.images.training.state_dict()
        # Every process encodes whole batches, so all have the same latents.
        for batch in self._read(first=0, last=steps, rank=0, world_size=1):
            images = uint8_to_images(batch.pixels.to(self.model.device))
            compared = self.model.quantize.compared(self.model.encode_latents(images))
            latents.append(compared.movedim(1, -1).flatten(0, -2))
        self.images.training.load_state_dict(places)
        return torch.cat(latents)


def init_codebook(tokenizer: ImageTokenizer, latents: Tensor) -> None:
    """Replace the codebook by K of the latents (N, E), drawn at random.

    A code that starts far from all latents is never the nearest, and so is never trained.
    """
    size = tokenizer.config.codebook_size
    drawn = torch.randperm(len(latents))[:size]
    tokenizer.quantize.replace_codes(torch.arange(size), latents[drawn.to(latents.device)])


def _pixels(images: Tensor) -> np.ndarray:
    """Return images (B, 3, H, W) in [-1, 1] as bytes (B, H, W, 3)."""
    return images_to_uint8(images).cpu().movedim(1, -1).numpy()
