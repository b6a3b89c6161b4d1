"""Finding a model by a folder, a file, a name or a hub repository; downloads if need be.

Progress, retries and the environment variables HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE of downloads
are huggingface_hub's own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from huggingface_hub import hf_hub_download, snapshot_download

from llamagen.checkpoints.index import (
    INDEX_NAME,
    TEXT_ENCODER_FOLDER,
    is_pipeline_folder,
    read_index,
)
from llamagen.checkpoints.names import (
    PUBLIC_MODELS,
    Kind,
    PublicModel,
    find_public,
    find_shipped,
    nearest_names,
)
from llamagen.checkpoints.published import read_checkpoint
from llamagen.config import SamplingConfig, TextConfig, read_json
from llamagen.models.pretrained import CONFIG_NAME, WEIGHTS_NAME, hub_errors, is_repo_id
from llamagen.support import labels as label_files
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels


def download_file(repo: str, file: str) -> Path:
    """Download one file, unless it is in the cache.

    Raises:
        InputError: no such repository or file, no access to it, no network and no copy.
    """
    with hub_errors(repo, file):
        return Path(hf_hub_download(repo, file))


def download_folder(repo: str, part: str | None = None) -> Path:
    """Download the necessary files of a model or pipeline folder, unless they are in the cache.

    Args:
        repo: "owner/name".
        part: of a pipeline, only the folder of this model ("tokenizer" or "transformer").

    Raises:
        InputError: no such repository, no access to it, no model folder in it, no network and no
            copy.
    """
    with hub_errors(repo):
        # The small files first: they say which of the large ones are needed.
        folder = Path(snapshot_download(repo, allow_patterns=["*.json"]))
        if is_pipeline_folder(folder):
            parts = ["tokenizer", "transformer"] if part is None else [part]
            wanted = [f"{name}/{WEIGHTS_NAME}" for name in parts]
            if part is None and (folder / TEXT_ENCODER_FOLDER).is_dir():
                # Tokenizers have files of many kinds.
                wanted.append(f"{TEXT_ENCODER_FOLDER}/*")
        elif (folder / CONFIG_NAME).is_file():
            wanted = [WEIGHTS_NAME]
        else:
            raise InputError(f"{repo} on the hub is no model folder of llamagen{_published(repo)}")
        return Path(snapshot_download(repo, allow_patterns=["*.json", *wanted]))


def _published(repo: str) -> str:
    names = [model.name for model in PUBLIC_MODELS if model.repo.lower() == repo.lower()]
    return f"; its files are called {', '.join(names)} here" if names else ""


Source = str | Path
"""A folder, a checkpoint file, the name of a model that comes with the package or of a published
one, or a hub repository "owner/name"."""

Part = Literal["tokenizer", "transformer"]
"""A model of a pipeline, and its folder's name."""

_KINDS: dict[Part, Kind] = {"tokenizer": "image tokenizer", "transformer": "transformer"}


