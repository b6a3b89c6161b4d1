"""Options and fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# As the command line sets it, and before torch is imported: see llamagen.cli.main.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest has a --fixtures flag of its own, which lists fixtures (also spelt --funcargs). The
    # parity suite takes a folder under that name; "resolve" lets the later definition win.
    group = parser.getgroup("llamagen")
    group._arggroup.conflict_handler = "resolve"
    group.addoption(
        "--fixtures",
        dest="parity_fixtures",
        type=Path,
        default=Path(__file__).parent / "fixtures",
        help="folder with the parity fixtures (default: tests/fixtures)",
    )
    group.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The datasets library writes copies of what it reads; not into the home folder here."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache"


@pytest.fixture
def nothing_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What would be downloaded fails, and nothing is found in the cache of whoever runs this."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-hub"))
