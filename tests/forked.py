"""Functions in processes of their own, which need not import torch: all fork from one that has.

Nothing of the package is imported here, since some tests run a copy of it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.checkpoint.api", "torch.distributed.fsdp"])


def start(
    module: str, function: str, *arguments: Any, log: Path, path: Path | None = None
) -> BaseProcess:
    """Start a function of a module that is found in ``path`` first.

    What it prints goes to the file ``log``, and its errors to ``log`` with the suffix .err.
    """
    process = _context.Process(target=_call, args=(module, function, arguments, log, path))
    process.start()
    return process


def _call(
    module: str, function: str, arguments: tuple[Any, ...], log: Path, path: Path | None
) -> None:
    for descriptor, name in ((1, log), (2, log.with_suffix(".err"))):
        with name.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    if path is not None:
        sys.path.insert(0, str(path))
    getattr(importlib.import_module(module), function)(*arguments)


def execute(code: str, environment: dict[str, str]) -> None:
    """Execute a program where all environment variables are these."""
    os.environ.clear()
    os.environ.update(environment)
    exec(code, {"__name__": "__main__"})
