"""Prompts or classes in, images out: the class most users ever touch."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llamagen.config import Grid, SamplingConfig
from llamagen.generation.engine import ProgressCallback, refuse_edits
from llamagen.generation.memory import decoding_batch_size
from llamagen.generation.request import GenerationRequest, Generators, one_seed_each
from llamagen.models.tokenizer import images_to_uint8
from llamagen.pipeline.conditions import (
    Condition,
    Prompts,
    embedded_conditions,
    listed,
    read_prompts,
)
from llamagen.pipeline.models import PipelineModels
from llamagen.pipeline.ranking import Ranking, best_of_each, check_ranking, score_images
from llamagen.support.devices import copy_to_host
from llamagen.support.errors import InputError
from llamagen.support.pictures import arrays_to_pil
from llamagen.support.values import plain, require_integer

OutputType = Literal["pil", "np", "pt", "latent", "codes"]
"""Images as diffusers has them: "pil"; "np", float32 (images, H, W, 3) from 0 to 1; "pt", a tensor
(images, 3, H, W) of the same; "latent", their codes. "codes" is none, beside the output's codes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """Result of a pipeline call."""

    images: Any
    """A list of PIL images, or what another ``OutputType`` says."""
    codes: Tensor
    """(images, rows, columns) int64, on the CPU."""
    seeds: tuple[int, ...]
    """Seed of each image: with the same model and settings it makes the image again."""
    metadata: tuple[dict[str, Any], ...]
    """Per image: model, class or prompt, seed and settings; ``pictures.save_png`` stores them."""


