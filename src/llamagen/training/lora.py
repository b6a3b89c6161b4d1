"""Low-rank adaptation (Hu et al. 2106.09685) of a transformer, with the modules of ``peft``.

Adapters are saved in peft's format; ``llamagen.checkpoints.adapters`` reads them without peft.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import llamagen.support.storage as storage
from llamagen.checkpoints.adapters import ADAPTER_WEIGHTS_NAME
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError, importing
from llamagen.training.config import LoraConfig

_ADAPTER = "default"
"""peft's name for the only adapter of a model."""
_CLASS_TABLE = "cls_embedding."


def add_lora(model: Transformer, config: LoraConfig) -> None:
    """Add low-rank matrices to every block; only they and the classes are trained.

    Raises InputError if peft is not installed, or the model has no such layers.
    """
    with importing("LoRA needs", "'llamagen[finetune]'"):
        from peft import inject_adapter_in_model
    try:
        inject_adapter_in_model(_peft_config(config), model)
    except ValueError as error:
        raise InputError(
            f"lora_targets {', '.join(config.lora_targets)} are no layers of a transformer; "
            f"choose from wqkv, wo, w1, w2, w3"
        ) from error
    for name, parameter in model.named_parameters():
        if name.startswith(_CLASS_TABLE):
            parameter.requires_grad_(True)


def init_lora_tensor(name: str, tensor: Tensor, generator: torch.Generator | None) -> bool:
    """Initialise a low-rank matrix; return False if ``name`` is none."""
    if ".lora_A." in name:
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    elif ".lora_B." in name:
        # The product is zero: training starts from the model as it was.
        nn.init.zeros_(tensor)
    else:
        return False
    return True


def original_name(name: str) -> str:
    """Return a weight's name in a model without low-rank matrices."""
    return name.replace(".base_layer.", ".")


def merged_state(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return the state of a plain transformer, with the low-rank products added to its weights."""
    merged = {original_name(name): t for name, t in state.items() if ".lora_" not in name}
    scale = config.lora_alpha / config.lora_rank
    for name, tensor in state.items():
        if ".base_layer." in name:
            parts = (name.replace(".base_layer.", f".lora_{x}.{_ADAPTER}.") for x in "BA")
            up, down = (state[part] for part in parts)
            merged[original_name(name)] = tensor + scale * (up @ down)
    return merged


def save_adapter(
    state: Mapping[str, Tensor], config: LoraConfig, folder: Path, *, base: str
) -> None:
    """Write the adapter in peft's format; ``base`` names the model that it belongs to."""
    tensors = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in state.items()
        if ".lora_" in name or name.startswith(_CLASS_TABLE)
    }
    settings = _peft_config(config)
    # Not while training: peft would wrap the module and so rename its weights.
    settings.modules_to_save = ["cls_embedding"]
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    with storage.atomic_folder(folder) as temporary:
        settings.save_pretrained(str(temporary))
        save_file(tensors, temporary / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})


def _peft_config(config: LoraConfig) -> Any:
    import peft

    return peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
    )
