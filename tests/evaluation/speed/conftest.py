"""Limits of the machine, measured quickly."""

import pytest

from llamagen.evaluation import speed


@pytest.fixture(autouse=True)
def _quick_limits(monkeypatch):
    monkeypatch.setattr(speed, "_TRIES", 1)
    monkeypatch.setattr(speed, "_READ_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(speed, "_PRODUCT_SIZE", {"cpu": 64})