class Pipeline(PipelineModels):
    """Generates images of prompts or classes.

    Example::

        pipe = Pipeline.from_pretrained("c2i-L-384")
        pipe("golden retriever", num_images_per_prompt=4, seed=0).images[0].save("dog.png")
        pipe = Pipeline.from_pretrained("t2i-XL-256")
        pipe("a lighthouse in a storm, oil painting", negative_prompt="photo").images[0].show()
    """

    def __call__(
        self,
        prompt: Prompts | None = None,
        *,
        negative_prompt: Prompts | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: Generators | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        blend: Prompts | None = None,
        blend_share: float = 0.5,
        known_codes: Tensor | None = None,
        best_of: int = 1,
        rank_by: Ranking = "likelihood",
        batch_size: int | None = None,
        window: int | None = None,
        callback: ProgressCallback | None = None,
        output_type: OutputType = "pil",
        is_drawn: Callable[[dict[str, Any]], bool] | None = None,
        on_images: Callable[[PipelineOutput], object] | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Generate images.

        Args:
            prompt: texts, or for a class-conditional model names or indices; one or several.
            negative_prompt: what guidance leads away from instead of "no text" or "no class": one
                for all prompts, or one for each. Without guidance it has no effect.
            num_images_per_prompt: images of each.
            seed: image i of the call gets seed + i, or the i-th of several; by default random.
                The same seed, class and settings give the same image, alone or among others.
            generator: draws the seed, or each image's, in the place of ``seed``.
            prompt_embeds: text features (prompts, length, text_dim), real ones last, as prompts.
            prompt_attention_mask: (prompts, length), 0 where features are padding.
            blend: what each prompt is blended with, one for all or one each: logits are mixed.
            blend_share: how much that counts, from 0 to 1.
            known_codes: (rows, columns), or (images, rows, columns), of the images' codes; these
                stay, -1 stands where one is to be drawn. ``Editor`` makes them of images.
            best_of: candidates for each image, of which the best is kept. Candidate j of image i
                gets seed + i * best_of + j, or that one of several.
            rank_by: what is best; see ``Ranking``.
            batch_size: images drawn at once; by default as many as fit into memory.
            window: see ``GenerationRequest``.
            callback: called after each finished row of a batch; an exception ends the call.
            output_type: see ``OutputType``; ``decode`` makes images of codes.
            is_drawn: called with the metadata of each candidate, before the first is drawn; an
                image is left out where it is true of one.
            on_images: takes each batch of PIL images once it is drawn; the call returns none then.
            settings: fields of ``SamplingConfig``; by default those that came with the model.

        Raises:
            InputError: a class or setting is not one this model has, or a prompt says nothing.
        """
        num_images_per_prompt = require_integer("num_images_per_prompt", num_images_per_prompt, 1)
        if batch_size is not None:
            batch_size = require_integer("batch_size", batch_size, 1)
        check_output_type(output_type)
        check_ranking(rank_by, best_of)
        best_of, blend_share, window = plain(best_of), plain(blend_share), plain(window)
        sampling = self.sampling.replace(**settings)
        if prompt_embeds is None:
            given = self.conditions(prompt, negative_prompt, blend=blend, blend_share=blend_share)
        elif self.labels is None and prompt is negative_prompt is blend is None:
            given = embedded_conditions(prompt_embeds, prompt_attention_mask)
        else:
            raise InputError(
                "prompt_embeds go with text-conditional models, and with no prompt, "
                "negative_prompt or blend"
            )
        conditions = [each for each in given for _ in range(num_images_per_prompt * best_of)]
        seeds = one_seed_each(seed, len(conditions), generator)
        known = self._known(known_codes, len(conditions), best_of)
        requests = [
            condition.request(seed=own, sampling=sampling, known_codes=codes, window=window)
            for condition, own, codes in zip(conditions, seeds, known, strict=True)
        ]
        if not self.can_edit:
            # Before an engine starts.
            for request in requests:
                refuse_edits(request, self.engine)
        for request in requests:
            self.code_engine.check(request)

        def about(index: int) -> dict[str, Any]:
            return self.metadata(
                conditions[index], seeds[index], sampling, best_of=best_of, rank_by=rank_by
            )

        wanted = [*range(len(requests))]
        if is_drawn is not None:
            runs = (wanted[first : first + best_of] for first in range(0, len(wanted), best_of))
            wanted = [
                index for run in runs if not any(is_drawn(about(at)) for at in run) for index in run
            ]
        found: list[PipelineOutput] = []
        drawn = self._draw(requests, wanted, best_of, rank_by, batch_size, callback)
        if on_images is not None:
            self._hand_over(drawn, about, on_images, behind=self.device.type == "cuda")
        else:
            is_shown = output_type not in ("latent", "codes")
            self._hand_over(drawn, about, found.append, is_shown=is_shown)
        return _together(found, output_type, self.transformer.config.grid)

    def _hand_over(
        self,
        drawn: Iterator[tuple[Tensor, list[int]]],
        about: Callable[[int], dict[str, Any]],
        receive: Callable[[PipelineOutput], object],
        *,
        is_shown: bool = True,
        behind: bool = True,
    ) -> None:
        """Hand over the output of each batch: codes, and with ``is_shown`` images.

        With ``behind`` the images of a batch are fetched once the next one has been launched, so
        that no GPU waits for that. ``about`` returns the metadata of a request.
        """

        def finish(codes: Tensor, kept: list[int], fetch: Callable[[], list[Image.Image]]) -> None:
            entries = tuple(map(about, kept))
            seeds = tuple(entry["seed"] for entry in entries)
            receive(PipelineOutput(images=fetch(), codes=codes, seeds=seeds, metadata=entries))

        waiting: list[Callable[[], None]] = []
        try:
            for codes, kept in drawn:
                fetch = self.decode_later(codes) if is_shown else list
                waiting.append(functools.partial(finish, codes, kept, fetch))
                if len(waiting) > behind:
                    waiting.pop(0)()
        finally:
            # Whatever ends the call, what is drawn is handed over.
            while waiting:
                waiting.pop(0)()

    def _draw(
        self,
        requests: Sequence[GenerationRequest],
        wanted: Sequence[int],
        best_of: int,
        rank_by: Ranking,
        batch_size: int | None,
        callback: ProgressCallback | None,
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield codes of the ``wanted`` requests, batch by batch, and their indices.

        Of each run of ``best_of`` the best.
        """
        engine = self.code_engine
        size = batch_size or engine.batch_size(requests)
        # The candidates of an image are never apart.
        step = max(1, size // best_of) * best_of
        for first in range(0, len(wanted), step):
            indices = wanted[first : first + step]
            part = [requests[index] for index in indices]
            on_progress = None if callback is None else _moved(callback, first)
            sampled = engine.generate(part, batch_size=size, on_progress=on_progress)
            kept = [*range(len(part))]
            if best_of > 1:
                kept = best_of_each(score_images(self.transformer, sampled, part, rank_by), best_of)
            yield sampled.cpu()[kept], [indices[at] for at in kept]

    def metadata(
        self,
        condition: Condition,
        seed: int,
        sampling: SamplingConfig,
        *,
        best_of: int,
        rank_by: Ranking,
    ) -> dict[str, Any]:
        """Return what is known of an image: model, class or prompt, seed and settings."""
        return {
            "model": self.name,
            **condition.metadata,
            "seed": seed,
            **dataclasses.asdict(sampling),
            **({"best_of": best_of, "rank_by": rank_by} if best_of > 1 else {}),
            **self.precision,
            **self.computation,
            "device": self.device.type,
        }

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise InputError if a prompt says nothing, or names no class of this model."""
        encoder = self.text_encoder
        for prompt in dict.fromkeys(prompts):
            if self.labels is not None:
                self.labels.find(prompt)
            elif encoder is not None:
                encoder.require_text(prompt)

    def conditions(
        self,
        prompts: Prompts | None,
        negative_prompt: Prompts | None = None,
        *,
        blend: Prompts | None = None,
        blend_share: float = 0.5,
    ) -> list[Condition]:
        """Return the condition of each prompt; see ``__call__``.

        Raises:
            InputError: a prompt says nothing, or names no class of this model.
        """
        is_class = self.labels is not None
        if prompts is None:
            kind, wanted = ("class", "class names or indices") if is_class else ("text", "a prompt")
            raise InputError(f"{self.name} is {kind}-conditional: give {wanted}")
        each = listed(prompts)
        if not each:
            what = "class" if is_class else "prompt"
            raise InputError(f"no {what} was given; name at least one")
        reader = self.text_encoder if self.labels is None else self.labels
        if reader is None:
            raise InputError(
                f"{self.name} is conditioned on text features, and comes without a text encoder: "
                f"name one with `text_encoder`, or give prompt_embeds"
            )
        return read_prompts(reader, each, negative_prompt, blend, blend_share)

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Decode codes (images, rows, columns) to images."""
        return self.decode_later(codes)()

    def decode_later(self, codes: Tensor) -> Callable[[], list[Image.Image]]:
        """Launch ``decode``; the returned function waits for the images, from any thread."""
        pixels = (images_to_uint8(part).movedim(1, -1) for part in self.decode_in_parts(codes))
        arriving = list(map(copy_to_host, pixels))
        return lambda: [image for wait in arriving for image in arrays_to_pil(wait().numpy())]

    @torch.inference_mode()
    def decode_in_parts(self, codes: Tensor) -> Iterator[Tensor]:
        """Decode codes (images, rows, columns) to images (part, 3, H, W) in [-1, 1], in parts."""
        decoder, (rows, columns) = self.tokenizer, codes.shape[-2:]
        at: dict[str, Any] = {"device": decoder.device, "dtype": decoder.dtype}
        size = decoding_batch_size(decoder.config, (rows, columns), **at)
        yield from map(decoder.decode, codes.split(size))

    def _known(self, known: Tensor | None, images: int, best_of: int) -> Sequence[Tensor | None]:
        """Return the known codes of each candidate, (rows, columns)."""
        if known is None or known.ndim == 2:
            return [known] * images
        if known.ndim != 3 or len(known) * best_of != images:
            rows, columns = self.transformer.config.grid
            raise InputError(
                f"known_codes have shape {tuple(known.shape)}, expected {(rows, columns)} or "
                f"{(images // best_of, rows, columns)}"
            )
        return list(known.repeat_interleave(best_of, dim=0))


def check_output_type(output_type: str) -> None:
    """Raise InputError unless there is such an ``OutputType``."""
    known = typing.get_args(OutputType)
    if output_type not in known:
        raise InputError(f"output_type is {output_type!r}, expected one of {', '.join(known)}")


def as_output(images: list[Image.Image], codes: Tensor, output_type: OutputType) -> Any:
    """Return images, whose codes are ``codes``, in another form; see ``OutputType``."""
    if output_type == "latent":
        return codes
    if output_type not in ("np", "pt") or not images:
        return images
    pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255
    return pixels if output_type == "np" else torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _together(
    parts: Sequence[PipelineOutput], output_type: OutputType, grid: Grid
) -> PipelineOutput:
    """Return the output of a call, given those of its batches."""
    codes = torch.cat([torch.zeros(0, *grid, dtype=torch.int64), *(each.codes for each in parts)])
    return PipelineOutput(
        images=as_output([image for each in parts for image in each.images], codes, output_type),
        codes=codes,
        seeds=tuple(seed for each in parts for seed in each.seeds),
        metadata=tuple(entry for each in parts for entry in each.metadata),
    )


def _moved(callback: ProgressCallback, first: int) -> ProgressCallback:
    """Return ``callback`` for a batch whose first image is the call's image ``first``."""
    return lambda at: callback(dataclasses.replace(at, first=at.first + first))
