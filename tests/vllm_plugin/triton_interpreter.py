"""Makes vLLM's CPU build believe in a Triton for CPUs: the interpreter that Triton comes with."""

from __future__ import annotations

import os


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver = _Driver
    compiler = None


def install() -> None:
    """To be called before vLLM is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    try:
        from triton.backends import backends
    except ImportError:  # without vLLM, whose tests are skipped then
        return
    backends.setdefault("cpu", _Backend)
