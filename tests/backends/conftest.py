"""Kernels are tested as they are used: with several threads."""

import pytest


@pytest.fixture(autouse=True)
def _several_threads(several_threads):
    pass