@dataclasses.dataclass(frozen=True)
class Location:
    """A model that is on this machine."""

    path: Path
    """A model folder, or a checkpoint file."""
    public: PublicModel | None = None
    """The published model that the file is, if it was asked for by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineSource:
    """Locations of the parts of a pipeline."""

    name: str
    """The pipeline's name, as images record it."""
    transformer: Source
    tokenizer: Source | None = None
    """None if the source holds a transformer only."""
    labels: Labels | None = None
    """Class names, if they are known."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """Settings for calls that give none."""
    text: TextConfig | None = None
    """Text encoder, if it is known."""
    folder: Path | None = None
    """The pipeline folder, if it is one."""


def locate(source: Source, part: Part | None = None) -> Location:
    """Find a model, and download it if it is not on this machine.

    Args:
        source: see ``Source``.
        part: the model that is wanted; without it either of the two, but no pipeline.

    Raises:
        InputError: there is no such model, or it is the wrong one, or it cannot be downloaded.
    """
    path = _path(source)
    if path.is_dir() and str(source):
        return Location(_model_folder(path, part, str(source)))
    if path.is_file():
        return Location(path)
    public = find_public(str(source))
    if public is not None:
        if part is not None and public.kind != _KINDS[part]:
            raise InputError(f"{public.name} is no {_KINDS[part]} but the name of a {public.kind}")
        return Location(download_file(public.repo, public.file), public)
    repo = _repo_id(source)
    return Location(_model_folder(download_folder(repo, part), part, repo))


def resolve_pipeline(source: Source) -> PipelineSource:
    """Find the parts of a pipeline; no model is loaded.

    A hub repository is downloaded, a published file is not. The source of a lone transformer
    gives a pipeline without an image tokenizer.

    Raises:
        FileNotFoundError: a part of the folder is missing.
        InputError: there is no such model, it is an image tokenizer, or it cannot be downloaded.
    """
    path = _path(source)
    if path.is_dir() and str(source):
        return _in_folder(path, path.resolve().name)
    if path.is_file():
        if read_checkpoint(path).kind != "transformer":
            raise _only_a_tokenizer(path)
        return PipelineSource(name=path.stem, transformer=path)
    public = find_public(str(source))
    if public is None:
        repo = _repo_id(source)
        return _in_folder(download_folder(repo), repo)
    if public.kind != "transformer":
        raise _only_a_tokenizer(public.name)
    return PipelineSource(
        name=public.name,
        transformer=public.name,
        tokenizer=public.tokenizer,
        labels=Labels.imagenet() if public.condition == "class" else None,
        sampling=public.sampling,
        text=public.text,
    )


def folder_kind(folder: Path) -> str:
    """Return the kind of model in a model folder.

    Raises:
        FileNotFoundError: it has no configuration.
        InputError: the configuration is damaged.
    """
    return str(read_json(folder / CONFIG_NAME).get("kind", "something else"))


def _path(source: Source) -> Path:
    """Return the path of ``source``, or of the model in the package that it names.

    A folder without a model does not hide a model of its name: the data that one was trained on is
    often called the same.
    """
    path = Path(source).expanduser()
    shipped = find_shipped(str(source))
    if shipped is None or path.is_file() or _is_model_folder(path):
        return path
    return shipped


def _is_model_folder(path: Path) -> bool:
    return is_pipeline_folder(path) or (path / CONFIG_NAME).is_file()


def _in_folder(folder: Path, name: str) -> PipelineSource:
    labels = folder / label_files.FILE_NAME
    if is_pipeline_folder(folder):
        index = read_index(folder)
        text = index.text
        if text is not None and not text.encoder:
            text = dataclasses.replace(text, encoder=str(folder / TEXT_ENCODER_FOLDER))
        return PipelineSource(
            name=index.name,
            transformer=folder / "transformer",
            tokenizer=folder / "tokenizer",
            labels=Labels.load(labels) if labels.is_file() else None,
            sampling=index.sampling,
            text=text,
            folder=folder,
        )
    folder = _model_folder(folder, "transformer", str(folder))
    if folder_kind(folder) == "image tokenizer":
        raise _only_a_tokenizer(folder)
    return PipelineSource(name=name, transformer=folder)


def _only_a_tokenizer(source: Source) -> InputError:
    return InputError(f"{source} is an image tokenizer; name a pipeline or a transformer")


def _model_folder(folder: Path, part: Part | None, source: str) -> Path:
    """Return the folder of one model: ``folder`` or, if that is a pipeline, the one in it."""
    if is_pipeline_folder(folder):
        if part is None:
            raise InputError(
                f"{source} is a whole pipeline; name one of its models, {source}/tokenizer or "
                f"{source}/transformer"
            )
        return folder / part
    if (folder / CONFIG_NAME).is_file():
        return folder
    inside = sorted(
        child
        for child in folder.iterdir()
        if _is_model_folder(child) or child.suffix in (".pt", ".pth", ".bin", ".safetensors")
    )
    hint = f"; did you mean {' or '.join(map(str, inside[:3]))}?" if inside else ""
    raise InputError(
        f"{source} is no model folder: it has neither {CONFIG_NAME} nor {INDEX_NAME}{hint}"
    )


def _repo_id(source: Source) -> str:
    """Return ``source`` as the name of a hub repository, if it can be nothing else."""
    text = str(source)
    path = Path(text)
    # Whoever has the first folder of a path meant the path.
    is_path = isinstance(source, Path) or path.suffix in (".pt", ".pth", ".bin", ".safetensors")
    if is_repo_id(text) and not is_path and not path.parent.is_dir():
        return text
    near = nearest_names(text)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise InputError(
        f"{text or 'an empty name'} is no folder, no file, no known model{hint} and no hub "
        f"repository (owner/name); `llamagen info` lists the known models"
    )
