"""The base of both models: plain folders of ``config.json`` and ``model.safetensors``.

``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` are those of huggingface_hub's mixin,
so a folder works from a disk and from the hub alike. Loading builds the module without memory
or initial values and fills it tensor by tensor, so it never holds the weights twice.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from huggingface_hub import ModelHubMixin, constants, errors, snapshot_download
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import llamagen.support.storage as storage
from llamagen.config import config_from_dict, config_to_dict, read_json
from llamagen.support.errors import InputError, one_line

ConfigT = TypeVar("ConfigT")

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_CARD_NAME = "README.md"
_REQUIRES = "requires_llamagen"

NamedTensors = Iterable[tuple[str, Callable[[], Tensor]]]
"""Names, each with a function that reads its tensor; read one at a time, in order."""


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
        return digest(json.dumps(config_to_dict(self.config)), self.state_dict().items())

    @classmethod
    def from_tensors(
        cls,
        config: ConfigT,
        tensors: NamedTensors,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        source: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the model of ``config`` around existing weights.

        Args:
            config: the architecture.
            tensors: the weights, read one at a time.
            shapes: every name and shape in ``tensors``, checked before anything is read.
            source: where the weights come from, for error messages.
            device: where the model goes.
            dtype: precision of the weights; None keeps the stored one.

        Raises:
            InputError: the names or shapes are not those of ``config``.
        """
        with torch.device("meta"), _NoInitialValues():
            model = cls(config)
        expected = model.state_dict()
        needed = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        check_shapes(needed, shapes, source=source, kind=cls.kind)
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

        Args:
            save_directory: the folder; other files in it stay.
            repo_id: where to push to; by default a repository with the folder's name.
            push_to_hub: upload the folder as well, and return the address of the hub's commit.
            options: of ``push_to_hub``.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
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
        """Load a model from a folder, or from a hub repository that holds such a folder.

        Args:
            pretrained_model_name_or_path: the folder or "owner/name".
            device: where the model goes.
            dtype: precision of the weights; None keeps the stored one.
            download: options of ``huggingface_hub.snapshot_download``: revision, cache_dir,
                force_download, local_files_only, token and others.

        Raises:
            FileNotFoundError: there is no such folder or repository, or a file in it is missing.
            InputError: the repository cannot be read, holds another kind of model, or is damaged.
        """
        source = str(pretrained_model_name_or_path)
        # A misspelt option shall not be ignored where nothing is downloaded.
        options = inspect.signature(snapshot_download).bind(
            source, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **download
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
        path = folder / WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; copy or download the folder again")
        return cls.from_tensors(
            config,
            read_safetensors(path),
            shapes=safetensors_shapes(path),
            source=str(path),
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


def digest(
    about: str, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
) -> str:
    """Return a short text that depends on ``about`` and on weights, wherever and however they lie.

    In another precision than their own they are compared only to its digits.
    """
    whole = hashlib.sha256(about.encode())
    for name, tensor in sorted(weights):
        whole.update(name.encode())
        values = tensor.detach().to("cpu", dtype).flatten()
        whole.update(values.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    kind: str,
) -> None:
    """Raise InputError for the first weight that is missing, superfluous or of another shape."""
    for name in [*expected, *found]:
        if name not in found:
            reason = f"weight {name} {expected[name]} is missing"
        elif name not in expected:
            reason = f"weight {name} is extra (there is no weight {name} in it)"
        elif (shape := tuple(found[name])) != expected[name]:
            reason = f"weight {name} has shape {shape}, expected {expected[name]}"
        else:
            continue
        raise InputError(f"{source}: not this {kind}: {reason}")


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


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor in a safetensors file, from its header.

    Raises InputError if the file is truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file ({error}); copy or download it again"
        ) from error


def read_safetensors(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the tensors of a safetensors file, read on demand."""
    for name in safetensors_shapes(path):
        yield name, functools.partial(_read_tensor, path, name)


def _read_tensor(path: Path, name: str) -> Tensor:
    # Opened anew for each tensor: pages of a mapping stay in memory until it is closed.
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def is_repo_id(text: str) -> bool:
    """Whether ``text`` can be the name of a hub repository of somebody: "owner/name"."""
    try:
        validate_repo_id(text)
    except errors.HFValidationError:
        return False
    return text.count("/") == 1


# huggingface_hub changed its HTTP library with version 1; its own errors derive from either.
_HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__bases__[0]


@contextmanager
def hub_errors(repo: str, file: str | None = None) -> Iterator[None]:
    """Turn errors of a download from ``repo`` into an InputError of one line, with a remedy.

    Faults of this machine, such as a full disk, stay the OSError that they are.
    """
    hub, wanted = constants.ENDPOINT, repo if file is None else f"{file} of {repo}"
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set; unset it, or download it first"
    else:
        reason = f"{hub} did not answer as a hub does; check the network, a proxy and HF_ENDPOINT"
    missing = f"{wanted} is not on this machine, neither as a file nor as a download, and {reason}"
    # The first that fits: some derive from others.
    messages: dict[type[Exception], str] = {
        errors.GatedRepoError: f"the hub gives {repo} only to those who accept its terms: do so at "
        f"{hub}/{repo}, and log in with `hf auth login`",
        errors.RepositoryNotFoundError: f"there is no repository {repo} on the hub ({hub}), and no "
        f"such folder here; check the name, and log in with `hf auth login` if it is private",
        errors.RevisionNotFoundError: f"{repo} on the hub has no such revision; check its name",
        errors.LocalEntryNotFoundError: missing,
        errors.OfflineModeIsEnabled: missing,
        errors.EntryNotFoundError: f"the hub does not have {wanted}; it may have been renamed "
        f"there",
    }
    try:
        yield
    except (_HTTP_ERROR, errors.EntryNotFoundError, OSError) as error:
        for kind, message in messages.items():
            if isinstance(error, kind):
                raise InputError(message) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = one_line(error) or type(error).__name__
        raise InputError(
            f"the download of {wanted} from {hub} failed ({reason}); try again"
        ) from error
