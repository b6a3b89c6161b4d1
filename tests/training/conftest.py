"""Images and a tokenizer to train with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images import write_digits
from tests.tiny_models import tiny_tokenizer


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """24 images of three classes, 16x16 pixels; not to be changed."""
    return write_digits(tmp_path_factory.mktemp("digits") / "images")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A saved tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def curves() -> None:
    """For tests that look at the curves of their runs."""


@pytest.fixture(autouse=True)
def _without_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others do without: drawing them takes longer than all steps of a small run."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr("llamagen.training.trackers.draw_curves", lambda *_: None)
