"""What both models share: plain folders of ``config.json`` and ``model.safetensors``.

``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` come from huggingface_hub's mixin,
so a folder works from a disk and from the hub alike. Loading builds the module without memory
or initial values and fills it tensor by tensor, so it never holds the weights twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import llamagen.storage as storage
from llamagen.config import config_from_dict, config_to_dict, read_json
from llamagen.errors import InputError

ConfigT = TypeVar("ConfigT")

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

NamedTensors = Iterable[tuple[str, Callable[[], Tensor]]]
"""Names, each with a function that reads its tensor; read one at a time, in order."""


class PretrainedModel(nn.Module, ModelHubMixin, Generic[ConfigT]):
    """A module that is built from one configuration and lives in a folder."""

    config_class: ClassVar[type[Any]]
    kind: ClassVar[str]
    config: ConfigT

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def parameter_count(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.parameters())

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
        """Builds the model of ``config`` around existing weights.

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
        with torch.device("meta"):
            model = cls(config)  # type: ignore[call-arg]
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        check_shapes(expected, shapes, source=source, kind=cls.kind)
        for name, read in tensors:
            tensor = read()
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            # One tensor at a time: the source's copy is dropped before the next is read.
            _replace_tensor(model, name, tensor.to(device, wanted))
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        values = {"kind": self.kind, **config_to_dict(self.config)}
        # contiguous: safetensors refuses the strides that channels-last weights have.
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with storage.atomic_file(save_directory / WEIGHTS_NAME) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        # Written last: a folder with a configuration is a whole folder.
        storage.write_json(save_directory / CONFIG_NAME, values)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
                )
            )
        return cls.from_folder(folder, device=device, dtype=dtype)

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Loads the model in ``folder``.

        Raises:
            FileNotFoundError: the folder or one of its two files is missing.
            InputError: the folder holds another kind of model, or a file is damaged.
        """
        folder = Path(folder)
        config = cls.read_config(folder)
        path = folder / WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; copy or download the folder again")
        shapes = safetensors_shapes(path)
        return cls.from_tensors(
            config,
            read_safetensors(path),
            shapes=shapes,
            source=str(path),
            device=device,
            dtype=dtype,
        )

    @classmethod
    def read_config(cls, folder: Path | str) -> ConfigT:
        """The configuration in ``folder``, without the weights."""
        path = Path(folder) / CONFIG_NAME
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder} is not a folder with an {cls.kind}")
        values = read_json(path)
        kind = values.pop("kind", None)
        if kind != cls.kind:
            raise InputError(f"{path} describes {kind or 'something else'}, expected {cls.kind}")
        config: ConfigT = config_from_dict(cls.config_class, values, source=str(path))
        return config


def _replace_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts ``tensor`` in the place of the parameter or buffer called ``name``."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    is_parameter = leaf in dict(module.named_parameters(recurse=False))
    setattr(module, leaf, nn.Parameter(tensor) if is_parameter else tensor)


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    source: str,
    kind: str,
) -> None:
    """Checks that weights are exactly those a model needs.

    Raises:
        InputError: names the first tensor that is missing, superfluous or of another shape.
    """
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{source}: not this {kind}: weight {name} {shape} is missing")
        if tuple(found[name]) != shape:
            raise InputError(
                f"{source}: not this {kind}: weight {name} has shape {tuple(found[name])}, "
                f"expected {shape}"
            )
    for name in found:
        if name not in expected:
            raise InputError(f"{source}: not this {kind}: there is no weight {name} in it")


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a safetensors file, from its header.

    Raises:
        InputError: the file is truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file ({error}); copy or download it again"
        ) from error


def read_safetensors(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The tensors of a safetensors file, read on demand."""
    # Opened anew for each tensor: pages of a mapping stay in memory until it is closed.
    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    for name in safetensors_shapes(path):
        yield name, lambda name=name: read(name)  # type: ignore[misc]
