"""Limits of the machine, measured quickly."""

import pytest

from llamagen.evaluation.speed import limits


@pytest.fixture(autouse=True)
def _quick_limits(monkeypatch):
    monkeypatch.setattr(limits, "_TRIES", 1)
    monkeypatch.setattr(limits, "_READ_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(limits, "_PRODUCT_SIZE", {"cpu": 64})
