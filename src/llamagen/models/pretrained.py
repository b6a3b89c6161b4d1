"""The base of both models: plain folders of ``config.json`` and ``model.safetensors``.

``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` are those of huggingface_hub's mixin,
so a folder works from a disk and from the hub alike. Loading builds the module without memory
or initial values and fills it tensor by tensor, so it never holds the weights twice.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from llamagen.config import config_from_dict, config_to_dict, read_json
from llamagen.support import storage, weights
from llamagen.support.errors import InputError
from llamagen.support.hub import hub_errors, is_repo_id

ConfigT = TypeVar("ConfigT")

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
SHARD_INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
WEIGHTS_PATTERNS = (WEIGHTS_NAME, SHARD_INDEX_NAME, "model-*.safetensors")
"""The files with weights in a model folder: one, or several shards and their index."""
_CARD_NAME = "README.md"
_REQUIRES = "requires_llamagen"


class PretrainedModel(nn.Module, ModelHubMixin, Generic[ConfigT]):
    """A module that is built from one configuration and lives in a folder."""

    config_class: ClassVar[type[Any]]
    kind: ClassVar[str]
    config: ConfigT

    @property
    def requires(self) -> str | None:
        """The first version of llamagen that can read the model's folder, where not all can."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.parameters()).dtype

    def parameter_count(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    def fingerprint(self) -> str:
        """Return a short text that two models share only if they have the same weights."""
        return weights.digest(json.dumps(config_to_dict(self.config)), self.state_dict().items())

    @classmethod
    def from_tensors(
        cls,
        config: ConfigT,
        tensors: weights.NamedTensors,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        source: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the model of ``config`` around existing weights, read one at a time.

        ``shapes`` are every name and shape in ``tensors``. They are checked before anything is
        read: InputError, which names the ``source``, if they are not those of ``config``. A
        ``dtype`` of None keeps the stored precision.
        """
        with torch.device("meta"), _NoInitialValues():
            model = cls(config)
        expected = model.state_dict()
        needed = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        weights.check_shapes(needed, shapes, source=source, kind=cls.kind)
        parameters = dict(model.named_parameters())
        for name, read in tensors:
            tensor, is_parameter = read(), name in parameters
            # What a quantised layer keeps has a type of its own, whatever the model's is.
            kept = (dtype or tensor.dtype) if is_parameter else expected[name].dtype
            if tensor.is_floating_point() != (is_parameter or kept.is_floating_point):
                usual = "floating-point numbers" if is_parameter else "quantised weights"
                raise InputError(
                    f"{source}: {name} holds {tensor.dtype}, expected {usual}; weights that were "
                    f"quantised by other software cannot be loaded"
                )
            # A copy of its own, one tensor at a time. Weights left in the file's mapping would
            # change or vanish with the file, and lie unaligned in small pages: preset B in
            # bfloat16 then decodes 4 to 8 % slower.
            own = torch.empty(tensor.shape, dtype=kept, device=device).copy_(tensor.detach())
            module_name, _, leaf = name.rpartition(".")
            module = model.get_submodule(module_name)
            setattr(module, leaf, nn.Parameter(own) if is_parameter else own)
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> str | None:
        """Write the model's folder; an older model in it is replaced once the new one is complete.

        Other files in the folder stay. OSError if the disk is full, or it cannot be written to.
        ``push_to_hub`` uploads the folder as well, with ``options`` as of that method, to
        ``repo_id``, by default of the folder's name, and returns the address of the hub's commit.
        """
        folder = Path(save_directory)
        # Into a folder of its own: the mixin deletes an old configuration before it writes.
        with storage.staged_files(folder, last=CONFIG_NAME) as staging:
            super().save_pretrained(staging, model_card_kwargs=options.get("model_card_kwargs"))
            if (folder / _CARD_NAME).exists():
                (staging / _CARD_NAME).unlink()
        if not push_to_hub:
            return None
        address: str = self.push_to_hub(repo_id or folder.resolve().name, **options)
        return address

    def _save_pretrained(self, save_directory: Path) -> None:
        values = {"kind": self.kind, **config_to_dict(self.config)}
        if self.requires is not None:
            values[_REQUIRES] = self.requires
        # contiguous: safetensors refuses the strides that channels-last weights have.
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        path = save_directory / WEIGHTS_NAME
        try:
            save_file(state, path, metadata={"format": "pt"})
        except SafetensorError as error:
            # The machine failed: the disk is full, or cannot be written to.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        storage.write_json(save_directory / CONFIG_NAME, values)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **download: Any,
    ) -> Self:
        """Load a model from a folder, or from a hub repository "owner/name" with such a folder.

        A ``dtype`` of None keeps the stored precision. ``download`` are options of
        ``huggingface_hub.snapshot_download``: revision, cache_dir, local_files_only and others.

        Raises:
            FileNotFoundError: there is no such folder or repository, or a file in it is missing.
            InputError: the repository cannot be read, holds another kind of model, or is damaged.
        """
        source = str(pretrained_model_name_or_path)
        # A misspelt option shall not be ignored where nothing is downloaded.
        options = inspect.signature(snapshot_download).bind(
            source, allow_patterns=[CONFIG_NAME, *WEIGHTS_PATTERNS], **download
        )
        folder = Path(source)
        if not folder.is_dir():
            if not is_repo_id(source):
                raise FileNotFoundError(
                    f"{source} is neither a folder nor a hub repository (owner/name)"
                )
            with hub_errors(source):
                folder = Path(snapshot_download(*options.args, **options.kwargs))
        return cls.from_folder(folder, device=device, dtype=dtype)

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load the model in ``folder``; errors as those of ``from_pretrained``."""
        folder = Path(folder)
        config = cls.read_config(folder)
        files = weight_files(folder)
        return cls.from_tensors(
            config,
            itertools.chain.from_iterable(map(weights.read_safetensors, files)),
            shapes={n: s for path in files for n, s in weights.safetensors_shapes(path).items()},
            source=str(files[0] if len(files) == 1 else folder),
            device=device,
            dtype=dtype,
        )

    @classmethod
    def read_config(cls, folder: Path | str) -> ConfigT:
        """Return the configuration in ``folder``, without the weights."""
        path = Path(folder) / CONFIG_NAME
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder} is not a folder with an {cls.kind}")
        values = read_json(path)
        needed, here = values.pop(_REQUIRES, "0"), importlib.metadata.version("llamagen")
        if _release(needed) > _release(here):
            raise InputError(
                f"{path} needs llamagen {needed} or later, and this is {here}; update it with "
                f"`pip install -U llamagen`"
            )
        kind = values.pop("kind", None)
        if kind != cls.kind:
            raise InputError(
                f"{path} describes {kind or 'something else'}, expected {cls.kind}; name the "
                f"folder of one"
            )
        config: ConfigT = config_from_dict(cls.config_class, values, source=str(path))
        return config


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Run a block without dropout; afterwards every part is in the mode that it was in."""
    changed = [part for module in modules for part in module.modules() if part.training]
    for part in changed:
        part.training = False
    try:
        yield
    finally:
        for part in changed:
            part.training = True


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


class _NoInitialValues(TorchFunctionMode):
    """Makes the functions of ``torch.nn.init`` do nothing.

    A model without memory has no place for initial values. Drawing them all the same would import
    the part of torch that is written in Python: 1.2 s and 70 MB.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder: one, or the shards that their index names.

    FileNotFoundError names one that is missing, InputError an index that cannot be read.
    """
    names, index = [WEIGHTS_NAME], folder / SHARD_INDEX_NAME
    if not (folder / WEIGHTS_NAME).is_file() and index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(map(_is_name, shards.values())):
            raise InputError(f"{index} names no shards of weights; copy or download it again")
        names = sorted(set(shards.values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} does not exist; copy or download the folder again"
            )
    return [folder / name for name in names]


def _is_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name
