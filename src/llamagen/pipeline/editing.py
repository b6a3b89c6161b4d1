"""Changes to an image that is given: what is kept of it, and what is drawn anew.

The image becomes codes; those that are kept stay, the others are drawn in raster order by the
model that draws whole images. So a code is drawn to fit what is kept above it and on its left, and
knows nothing of what is kept below: where that matters, several candidates are drawn and the one
whose codes are the likeliest as a whole is taken.

Shapes: N images, rows x columns codes of the model's grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llamagen.data.images import DECODING_ERRORS, open_image, to_rgb
from llamagen.data.views import center_crop
from llamagen.generation.request import UNKNOWN
from llamagen.generation.seeds import derived_seed, one_seed_each, uniform_draws
from llamagen.models.tokenizer import uint8_to_images
from llamagen.pipeline.conditions import Prompts
from llamagen.pipeline.pipeline import Pipeline, PipelineOutput
from llamagen.pipeline.ranking import check_best_of
from llamagen.support.errors import InputError

ImageSource = Image.Image | Path | str
"""An image, or where its file is."""

INPAINTING_CANDIDATES = 4
"""Candidates for each image that is filled in, unless another number is asked for."""

_KEPT_CODES = 1
"""Of each seed, the stream of random numbers that chooses the codes a variation keeps."""


@dataclasses.dataclass(frozen=True)
class Window:
    """A place of the model's grid on the codes of an image, which may be larger."""

    rows: slice
    columns: slice
    number: int | None = None
    """Of the places where codes are drawn, from 0; None if it is the image's only one."""

    def of(self, codes: Tensor) -> Tensor:
        """Return this part of ``codes`` (..., rows, columns), as a view."""
        return codes[..., self.rows, self.columns]

    def seed(self, seed: int) -> int:
        """Return the seed that an image of this seed has here."""
        # Numbers of their own: at the same place of the grid the same would come again.
        return seed if self.number is None else derived_seed(seed, self.number)


@dataclasses.dataclass(frozen=True)
class Edit:
    """A plan of an edit: the codes that stay, and where the others are sampled."""

    metadata: Mapping[str, Any]
    """Its entry in the images' metadata."""
    codes: Tensor
    """(rows, columns) of the whole result, ``UNKNOWN`` where one is to be drawn."""
    windows: tuple[Window, ...]
    """Where codes are drawn, one place after another."""
    share: float | None = None
    """Of ``codes``, how many are kept; the images' seeds choose which. None keeps all."""
    pixels: tuple[Image.Image, Image.Image] | None = None
    """An image of which pixels are kept, and a mask that is white where they are not."""

    def known(self, seeds: Sequence[int]) -> Tensor:
        """(images, rows, columns) codes of images with these seeds, before the first is drawn."""
        known = self.codes.expand(len(seeds), -1, -1)
        if self.share is None:
            return known.clone()
        chances = uniform_draws(seeds, self.codes.numel(), stream=_KEPT_CODES)
        # The same number of each image, the luckiest ones.
        kept = chances.argsort(1).argsort(1) < max(1, round(self.share * self.codes.numel()))
        return torch.where(kept.view(known.shape), known, UNKNOWN)

    def finish(self, image: Image.Image) -> Image.Image:
        """The result, given the image that its codes make."""
        if self.pixels is None:
            return image
        own, drawn = self.pixels
        return Image.composite(image, own, drawn)


