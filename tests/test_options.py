"""No option is there for show."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

import llamagen
from llamagen import config
from llamagen.cli.main import COMMANDS
from llamagen.data import columns
from llamagen.training import config as training_config

SOURCE = Path(llamagen.__file__).parent
MODULES = [config, columns, training_config]
MODULES += [
    importlib.import_module(f"llamagen.cli.{name}")
    for name in dict.fromkeys(target.split(":")[0] for target, _ in COMMANDS.values())
]


def attributes_read() -> set[str]:
    """Names of all attributes that the package reads, but for where configurations check them."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while pending:
            node = pending.pop()
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
                continue
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            pending += ast.iter_child_nodes(node)
    return found


def fields_of(module) -> list[str]:
    return [
        field.name
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
        for field in dataclasses.fields(value)
    ]


@pytest.fixture(scope="module")
def read() -> set[str]:
    return attributes_read()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_field_is_read(module, read):
    # What is consumed before the options are built: see cli/train.py.
    before = {"recipe", "preset"} if module.__name__ == "llamagen.cli.train" else set()
    names = set(fields_of(module)) - before
    assert names
    assert names - read == set()
