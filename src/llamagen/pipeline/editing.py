"""Edits of a given image: parts of it are kept, the rest is sampled.

The image becomes codes; those that are kept stay, the others are sampled by the model that draws
whole images. A model of random order reads all that is kept first, so every code fits what is kept
on all sides. In raster order a code fits what is kept above it and on its left, and knows nothing
of what is kept below: where that matters, several candidates are sampled and the one whose codes
are the most likely as a whole is taken.

Shapes: N images, rows x columns codes of the model's grid.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llamagen.data.images import open_image, to_rgb, upright
from llamagen.data.views import center_crop, covering_size
from llamagen.generation.request import (
    UNKNOWN,
    Generators,
    derived_seed,
    one_seed_each,
    uniform_draws,
)
from llamagen.models.tokenizer import uint8_to_images
from llamagen.pipeline.conditions import Prompts, listed
from llamagen.pipeline.pipeline import (
    OutputType,
    Pipeline,
    PipelineOutput,
    as_output,
    check_output_type,
)
from llamagen.pipeline.ranking import check_ranking
from llamagen.support.errors import InputError
from llamagen.support.pictures import DECODING_ERRORS
from llamagen.support.values import plain, require_integer

ImageSource = Image.Image | Path | str
"""An image, or where its file is."""

_CANDIDATES = 4
"""Candidates of a raster model for each image that is filled in, unless another number is given."""
_HALF = 128
"""Of the levels of a mask: what is at least as bright, or less opaque, is marked."""

_KEPT_CODES = 1
"""Of each seed, the stream of random numbers that chooses the codes a variation keeps."""


@dataclasses.dataclass(frozen=True)
class Window:
    """A position of the model's grid on the codes of an image, which may be larger."""

    rows: slice
    columns: slice
    number: int | None = None
    """From 0, of the windows in which codes are sampled; None for an image's only one."""

    def of(self, codes: Tensor) -> Tensor:
        """Return this part of ``codes`` (..., rows, columns), as a view."""
        return codes[..., self.rows, self.columns]

    def seed(self, seed: int) -> int:
        """Return the seed that an image of this seed has here."""
        # With the same random numbers, every window would repeat the one before.
        return seed if self.number is None else derived_seed(seed, self.number)


WHOLE = Window(slice(None), slice(None))
"""The only window of an image of the model's size."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """Plan of an edit: the codes that stay, and where the others are sampled."""

    metadata: Mapping[str, Any]
    """Its entry in the images' metadata."""
    codes: Tensor
    """(rows, columns) of the whole result, ``UNKNOWN`` where one is to be sampled."""
    windows: tuple[Window, ...] = (WHOLE,)
    """Where codes are sampled, one after another."""
    share: float | None = None
    """Share of ``codes`` that is kept; the images' seeds choose which. None keeps all."""
    pixels: tuple[Image.Image, Image.Image] | None = None
    """An image whose pixels are kept, and a mask that is white where they are not."""

    def known(self, seeds: Sequence[int]) -> Tensor:
        """Return the known codes (images, rows, columns) of images with these seeds."""
        known, count = self.codes.repeat(len(seeds), 1, 1), self.codes.numel()
        if self.share is None:
            return known
        chances = uniform_draws(seeds, count, stream=_KEPT_CODES)
        # The same number of each image, the luckiest ones.
        kept = chances.argsort(1).argsort(1) < max(1, round(self.share * count))
        return torch.where(kept.view(known.shape), known, UNKNOWN)

    def finish(self, image: Image.Image) -> Image.Image:
        """Return the result, given the image that its codes decode to."""
        return image if self.pixels is None else Image.composite(image, *self.pixels)