class Editor:
    """Completes, fills in, extends and varies images with a pipeline's models.

    Images of any size and mode are taken: they are resized so that their short side is the
    model's, and the middle is cut out, as ``prepare`` does. All methods take the settings of
    ``Pipeline.__call__`` (guidance_scale, top_k, seed, num_images_per_prompt, best_of, ...) and
    return what it does; the metadata have one more entry, "edit".

    Example::

        editor = Editor(Pipeline.from_pretrained("c2i-L-384"))
        editor.inpaint("dog.png", "mask.png", "golden retriever").images[0].save("other-dog.png")
    """

    def __init__(self, pipeline: Pipeline) -> None:
        """Edits with ``pipeline``'s models.

        Raises:
            InputError: its engine cannot keep codes.
        """
        if not pipeline.can_edit:
            raise InputError(
                f"engine {pipeline.engine!r} cannot keep codes of an image; edit with engine "
                f"'native'"
            )
        self.pipeline = pipeline

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the model's images."""
        rows, columns = self.pipeline.transformer.config.grid
        scale = self.pipeline.tokenizer.config.downsampling
        return columns * scale, rows * scale

    def prepare(self, image: ImageSource) -> Image.Image:
        """The image as the model takes it: RGB, upright, resized and cropped to ``size``.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: it is no image that can be read.
        """
        width, height = self.size
        return center_crop(_opened(image), height, width=width)

    def encode(self, image: ImageSource) -> Tensor:
        """The codes (rows, columns) of an image, prepared, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: it is no image that can be read.
        """
        tokenizer = self.pipeline.tokenizer
        pixels = torch.from_numpy(np.array(self.prepare(image))).movedim(-1, 0)
        images = uint8_to_images(pixels.unsqueeze(0).to(tokenizer.device))
        return tokenizer.encode(images.to(tokenizer.dtype))[0].cpu()

    def complete(
        self,
        image: ImageSource,
        prompt: Prompts | None = None,
        *,
        keep_rows: int | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Keep the upper part of an image and draw the rest.

        Args:
            image: of which the top is kept.
            prompt: as ``Pipeline`` takes it.
            keep_rows: rows of codes that are kept; half of them by default.
            settings: of ``Pipeline.__call__``.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: nothing or everything would be kept, or a setting is refused.
        """
        edit = self.completion(image, keep_rows=keep_rows)
        return _edited(self.pipeline(prompt, known_codes=edit.codes, **settings), edit)

    def completion(self, image: ImageSource, *, keep_rows: int | None = None) -> Edit:
        """Return the plan of ``complete``; raises the same errors."""
        rows = self.pipeline.transformer.config.grid[0]
        kept = rows // 2 if keep_rows is None else keep_rows
        if not 0 < kept < rows:
            raise InputError(
                f"keep_rows is {kept}, expected 1 to {rows - 1} of the model's {rows} rows"
            )
        codes = self.encode(image)
        codes[kept:] = UNKNOWN
        return Edit({"kind": "complete", "keep_rows": kept}, codes, (self._only_window(),))

    def inpaint(
        self,
        image: ImageSource,
        mask: ImageSource,
        prompt: Prompts | None = None,
        *,
        best_of: int = INPAINTING_CANDIDATES,
        keep_pixels: bool = True,
        **settings: Any,
    ) -> PipelineOutput:
        """Draw a marked part of an image anew.

        A code is drawn anew if any pixel of its square is marked. What is drawn fits what is above
        it and on its left; that it goes on well below is left to the choice among candidates.

        Args:
            image: of which the rest is kept.
            mask: of the image's size, or of the model's: white where to draw; or, if any of it is
                transparent, transparent there.
            prompt: as ``Pipeline`` takes it.
            best_of: candidates for each image, of which the likeliest is taken.
            keep_pixels: unmarked pixels stay those of the image, instead of what its codes make
                of them.
            settings: of ``Pipeline.__call__``.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: the mask has another size, or marks nothing or everything, or a setting is
                refused.
        """
        edit = self.inpainting(image, mask, keep_pixels=keep_pixels)
        output = self.pipeline(prompt, known_codes=edit.codes, best_of=best_of, **settings)
        return _edited(output, edit)

    def inpainting(
        self, image: ImageSource, mask: ImageSource, *, keep_pixels: bool = True
    ) -> Edit:
        """Return the plan of ``inpaint``; raises the same errors."""
        before = _opened(image)
        marked = self._marked(mask, before.size)
        rows, columns = self.pipeline.transformer.config.grid
        scale = self.pipeline.tokenizer.config.downsampling
        cells = marked.reshape(rows, scale, columns, scale).any((1, 3))
        if not marked.any():
            raise InputError("the mask marks nothing of the image; make white what is to be drawn")
        if cells.all():
            raise InputError(
                "the mask leaves no whole square of the image; mark less, or generate an image"
            )
        codes = self.encode(before)
        codes[torch.from_numpy(cells)] = UNKNOWN
        return Edit(
            {"kind": "inpaint", "drawn_codes": int(cells.sum())},
            codes,
            (self._only_window(),),
            pixels=(self.prepare(before), Image.fromarray(marked)) if keep_pixels else None,
        )

    def outpaint(
        self,
        image: ImageSource,
        prompt: Prompts | None = None,
        *,
        below: int = 0,
        right: int = 0,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        best_of: int = 1,
        **settings: Any,
    ) -> PipelineOutput:
        """Extend an image downwards and to the right.

        The model's grid slides over the larger one, half of it at a time, and what is in it
        already is kept: codes stand at places that the model was trained with, and it sees half
        an image of what is above and on the left. Upwards and to the left it cannot draw.

        Args:
            image: the upper left part of what is made.
            prompt: as ``Pipeline`` takes it.
            below: rows of codes that are drawn below it.
            right: columns of codes that are drawn on its right.
            seed: as ``Pipeline`` takes it.
            num_images_per_prompt: as ``Pipeline`` takes it.
            best_of: candidates at each place of the grid.
            settings: of ``Pipeline.__call__``.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: nothing is to be drawn, or a setting is refused.
        """
        edit = self.outpainting(image, below=below, right=right)
        pipeline = self.pipeline
        output_type = settings.pop("output_type", "pil")
        images = len(pipeline.conditions(prompt)) * num_images_per_prompt
        check_best_of(best_of)
        seeds = one_seed_each(seed, images * best_of)
        canvas = edit.known(seeds[::best_of])
        output = None
        for window in edit.windows:
            output = pipeline(
                prompt,
                known_codes=window.of(canvas),
                seed=[window.seed(each) for each in seeds],
                num_images_per_prompt=num_images_per_prompt,
                best_of=best_of,
                output_type="codes",
                **settings,
            )
            window.of(canvas).copy_(output.codes)
        assert output is not None
        metadata = tuple(
            {**about, "seed": first}
            for about, first in zip(output.metadata, seeds[::best_of], strict=True)
        )
        output = PipelineOutput(
            images=[] if output_type == "codes" else pipeline.decode(canvas),
            codes=canvas,
            seeds=seeds[::best_of],
            metadata=metadata,
        )
        return _edited(output, edit)

    def outpainting(self, image: ImageSource, *, below: int = 0, right: int = 0) -> Edit:
        """Return the plan of ``outpaint``; raises the same errors."""
        if min(below, right) < 0 or below == right == 0:
            raise InputError(
                f"{below} rows below and {right} columns on the right are to be drawn; ask for at "
                f"least one, and none below 0"
            )
        rows, columns = self.pipeline.transformer.config.grid
        codes = torch.full((rows + below, columns + right), UNKNOWN)
        codes[:rows, :columns] = self.encode(image)
        # The first place is that of the image itself, where nothing is left to be drawn.
        places = _places((rows, columns), (rows + below, columns + right))[1:]
        windows = tuple(
            Window(slice(top, top + rows), slice(left, left + columns), number)
            for number, (top, left) in enumerate(places)
        )
        return Edit({"kind": "outpaint", "below": below, "right": right}, codes, windows)

    def vary(
        self,
        image: ImageSource,
        prompt: Prompts | None = None,
        *,
        keep: float = 0.5,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        best_of: int = 1,
        **settings: Any,
    ) -> PipelineOutput:
        """Keep codes of an image here and there and sample the others.

        Args:
            image: to be varied.
            prompt: as ``Pipeline`` takes it.
            keep: share of the codes that is kept, above 0 and below 1; the more, the closer to
                the image. Each image's seed chooses which.
            seed: as ``Pipeline`` takes it.
            num_images_per_prompt: as ``Pipeline`` takes it.
            best_of: candidates for each image, all with the same codes kept.
            settings: of ``Pipeline.__call__``.

        Raises:
            FileNotFoundError: there is no such file.
            InputError: the share is none, or a setting is refused.
        """
        edit = self.variation(image, keep=keep)
        images = len(self.pipeline.conditions(prompt)) * num_images_per_prompt
        check_best_of(best_of)
        seeds = one_seed_each(seed, images * best_of)
        output = self.pipeline(
            prompt,
            known_codes=edit.known(seeds[::best_of]),
            seed=seeds,
            num_images_per_prompt=num_images_per_prompt,
            best_of=best_of,
            **settings,
        )
        return _edited(output, edit)

    def variation(self, image: ImageSource, *, keep: float = 0.5) -> Edit:
        """Return the plan of ``vary``; raises the same errors."""
        if not 0.0 < keep < 1.0:
            raise InputError(f"keep is {keep}, expected a share above 0 and below 1")
        about = {"kind": "vary", "keep": keep}
        return Edit(about, self.encode(image), (self._only_window(),), share=keep)

    def _only_window(self) -> Window:
        rows, columns = self.pipeline.transformer.config.grid
        return Window(slice(0, rows), slice(0, columns))

    def _marked(self, mask: ImageSource, size: tuple[int, int]) -> np.ndarray:
        """Which pixels of the prepared image are to be drawn anew, (height, width) bool."""
        if not isinstance(mask, Image.Image):
            # As it is: what is transparent matters here.
            mask = _opened_as_it_is(mask)
        if mask.size not in (size, self.size):
            raise InputError(
                f"the mask has {mask.width}x{mask.height} pixels, but the image has "
                f"{size[0]}x{size[1]}; give a mask of the image's size"
            )
        alpha = mask.convert("RGBA").getchannel("A")
        # Many programs write an alpha channel where nothing is transparent.
        transparent = bool((np.asarray(alpha) < 255).any())
        levels = alpha if transparent else mask.convert("L")
        width, height = self.size
        levels = center_crop(levels.convert("RGB"), height, width=width).convert("L")
        bright: np.ndarray = np.asarray(levels) >= 128
        return ~bright if transparent else bright


def _opened(image: ImageSource) -> Image.Image:
    return to_rgb(image) if isinstance(image, Image.Image) else open_image(image)


def _opened_as_it_is(path: Path | str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except DECODING_ERRORS as error:
        raise InputError(f"{path} is not a readable image ({error})") from error


def _places(window: tuple[int, int], canvas: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns at which a window starts that slides over a canvas, in raster order."""

    def starts(part: int, whole: int) -> list[int]:
        step = max(1, part // 2)
        return [*range(0, whole - part, step), whole - part]

    tops, lefts = (starts(part, whole) for part, whole in zip(window, canvas, strict=True))
    return [(top, left) for top in tops for left in lefts]


def _edited(output: PipelineOutput, edit: Edit) -> PipelineOutput:
    """Return the output with the pixels that stay, and the edit in the metadata."""
    return dataclasses.replace(
        output,
        images=[edit.finish(image) for image in output.images],
        metadata=tuple({**about, "edit": dict(edit.metadata)} for about in output.metadata),
    )
