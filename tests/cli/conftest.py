"""Runs commands in this process, as a shell would run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from llamagen.cli.main import main
from tests.tiny_models import tiny_pipeline


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys) -> Callable[..., Result]:
    def run_command(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(stopped.value.code or 0, captured.out, captured.err)

    return run_command


@pytest.fixture
def fails(run) -> Callable[..., str]:
    """Runs a command that must fail with one line, and returns that line."""

    def run_failing(*arguments: object, status: int = 2) -> str:
        result = run(*arguments)
        assert result.status == status, result
        lines = [line for line in result.err.splitlines() if line.startswith("llamagen: error: ")]
        assert len(lines) == 1, result.err
        assert result.err.splitlines()[-1] == lines[0], "the error is the last line"
        assert "Traceback" not in result.err
        return lines[0]

    return run_failing


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A saved pipeline folder of the tiny models."""
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder
