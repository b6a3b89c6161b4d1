"""vLLM in this process, where that is possible, and one of its two model runners.

vLLM's second model runner, the one for GPUs, is written with Triton. Triton's interpreter stands
in for its compiler: LLAMAGEN_TEST_VLLM_RUNNER=2 runs the same tests on it.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Read once, when vLLM is imported.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Processes run beside each other, and each would bind its thread to the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

SECOND_RUNNER = os.environ.get("LLAMAGEN_TEST_VLLM_RUNNER") == "2"

if SECOND_RUNNER:
    from tests.vllm_plugin import triton_interpreter

    triton_interpreter.install()

from tests.parity.conftest import fixtures, read_case  # noqa: E402, F401
from tests.vllm_plugin.engines import Engine  # noqa: E402


@pytest.fixture
def start(tmp_path):
    """Starts a model on vLLM, in this process."""
    started = 0

    def start(model, options=None, **settings):
        nonlocal started
        started += 1
        return Engine(model, tmp_path / f"model-{started}", options, **settings)

    return start
