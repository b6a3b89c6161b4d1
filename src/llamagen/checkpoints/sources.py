"""Finding a model by a folder, a file, a name or a hub repository; downloads if need be.

Progress, retries and variables (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE) are huggingface_hub's own.
"""

from __future__ import annotations

import dataclasses
import difflib
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from huggingface_hub import hf_hub_download, snapshot_download

import llamagen.support.storage as storage
from llamagen.checkpoints.names import PUBLIC_MODELS, Kind, PublicModel, find_public
from llamagen.checkpoints.published import Checkpoint, read_checkpoint
from llamagen.config import SamplingConfig, TextConfig, config_from_dict, config_to_dict, read_json
from llamagen.models.pretrained import CONFIG_NAME, WEIGHTS_PATTERNS
from llamagen.support import labels as label_files
from llamagen.support.errors import InputError
from llamagen.support.hub import hub_errors, is_repo_id
from llamagen.support.labels import Labels

INDEX_NAME = "model_index.json"
TEXT_ENCODER_FOLDER = "text_encoder"
"""Folder of a pipeline's own text encoder."""
_FORMAT = "llamagen-pipeline"
_FORMAT_VERSION = 1
_SHIPPED = Path(__file__).parent.parent / "assets" / "models"

Source = str | Path
"""A folder, a checkpoint file, the name of a model that comes with the package or of a published
one, or a hub repository "owner/name"."""

Part = Literal["tokenizer", "transformer"]
"""A model of a pipeline, and its folder's name."""

_KINDS: dict[Part, Kind] = {"tokenizer": "image tokenizer", "transformer": "transformer"}
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineIndex:
    """Metadata of a pipeline folder."""

    name: str
    """The model's name, as images record it."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """Settings for calls that give none."""
    text: TextConfig | None = None
    """Text encoder of a model conditioned on text."""
    llamagen_version: str = dataclasses.field(default_factory=lambda: version("llamagen"))
    """The version that wrote the folder."""


def is_pipeline_folder(folder: Path | str) -> bool:
    """Return whether ``folder`` holds a pipeline."""
    return (Path(folder) / INDEX_NAME).is_file()


def write_index(folder: Path | str, index: PipelineIndex) -> None:
    """Write ``model_index.json``."""
    values = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **config_to_dict(index)}
    storage.write_json(Path(folder) / INDEX_NAME, values)


def read_index(folder: Path | str) -> PipelineIndex:
    """Read ``model_index.json``, which must be there.

    InputError if it is damaged, of another program, or of a newer version of this one.
    """
    path = Path(folder) / INDEX_NAME
    values = read_json(path)
    if values.pop("format", None) != _FORMAT:
        raise InputError(
            f"{path} does not describe a llamagen pipeline; it may belong to another program"
        )
    found = values.pop("format_version", None)
    if not isinstance(found, int):
        raise InputError(f"{path}: format_version is {found!r}, expected a number")
    if found > _FORMAT_VERSION:
        raise InputError(
            f"{path} has format {found}, but this version of llamagen reads up to "
            f"{_FORMAT_VERSION}; upgrade it (pip install --upgrade llamagen)"
        )
    return config_from_dict(PipelineIndex, values, source=str(path))


@dataclasses.dataclass(frozen=True)
class Location:
    """A model that is on this machine."""

    path: Path
    """A model folder, or a checkpoint file."""
    public: PublicModel | None = None
    """The published model that the file is, if it was asked for by name."""

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The opened checkpoint file, unless it is a folder; errors as of ``read_checkpoint``."""
        return None if self.path.is_dir() else read_checkpoint(self.path)

    @property
    def kind(self) -> str:
        """Kind of the model; raises errors if its configuration or file is missing or damaged."""
        if self.checkpoint is None:
            return str(read_json(self.path / CONFIG_NAME).get("kind", "something else"))
        return self.checkpoint.kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineSource:
    """Locations of the parts of a pipeline; see also ``PipelineIndex``."""

    name: str
    transformer: Source
    tokenizer: Source | None = None
    """None if the source holds a transformer only."""
    labels: Labels | None = None
    sampling: SamplingConfig | None = None
    """Settings that came with it, if any did."""
    text: TextConfig | None = None
    folder: Path | None = None


def locate(source: Source, part: Part | None = None) -> Location:
    """Find a model, and download it if it is not on this machine.

    Without ``part`` it may be either of the two, but no pipeline. FileNotFoundError if a part of a
    folder is missing; InputError if there is no such model, it is another one, or not downloaded.
    """
    found = find_local(source)
    if found is None:
        repo = _repo_id(source)
        return Location(_model_folder(download_folder(repo, part), part, repo))
    if isinstance(found, PublicModel):
        if part is not None and found.kind != _KINDS[part]:
            raise InputError(f"{found.name} is no {_KINDS[part]} but the name of a {found.kind}")
        return Location(download_file(found.repo, found.file), found)
    return Location(found if found.is_file() else _model_folder(found, part, str(source)))