class Editor:
    """Completes, fills in, extends and varies images with a pipeline's models.

    Images of any size and mode are taken: they are resized so that their short side is the
    model's, and the middle is cut out, as ``prepare`` does. All edits take a prompt and the
    settings of ``Pipeline.__call__`` (guidance_scale, top_k, seed, num_images_per_prompt, best_of,
    ...) and return what it does; the metadata have one more entry, "edit". They raise
    ``FileNotFoundError`` where there is no such file, and ``InputError`` where one is no image, an
    argument or a setting is refused, or nothing or everything would be kept. The plan of each edit
    is a method of its own, for servers.

    Example::

        editor = Editor(Pipeline.from_pretrained("c2i-L-384"))
        editor.inpaint("dog.png", "mask.png", "golden retriever").images[0].save("other-dog.png")
    """

    def __init__(self, pipeline: Pipeline) -> None:
        """Edit with ``pipeline``'s models.

        Raises:
            InputError: its engine cannot keep codes.
        """
        if not pipeline.can_edit:
            raise InputError(
                f"engine {pipeline.engine!r} cannot keep codes of an image; edit with engine "
                f"'native'"
            )
        self.pipeline = pipeline
        self._grid = pipeline.transformer.config.grid
        self._scale = pipeline.tokenizer.config.downsampling

    @property
    def any_order(self) -> bool:
        """Whether codes fit what is kept on all sides."""
        return self.pipeline.transformer.config.order == "random"

    @property
    def inpainting_candidates(self) -> int:
        """Candidates for each image that is filled in, unless another number is given."""
        return 1 if self.any_order else _CANDIDATES

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the model's images."""
        rows, columns = self._grid
        return columns * self._scale, rows * self._scale

    def prepare(self, image: ImageSource) -> Image.Image:
        """Return the image as the model takes it: RGB, upright, resized and cropped to ``size``."""
        width, height = self.size
        return center_crop(_opened(image), height, width=width)

    def encode(self, image: ImageSource) -> Tensor:
        """Return the codes (rows, columns) of an image, on the CPU; see ``prepare``."""
        tokenizer = self.pipeline.tokenizer
        pixels = torch.from_numpy(np.array(self.prepare(image))).movedim(-1, 0).unsqueeze(0)
        images = uint8_to_images(pixels.to(tokenizer.device)).to(tokenizer.dtype)
        return tokenizer.encode(images)[0].cpu()

    def complete(
        self,
        image: ImageSource,
        prompt: Prompts | None = None,
        *,
        keep_rows: int | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Keep ``keep_rows`` rows of an image's codes, by default the upper half; draw the rest."""
        return self._draw(self.completion(image, keep_rows=keep_rows), prompt, **settings)

    def completion(self, image: ImageSource, *, keep_rows: int | None = None) -> Edit:
        """Return the plan of ``complete``."""
        rows = self._grid[0]
        kept = rows // 2 if keep_rows is None else require_integer("keep_rows", keep_rows)
        if not 0 < kept < rows:
            raise InputError(
                f"keep_rows is {kept}, expected 1 to {rows - 1} of the model's {rows} rows"
            )
        codes = self.encode(image)
        codes[kept:] = UNKNOWN
        return Edit({"kind": "complete", "keep_rows": kept}, codes)

    def inpaint(
        self,
        image: ImageSource,
        mask: ImageSource,
        prompt: Prompts | None = None,
        *,
        best_of: int | None = None,
        keep_pixels: bool = True,
        **settings: Any,
    ) -> PipelineOutput:
        """Sample a marked part of an image anew.

        The mask has the image's size, or the model's: white where to draw; or, if any of it is more
        transparent than opaque, transparent there. Its EXIF tag turns it, as the image's does. A
        code is sampled if any pixel of its square is marked. In raster order, how well it fits what
        is below is left to the choice among ``best_of`` candidates, by default 4. With
        ``keep_pixels`` unmarked pixels stay those of the image, instead of those that its codes
        decode to.
        """
        edit = self.inpainting(image, mask, keep_pixels=keep_pixels)
        candidates = self.inpainting_candidates if best_of is None else best_of
        return self._draw(edit, prompt, best_of=candidates, **settings)

    def inpainting(
        self, image: ImageSource, mask: ImageSource, *, keep_pixels: bool = True
    ) -> Edit:
        """Return the plan of ``inpaint``."""
        before = _opened(image)
        marked = self._marked(mask, before.size)
        rows, columns = self._grid
        cells = marked.reshape(rows, self._scale, columns, self._scale).any((1, 3))
        if not marked.any():
            raise InputError("the mask marks nothing of the image; make white what is to be drawn")
        if cells.all():
            raise InputError(
                "the mask leaves no whole square of the image; mark less, or generate an image"
            )
        codes = self.encode(before)
        codes[torch.from_numpy(cells)] = UNKNOWN
        pixels = (self.prepare(before), Image.fromarray(marked)) if keep_pixels else None
        return Edit({"kind": "inpaint", "drawn_codes": int(cells.sum())}, codes, pixels=pixels)

    def outpaint(
        self,
        image: ImageSource,
        prompt: Prompts | None = None,
        *,
        above: int = 0,
        below: int = 0,
        left: int = 0,
        right: int = 0,
        **settings: Any,
    ) -> PipelineOutput:
        """Extend an image by rows of codes above and below, and columns on the left and right.

        The model's grid slides over the larger one, half of it at a time, and codes in it that are
        there already are kept: so codes stand at positions that the model was trained with, and it
        sees half an image of what is there. A raster model draws below and on the right only.
        There are ``best_of`` candidates at each position of the grid.
        """
        edit = self.outpainting(image, above=above, below=below, left=left, right=right)
        return self._draw(edit, prompt, **settings)

    def outpainting(
        self, image: ImageSource, *, above: int = 0, below: int = 0, left: int = 0, right: int = 0
    ) -> Edit:
        """Return the plan of ``outpaint``."""
        sides = {"above": above, "below": below, "left": left, "right": right}
        above, below, left, right = (require_integer(*side) for side in sides.items())
        if min(above, below, left, right) < 0 or above == below == left == right == 0:
            raise InputError(
                f"{above} rows above, {below} below, {left} columns on the left and {right} on the "
                f"right are to be drawn; ask for at least one, and none below 0"
            )
        if (above or left) and not self.any_order:
            raise InputError(
                f"{self.pipeline.name} draws in raster order, so only below and on the right of "
                f"what is there; leave out above and left, or use a model of random order"
            )
        rows, columns = self._grid
        codes = torch.full((above + rows + below, left + columns + right), UNKNOWN)
        codes[above : above + rows, left : left + columns] = self.encode(image)
        tops, lefts = _starts(above, rows, len(codes)), _starts(left, columns, codes.shape[1])
        corners = sorted(
            itertools.product(tops, lefts),
            # Outwards, so that each position sees what is there already.
            key=lambda at: (abs(at[0] - above) + abs(at[1] - left)) * self.any_order,
        )
        # The first window is the image itself, where nothing is left to be sampled.
        windows = tuple(
            Window(slice(at, at + rows), slice(start, start + columns), number)
            for number, (at, start) in enumerate(corners[1:])
        )
        about = {"above": above, "left": left} if self.any_order else {}
        return Edit({"kind": "outpaint", **about, "below": below, "right": right}, codes, windows)

    def vary(
        self,
        image: ImageSource,
        prompt: Prompts | None = None,
        *,
        keep: float = 0.5,
        **settings: Any,
    ) -> PipelineOutput:
        """Keep codes of an image here and there and sample the others.

        ``keep`` is the share that is kept, above 0 and below 1; the more, the closer to the image.
        Each image's seed chooses which; its ``best_of`` candidates keep the same.
        """
        return self._draw(self.variation(image, keep=keep), prompt, **settings)

    def variation(self, image: ImageSource, *, keep: float = 0.5) -> Edit:
        """Return the plan of ``vary``."""
        share: Any = plain(keep)
        if not isinstance(share, float) or not 0.0 < share < 1.0:
            raise InputError(f"keep is {share}, expected a share above 0 and below 1")
        return Edit({"kind": "vary", "keep": share}, self.encode(image), share=share)

    def _draw(
        self,
        edit: Edit,
        prompt: Prompts | None,
        *,
        seed: int | Sequence[int] | None = None,
        generator: Generators | None = None,
        num_images_per_prompt: int = 1,
        best_of: int = 1,
        output_type: OutputType = "pil",
        **settings: Any,
    ) -> PipelineOutput:
        """Sample the codes that a plan leaves open, window by window."""
        check_output_type(output_type)
        check_ranking(settings.get("rank_by", "likelihood"), best_of)
        count = require_integer("num_images_per_prompt", num_images_per_prompt)
        if (embeds := settings.get("prompt_embeds")) is not None:
            count *= len(embeds)
        # No prompt at all is refused below, with the pipeline's own words.
        elif prompt is not None:
            count *= len(listed(prompt))
        seeds = one_seed_each(seed, max(1, count) * plain(best_of), generator)
        firsts = seeds[::best_of]
        canvas = edit.known(firsts)
        is_whole, is_shown = edit.windows == (WHOLE,), output_type not in ("latent", "codes")
        for window in edit.windows:
            output = self.pipeline(
                prompt,
                known_codes=window.of(canvas),
                seed=[window.seed(each) for each in seeds],
                num_images_per_prompt=num_images_per_prompt,
                best_of=best_of,
                output_type="pil" if is_whole and is_shown else "codes",
                **settings,
            )
            window.of(canvas).copy_(output.codes)
        images, kept = output.images, output.seeds
        if not is_whole:
            # Each window may have kept another candidate: an image is known by its first seed.
            images, kept = self.pipeline.decode(canvas) if is_shown else [], firsts
        metadata = tuple(
            {**about, "seed": seed, "edit": dict(edit.metadata)}
            for about, seed in zip(output.metadata, kept, strict=True)
        )
        shown = as_output([*map(edit.finish, images)], canvas, output_type)
        return PipelineOutput(images=shown, codes=canvas, seeds=kept, metadata=metadata)

    def _marked(self, mask: ImageSource, size: tuple[int, int]) -> np.ndarray:
        """Return which pixels (height, width) of the prepared image are to be drawn anew."""
        mask = upright(mask if isinstance(mask, Image.Image) else _opened_as_it_is(mask))
        if mask.size not in (size, self.size):
            raise InputError(
                f"the mask has {mask.width}x{mask.height} pixels, but the image has "
                f"{size[0]}x{size[1]}; give a mask of the image's size"
            )
        width, height = self.size
        covering = covering_size(mask.size, width, height)
        marked = _marked_pixels(mask)
        for axis, wanted, whole in ((1, width, covering[0]), (0, height, covering[1])):
            marked = _pooled(marked, axis, wanted, whole)
        return marked


def _marked_pixels(mask: Image.Image) -> np.ndarray:
    """Return which pixels (height, width) a mask marks, at its own resolution."""
    if mask.has_transparency_data and mask.mode[0] != "I":
        mask = mask.convert("RGBA")
        alpha = np.asarray(mask.getchannel("A"))
        # Many programs write an alpha channel where nothing is transparent, or hardly.
        if alpha.min() < _HALF:
            return alpha < _HALF
        mask = mask.convert("RGB")
    return np.asarray(to_rgb(mask).convert("L")) >= _HALF


def _pooled(marked: np.ndarray, axis: int, wanted: int, whole: int) -> np.ndarray:
    """Resize an axis to ``whole`` pixels and keep the middle ``wanted``.

    A pixel is marked if any that it covers is, however small a part of it that is.
    """
    length = marked.shape[axis]
    edges = (np.arange(wanted + 1) + (whole - wanted) // 2) * length
    starts, stops = edges[:-1] // whole, -(-edges[1:] // whole)
    before = np.insert(marked.cumsum(axis), 0, 0, axis)
    return before.take(stops, axis) > before.take(starts, axis)


def _opened(image: ImageSource) -> Image.Image:
    return to_rgb(image) if isinstance(image, Image.Image) else open_image(image)


def _opened_as_it_is(path: Path | str) -> Image.Image:
    """Return the image in a file, with what is transparent in it."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except DECODING_ERRORS as error:
        raise InputError(f"{path} is not a readable image ({error})") from error


def _starts(start: int, window: int, canvas: int) -> list[int]:
    """Return where a window starts that slides from ``start`` to both ends of a canvas.

    By half of it at a time, downwards first.
    """
    step, last = max(1, window // 2), canvas - window
    after = [*range(start, last, step), last]
    return [*dict.fromkeys(after), *([*range(start - step, 0, -step), 0] if start else [])]
