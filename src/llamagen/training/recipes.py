"""Recipes as YAML files, those that come with the package and your own."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llamagen.config import TOKENIZER_PRESETS, TRANSFORMER_PRESETS, config_from_dict, preset
from llamagen.support.errors import InputError, one_line
from llamagen.training.config import Recipe, RecipeT, TokenizerTraining

_PACKAGED = Path(__file__).parent.parent / "assets" / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everybody expects; YAML 1.1 takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in _PACKAGED.glob("*.yaml"))


def load_recipe(cls: type[RecipeT], source: str | Path) -> RecipeT:
    """Read a YAML file, or a recipe that comes with the package, by its name.

    Fields that it leaves out have their defaults. ``model`` is a preset's name, or fields of the
    model, optionally with the ``preset`` that they change. Raises FileNotFoundError if there is no
    such file, InputError for an unknown name, bad YAML, an unknown field, or an invalid value.
    """
    text, source = _read(str(source))
    try:
        # The loader is a safe one.
        values = yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not valid YAML: {one_line(error)}") from error
    if not isinstance(values, Mapping):
        raise InputError(f"{source} holds no recipe; expected fields such as 'model:' and 'loop:'")
    merged = dict(values)
    for name, default in vars(cls()).items():
        if not dataclasses.is_dataclass(default):
            continue
        given = merged.get(name)
        if name == "model":
            try:
                default, given = _model(cls, given)
            except InputError as error:
                raise InputError(f"{source}: {error}") from error
        if not isinstance(given, Mapping | None):
            raise InputError(f"{source}: {name} is {given!r}, expected fields below it")
        # A stage's own defaults of the loop stay where the file gives other fields only.
        merged[name] = {**dataclasses.asdict(default), **(given or {})}
    return config_from_dict(cls, merged, source)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as values that YAML and JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the recipe as a YAML file that ``load_recipe`` reads."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, default_flow_style=None)


def preset_model(cls: type[RecipeT], name: str) -> Any:
    """Return the ``model`` of a recipe of type ``cls`` that is a preset, or raise InputError."""
    if cls is TokenizerTraining:
        return preset(TOKENIZER_PRESETS, name)
    return preset(TRANSFORMER_PRESETS, name).architecture


def _model(cls: type[RecipeT], given: Any) -> tuple[Any, Any]:
    """Return the defaults of a recipe's ``model``, and the fields that change them."""
    if isinstance(given, str):
        given = {"preset": given}
    if not isinstance(given, Mapping | None):
        raise InputError(f"model is {given!r}, expected a preset's name or fields")
    fields = dict(given or {})
    name = fields.pop("preset", None)
    return (cls().model if name is None else preset_model(cls, str(name))), fields


def _read(source: str) -> tuple[str, str]:
    """Return the text of a recipe and a name for it."""
    path = Path(source)
    if source in recipe_names():
        return (_PACKAGED / f"{source}.yaml").read_text(encoding="utf-8"), f"recipe {source}"
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
