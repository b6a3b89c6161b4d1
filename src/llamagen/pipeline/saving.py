"""Files of images: named by what they show, or by their number in a file of prompts.

Nothing that is drawn is overwritten or drawn twice: the same call goes on where another stopped.
The folder of a file of prompts is an artifact (``llamagen.support.artifact``) whose images are
files of their own, and several processes may share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import llamagen.support.storage as storage
from llamagen.config import SamplingConfig, sampling_settings
from llamagen.pipeline.pipeline import Pipeline
from llamagen.support.artifact import Artifact, Format
from llamagen.support.errors import InputError
from llamagen.support.pictures import image_bytes, read_metadata, save_png
from llamagen.support.values import plain

INDEX_NAME = "index.jsonl"
"""One line per image: its file, prompt and seed, and the other fields of its prompt."""

_FORMAT = Format(
    name="llamagen-images",
    version=1,
    noun="images of a file of prompts",
    settings_name="settings.json",
    has_header=False,
)


def image_path(folder: Path, metadata: Mapping[str, Any]) -> Path:
    """Return the first choice for the file of an image with these metadata."""
    text = str(metadata.get("class", metadata.get("prompt", "")))
    # File names of 255 bytes are the longest almost anywhere, of which a letter may take four.
    name = re.sub(r"[^\w]+", "-", text).strip("-").lower()[:50].strip("-")
    name = name or f"image-{storage.short_digest([text.encode('utf-8', 'backslashreplace')])[:8]}"
    return folder / f"{name}-{metadata['seed']}.png"


def find_image(path: Path, metadata: Mapping[str, Any]) -> Path | None:
    """Return the file with these metadata among those that ``save_image`` wrote for ``path``."""
    for each in itertools.takewhile(Path.exists, _choices(path)):
        with contextlib.suppress(InputError):
            if read_metadata(each) == metadata:
                return each
    return None


def save_image(image: Image.Image, path: Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a PNG as ``path`` or, where that is another image, path-2, path-3, ...; return it."""
    content = image_bytes(image, "png", metadata=metadata)
    for each in _choices(path):
        # Other commands may be writing into the folder, too.
        if storage.write_new(each, content) or each.read_bytes() == content:
            return each
    raise AssertionError("there is always another number")


def _choices(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


@dataclasses.dataclass(frozen=True)
class Planned:
    """An image to generate."""

    file: str
    """Its name in the folder."""
    prompt: str
    seed: int
    """Of its first candidate; the others get the next numbers."""
    about: Mapping[str, Any]
    """Further metadata of the prompt."""


def plan_images(
    prompts: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    images_per_prompt: int,
    seed: int,
    best_of: int = 1,
) -> list[Planned]:
    """Plan the images of some prompts, in order; their candidates get the next seeds."""
    width = max(6, len(str(len(prompts))))
    numbers = itertools.count(seed, best_of)
    return [
        Planned(f"{index:0{width}d}-{copy}.png", prompt=text, seed=next(numbers), about=about)
        for index, (text, about) in enumerate(prompts)
        for copy in range(images_per_prompt)
    ]


def draw_into_folder(
    pipeline: Pipeline,
    planned: Sequence[Planned],
    out: Path,
    *,
    batch_size: int = 16,
    window: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], object] | None = None,
    **settings: Any,
) -> int:
    """Generate the images that are not in the folder yet; return how many these were.

    Args:
        pipeline: generates them.
        planned: all images, of all processes.
        out: the folder; new, empty, or begun with the same prompts and settings.
        batch_size: images generated at once.
        window: as in ``Pipeline``; it changes no image, so it may differ when work goes on.
        rank: this process generates every ``world_size``-th batch, from this one on.
        world_size: processes that share the folder.
        progress: called with the number of images newly saved. A GPU generates the next batch
            meanwhile; a CPU, which would be slower at it, saves first.
        settings: arguments of ``Pipeline.__call__``, such as guidance_scale or negative_prompt.

    Raises:
        InputError: the folder holds something else or is in use, or a prompt or setting is refused.
        OSError: the disk is full, or the folder cannot be written to.
    """
    # Before the first is generated: a corrected file of prompts would need another folder.
    pipeline.check_prompts([image.prompt for image in planned])
    sampling = {setting.name for setting in sampling_settings()} & settings.keys()
    pipeline.sampling.replace(**{name: settings[name] for name in sampling})
    given = {name: plain(value) for name, value in settings.items() if value is not None}
    # By its name alone, a model that was trained further would go on with another's images.
    weights = {"weights": pipeline.weight_sample()}
    about = {
        "model": pipeline.name,
        "sampling": dataclasses.asdict(pipeline.sampling) | given,
        **pipeline.precision,
        **weights,
    }
    artifact = Artifact(out, _FORMAT, about, rank=rank, world_size=world_size)
    saving: list[tuple[int, Future[None]]] = []
    drawn = 0

    def finish(images: int, saved: Future[None]) -> None:
        saved.result()
        if progress is not None:
            progress(images)

    # On an error, leaving the block waits for the batch that is being saved.
    with (
        artifact.begin(missing={"sampling": dataclasses.asdict(SamplingConfig()), **weights}),
        ThreadPoolExecutor(1, "llamagen-saver") as saver,
    ):
        artifact.same_text(INDEX_NAME, _index(planned), "other prompts or seeds")
        for batch in batches(planned, batch_size, rank, world_size):
            missing = [image for image in batch if not (out / image.file).is_file()]
            fetch, metadata = _launch(pipeline, missing, window=window, **settings)
            saving.append((len(batch), saver.submit(_save, missing, out, fetch, metadata)))
            drawn += len(missing)
            if len(saving) > _batches_behind(pipeline.device):
                finish(*saving.pop(0))
        for each in saving:
            finish(*each)
    return drawn


def _index(planned: Sequence[Planned]) -> str:
    """Return one line of JSON for each image."""
    entries = (
        {**image.about, "file": image.file, "prompt": image.prompt, "seed": image.seed}
        for image in planned
    )
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    # Undecodable bytes of files of prompts become escapes of JSON.
    return text.encode("utf-8", "backslashreplace").decode()


def batches(
    planned: Sequence[Planned], size: int, rank: int, world_size: int
) -> Iterator[Sequence[Planned]]:
    """Yield the batches of one of several processes, ``size`` images each."""
    # Fixed batches, so that processes never generate the same image.
    for start in range(rank * size, len(planned), world_size * size):
        yield planned[start : start + size]


def _batches_behind(device: torch.device) -> int:
    """Return the number of batches to save while the next one is generated."""
    return 1 if device.type == "cuda" else 0


def _launch(
    pipeline: Pipeline, left: Sequence[Planned], **settings: Any
) -> tuple[Callable[[], list[Image.Image]], Sequence[Mapping[str, Any]]]:
    """Generate codes; return a function that waits for their images, and their metadata."""
    if not left:
        return list, ()
    prompts = [image.prompt for image in left]
    candidates = range(settings.get("best_of", 1))
    seeds = [image.seed + candidate for image in left for candidate in candidates]
    output = pipeline(prompts, seed=seeds, output_type="codes", **settings)
    return pipeline.decode_later(output.codes), output.metadata


def _save(
    left: Sequence[Planned],
    out: Path,
    fetch: Callable[[], list[Image.Image]],
    metadata: Sequence[Mapping[str, Any]],
) -> None:
    for image, picture, about in zip(left, fetch(), metadata, strict=True):
        save_png(picture, out / image.file, metadata=about)
