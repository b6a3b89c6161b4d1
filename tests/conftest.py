"""Options and fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_WORKERS = 8
"""Each worker imports torch and holds models of its own: about 1 GB."""

# Before torch is imported. Tests run beside each other, one thread each, and so do the processes
# that they start; the fixture several_threads is for what threads could change. What is compiled
# (kernels, torch.compile) outlives a run and is shared by all workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("LLAMAGEN_CACHE", str(ROOT / ".cache" / "llamagen"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / ".cache" / "hypothesis"))

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
    # The longest start first: no worker is left alone with one at the end.
    items.sort(key=lambda item: "long" not in item.keywords)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers of ``-n auto``: one for each core this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MAX_WORKERS)


@pytest.fixture
def several_threads() -> Iterator[None]:
    """Three threads for operations and kernels, whose sums may then be split differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


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
