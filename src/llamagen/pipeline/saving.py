"""Many images into a folder: goes on where it was interrupted, shared by several processes."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import llamagen.support.storage as storage
from llamagen.config import sampling_settings
from llamagen.pipeline.pipeline import Pipeline
from llamagen.support.errors import InputError
from llamagen.support.pictures import save_png

INDEX_NAME = "index.jsonl"
"""One line per image: its file, prompt and seed, and what the prompts' file says of it."""

_SETTINGS_NAME = "settings.json"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """An image that is to be drawn."""

    file: str
    """Its name in the folder."""
    prompt: str
    seed: int
    about: Mapping[str, Any]
    """Further metadata of the prompt."""


def plan_images(
    prompts: Sequence[tuple[str, Mapping[str, Any]]], *, images_per_prompt: int, seed: int
) -> list[Planned]:
    """Plan the images of some prompts: image k of prompt i gets the seed ``seed`` + i n + k."""
    width = max(6, len(str(len(prompts))))
    return [
        Planned(
            file=f"{index:0{width}d}-{copy}.png",
            prompt=text,
            seed=seed + index * images_per_prompt + copy,
            about=about,
        )
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
    """Generate the images that are not in the folder yet.

    Args:
        pipeline: draws them.
        planned: all of them, of all processes.
        out: the folder; new, empty, or begun with the same prompts and settings.
        batch_size: images drawn at once.
        window: codes of each image that a pass looks at, as in ``Pipeline``; no matter of the
            folder, since it changes no image.
        rank: this process draws every ``world_size``-th batch, from this one on.
        world_size: processes that draw into the folder.
        progress: is told how many more are there. A GPU draws the next batch while one is fetched
            and saved; a CPU, which would be slower at it, saves what is drawn before it goes on.
        settings: what ``Pipeline.__call__`` takes, as guidance_scale or negative_prompt.

    Returns:
        How many this call has drawn.

    Raises:
        InputError: the folder holds something else, or a prompt or setting is refused.
        OSError: the disk is full, or the folder cannot be written to.
    """
    # All of them before the first is drawn: a prompts' file that is mended is another one.
    pipeline.check_prompts([image.prompt for image in planned])
    sampling = {setting.name for setting in sampling_settings()} & settings.keys()
    pipeline.sampling.replace(**{name: settings[name] for name in sampling})
    _begin(pipeline, planned, out, settings)
    drawn = 0
    behind = _batches_behind(pipeline.device)
    saving: list[tuple[int, Future[None]]] = []

    def wait_for_first() -> None:
        there, saved = saving.pop(0)
        saved.result()
        if progress is not None:
            progress(there)

    # What is being saved when something fails is there in the end.
    with ThreadPoolExecutor(1, thread_name_prefix="llamagen-saver") as saver:
        for batch in batches(planned, batch_size, rank, world_size):
            left = [image for image in batch if not (out / image.file).is_file()]
            fetch, about = _launch(pipeline, left, window=window, **settings)
            saving.append((len(batch), saver.submit(_save, left, out, fetch, about)))
            drawn += len(left)
            if len(saving) > behind:
                wait_for_first()
        while saving:
            wait_for_first()
    return drawn


def batches(
    planned: Sequence[Planned], size: int, rank: int, world_size: int
) -> Iterator[Sequence[Planned]]:
    """Yield the batches of one of several processes, ``size`` images each."""
    # Fixed cuts, so that the processes never draw the same image, whatever is there already.
    for start in range(rank * size, len(planned), world_size * size):
        yield planned[start : start + size]


def _batches_behind(device: torch.device) -> int:
    """Batches that are fetched and saved while the next one is drawn."""
    return 1 if device.type == "cuda" else 0


def _launch(
    pipeline: Pipeline, left: Sequence[Planned], **settings: Any
) -> tuple[Callable[[], list[Image.Image]], Sequence[Mapping[str, Any]]]:
    """Generate codes; return a function that waits for their images, and their metadata."""
    if not left:
        return list, ()
    output = pipeline(
        [image.prompt for image in left],
        seed=[image.seed for image in left],
        output_type="codes",
        **settings,
    )
    return pipeline.decode_later(output.codes), output.metadata


def _save(
    left: Sequence[Planned],
    out: Path,
    fetch: Callable[[], list[Image.Image]],
    metadata: Sequence[Mapping[str, Any]],
) -> None:
    for image, picture, about in zip(left, fetch(), metadata, strict=True):
        save_png(picture, out / image.file, metadata=about)


def _begin(
    pipeline: Pipeline, planned: Sequence[Planned], out: Path, settings: Mapping[str, Any]
) -> None:
    """Write the index and the settings, or find the same ones in the folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give `out` a folder")
    storage.require_writable(out)
    given = {name: value for name, value in settings.items() if value is not None}
    about = {
        "model": pipeline.name,
        "sampling": {**dataclasses.asdict(pipeline.sampling), **given},
        **pipeline.precision,
    }
    index = "".join(
        json.dumps(
            {**image.about, "file": image.file, "prompt": image.prompt, "seed": image.seed},
            ensure_ascii=False,
        )
        + "\n"
        for image in planned
    )
    wanted = {
        _SETTINGS_NAME: json.dumps(about, indent=2, ensure_ascii=False) + "\n",
        INDEX_NAME: index,
    }
    others = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")]
    if others and _SETTINGS_NAME not in others:
        raise InputError(
            f"{out} is not empty and holds no images of a prompts' file (but {min(others)}); "
            f"give `out` an empty folder"
        )
    for name, text in wanted.items():
        path = out / name
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            what = "settings" if name == _SETTINGS_NAME else "prompts or seeds"
            raise InputError(
                f"the images in {out} were begun with other {what} ({name}); restore them, or "
                f"give another `out`"
            )
        if not path.is_file():
            storage.write_text(path, text)
