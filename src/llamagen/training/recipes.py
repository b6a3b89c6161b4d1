"""Recipes as YAML files, the ones that come with the package and your own."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llamagen.config import (
    TOKENIZER_PRESETS,
    TRANSFORMER_PRESETS,
    config_from_dict,
    preset,
)
from llamagen.support.errors import InputError
from llamagen.training.config import TokenizerTraining, TransformerTraining

RecipeT = TypeVar("RecipeT", TokenizerTraining, TransformerTraining)

_PRESETS: Mapping[type[Any], Mapping[str, Any]] = {
    TokenizerTraining: TOKENIZER_PRESETS,
    TransformerTraining: TRANSFORMER_PRESETS,
}
_PATHS = ("out", "codes", "validation_codes")
_NESTED_PATHS = ("perceptual_weights", "text_features")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everybody expects; YAML 1.1 takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _packaged().iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(cls: type[RecipeT], source: str | Path) -> RecipeT:
    """Reads a recipe.

    Args:
        cls: ``TokenizerTraining`` or ``TransformerTraining``.
        source: a YAML file, or the name of a recipe that comes with the package. What the
            file leaves out has its default. ``model`` is a preset's name, or fields of the model
            with, if wanted, the ``preset`` that they change.

    Raises:
        FileNotFoundError: no such file.
        InputError: no such name, not YAML, an unknown field, or a value that does not fit.
    """
    text, name = _read(str(source))
    try:
        # The loader is a safe one.
        values = yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} is not valid YAML: {reason}") from error
    if not isinstance(values, Mapping):
        raise InputError(f"{name} holds no recipe; expected fields such as 'model:' and 'loop:'")
    return recipe_from_dict(cls, values, name)


def recipe_from_dict(cls: type[RecipeT], values: Mapping[str, Any], source: str) -> RecipeT:
    """The recipe with these fields, as read from YAML; ``source`` names them in errors."""
    prepared = dict(values)
    for name in _PATHS:
        if prepared.get(name) is not None:
            prepared[name] = Path(str(prepared[name]))
    try:
        prepared["model"] = _model_values(cls, prepared.get("model"))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    # Stage-specific defaults of the loop stand behind what the file says of it.
    for name, default in _nested_defaults(cls).items():
        given = prepared.get(name)
        if isinstance(given, Mapping):
            given = {key: _as_path(key, value) for key, value in given.items()}
        if given is None:
            given = {}
        if not isinstance(given, Mapping):
            raise InputError(f"{source}: {name} is {given!r}, expected fields below it")
        prepared[name] = {**default, **given}
    return config_from_dict(cls, prepared, source)


def recipe_to_dict(recipe: TokenizerTraining | TransformerTraining) -> dict[str, Any]:
    """The recipe as values that YAML and JSON can hold."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
    return plain


def recipe_to_yaml(recipe: TokenizerTraining | TransformerTraining) -> str:
    """The recipe as a YAML file that ``load_recipe`` reads."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, default_flow_style=None)


def preset_model(cls: type[RecipeT], name: str) -> Any:
    """The ``model`` of a recipe of type ``cls`` that is the preset called ``name``.

    Raises:
        InputError: there is no such preset.
    """
    model_class = type(cls().model)
    config = preset(_PRESETS[cls], name)
    fields = {field.name for field in dataclasses.fields(model_class)}
    values = {key: value for key, value in vars(config).items() if key in fields}
    return model_class(**values)


def _as_path(name: str, value: Any) -> Any:
    return Path(str(value)) if name in _NESTED_PATHS and value is not None else value


def _model_values(cls: type[RecipeT], given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if isinstance(given, str):
        given = {"preset": given}
    if not isinstance(given, Mapping):
        raise InputError(f"model is {given!r}, expected a preset's name or fields")
    fields = dict(given)
    name = fields.pop("preset", None)
    if name is None:
        return fields
    return {**dataclasses.asdict(preset_model(cls, str(name))), **fields}


def _nested_defaults(cls: type[RecipeT]) -> dict[str, dict[str, Any]]:
    recipe = cls()
    return {
        field.name: dataclasses.asdict(getattr(recipe, field.name))
        for field in dataclasses.fields(recipe)
        if dataclasses.is_dataclass(getattr(recipe, field.name))
    }


def _packaged() -> Any:
    return importlib.resources.files("llamagen") / "assets" / "recipes"


def _read(source: str) -> tuple[str, str]:
    """Text of a recipe and a name for it."""
    if source in recipe_names():
        resource = _packaged() / f"{source}.yaml"
        return resource.read_text(encoding="utf-8"), f"recipe {source}"
    path = Path(source)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise FileNotFoundError(f"{source} does not exist; give a recipe file")
        raise InputError(
            f"there is no recipe {source!r}; give a YAML file or one of {', '.join(recipe_names())}"
        )
    try:
        return path.read_text(encoding="utf-8"), source
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not a text file; give a recipe in YAML") from error
