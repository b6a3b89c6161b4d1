"""Downloads from the hub, into huggingface_hub's cache.

Progress, retries and the environment variables HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are
huggingface_hub's own.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from llamagen.checkpoints.index import TEXT_ENCODER_FOLDER, is_pipeline_folder
from llamagen.checkpoints.names import PUBLIC_MODELS
from llamagen.models.pretrained import CONFIG_NAME, WEIGHTS_NAME, hub_errors
from llamagen.support.errors import InputError


def download_file(repo: str, file: str) -> Path:
    """Downloads one file, unless it is in the cache.

    Raises:
        InputError: no such repository or file, no access to it, no network and no copy.
    """
    with hub_errors(repo, file):
        return Path(hf_hub_download(repo, file))


def download_folder(repo: str, part: str | None = None) -> Path:
    """Downloads a model or pipeline folder: what is needed of it, unless it is in the cache.

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