def resolve_pipeline(source: Source) -> PipelineSource:
    """Find the parts of a pipeline; no model is loaded. Errors as of ``locate``.

    A hub repository is downloaded, a published file is not. The source of a lone transformer
    gives a pipeline without an image tokenizer.
    """
    found, name = find_local(source), str(source)
    if found is None:
        name = _repo_id(source)
        found = download_folder(name)
    elif isinstance(found, Path):
        name = found.stem if found.is_file() else found.resolve().name
    if isinstance(found, PublicModel):
        kind: str = found.kind
        pipeline = PipelineSource(
            name=found.name,
            transformer=found.name,
            tokenizer=found.tokenizer,
            labels=Labels.imagenet() if found.condition == "class" else None,
            sampling=found.sampling,
            text=found.text,
        )
    elif is_pipeline_folder(found):
        return _in_folder(found)
    else:
        path = found if found.is_file() else _model_folder(found, "transformer", str(found))
        kind, pipeline = Location(path).kind, PipelineSource(name=name, transformer=path)
    if kind == "image tokenizer":
        raise InputError(f"{source} is an image tokenizer; name a pipeline or a transformer")
    return pipeline


def shipped_models() -> list[str]:
    """Return the names of the models that come with the package, which are pipeline folders."""
    return sorted(path.name for path in _SHIPPED.glob("*") if is_pipeline_folder(path))


def find_shipped(name: str) -> Path | None:
    """Return the folder of a model that comes with the package; its name may be in any case."""
    wanted = name.lower()
    return _SHIPPED / wanted if wanted in shipped_models() else None


def find_local(source: Source) -> Path | PublicModel | None:
    """Return the existing path or the published model that ``source`` names, if any.

    A folder without a model does not hide a model of the package with its name: the data that one
    was trained on is often called the same.
    """
    path = Path(source).expanduser()
    shipped = find_shipped(str(source))
    if shipped is not None and not path.is_file() and not _is_model_folder(path):
        return shipped
    exists = str(source) and (path.is_dir() or path.is_file())
    return path if exists else find_public(str(source))


def download_file(repo: str, file: str) -> Path:
    """Download one file, unless it is in the cache; errors as of ``hub_errors``."""
    with hub_errors(repo, file):
        return Path(hf_hub_download(repo, file))


def download_folder(repo: str, part: Part | None = None) -> Path:
    """Download a model or pipeline folder, or one ``part`` of it, unless it is in the cache.

    Errors as of ``hub_errors``, and InputError if there is no model folder in ``repo``.
    """
    with hub_errors(repo):
        # The small files first: they say which of the large ones are needed.
        folder = Path(snapshot_download(repo, allow_patterns=["*.json"]))
        if is_pipeline_folder(folder):
            parts = ["tokenizer", "transformer"] if part is None else [part]
            wanted = [f"{name}/{pattern}" for name in parts for pattern in WEIGHTS_PATTERNS]
            if part is None and (folder / TEXT_ENCODER_FOLDER).is_dir():
                # Tokenizers have files of many kinds.
                wanted.append(f"{TEXT_ENCODER_FOLDER}/*")
        elif (folder / CONFIG_NAME).is_file():
            wanted = [*WEIGHTS_PATTERNS]
        else:
            names = [model.name for model in PUBLIC_MODELS if model.repo.lower() == repo.lower()]
            hint = f"; its files are called {', '.join(names)} here" if names else ""
            raise InputError(f"{repo} on the hub is no model folder of llamagen{hint}")
        return Path(snapshot_download(repo, allow_patterns=["*.json", *wanted]))


def _in_folder(folder: Path) -> PipelineSource:
    index, labels = read_index(folder), folder / label_files.FILE_NAME
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


def _is_model_folder(path: Path) -> bool:
    return is_pipeline_folder(path) or (path / CONFIG_NAME).is_file()


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
        if _is_model_folder(child) or child.suffix in _CHECKPOINT_SUFFIXES
    )
    hint = f"; did you mean {' or '.join(map(str, inside[:3]))}?" if inside else ""
    raise InputError(
        f"{source} is no model folder: it has neither {CONFIG_NAME} nor {INDEX_NAME}{hint}"
    )


def nearest_names(name: str) -> list[str]:
    """Return up to three names of known models that ``name`` may be a misspelling of."""
    names = (*shipped_models(), *(model.name for model in PUBLIC_MODELS))
    known = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=3, cutoff=0.6)
    return [known[each] for each in near]


def _repo_id(source: Source) -> str:
    """Return ``source`` as the name of a hub repository, if it can be nothing else."""
    text, path = str(source), Path(source)
    # Whoever has the first folder of a path meant the path.
    is_path = isinstance(source, Path) or path.suffix in _CHECKPOINT_SUFFIXES
    if is_repo_id(text) and not is_path and not path.parent.is_dir():
        return text
    near = nearest_names(text)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise InputError(
        f"{text or 'an empty name'} is no folder, no file, no known model{hint} and no hub "
        f"repository (owner/name); `llamagen info` lists the known models"
    )
