"""The transformer on vLLM: its layers, attention, KV cache and scheduler (``llamagen[vllm]``).

vLLM finds the plugin by its entry points and is neither copied nor patched. A request is one
sequence whose every position carries two streams, with the condition and without it, side by side
(``model``); a logits processor mixes their logits and samples the next code (``processor``).

    export     a folder that vLLM loads
    prompts    conditions as vLLM's prompts
    sampling   settings of requests, and from the logits of both streams to codes
    engine     vLLM as an engine, for servers and pipelines
"""

from __future__ import annotations

import os


def keep_vllm_quiet() -> None:
    """Let vLLM, not imported yet, log warnings only, to stderr; unless the environment says so."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def register() -> None:
    """Register the model; vLLM calls this in each of its processes."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from llamagen.vllm_plugin.hf_config import ARCHITECTURE, LlamaGenConfig

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: the class is imported where it is needed, and not before CUDA is ready.
        ModelRegistry.register_model(ARCHITECTURE, f"llamagen.vllm_plugin.model:{ARCHITECTURE}")
    AutoConfig.register(LlamaGenConfig.model_type, LlamaGenConfig, exist_ok=True)
