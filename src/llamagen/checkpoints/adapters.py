"""LoRA adapters of a transformer, as folders in peft's format."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from llamagen.config import read_json
from llamagen.models.transformer import Transformer
from llamagen.models.transformer.conditioning import ClassCondition
from llamagen.support.errors import InputError
from llamagen.support.weights import read_safetensors, safetensors_shapes

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_CLASS_TABLE = "cls_embedding.embedding_table.weight"


@torch.no_grad()
def merge_adapter(transformer: Transformer, folder: Path | str) -> None:
    """Add an adapter's matrices to the weights of the transformer that it was trained on.

    A class table in it replaces the transformer's, and may have another number of classes.
    FileNotFoundError if a file is missing; InputError if it is another model's, damaged or no LoRA.
    """
    folder = Path(folder)
    settings = read_json(folder / ADAPTER_CONFIG_NAME)
    plain = not settings.get("use_dora") and settings.get("bias", "none") == "none"
    if settings.get("peft_type") != "LORA" or not plain:
        raise InputError(f"{folder} is no plain LoRA adapter; merge it with peft instead")
    root = settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"]
    scale = settings["lora_alpha"] / root
    path = folder / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; copy the whole folder")
    _check(transformer, safetensors_shapes(path), str(folder))
    tensors = {name.removeprefix(_PREFIX): read() for name, read in read_safetensors(path)}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = transformer.get_submodule(name.removesuffix(".lora_A.weight"))
            assert isinstance(layer, nn.Linear)
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            # In float32: rounding once is better than twice.
            change = scale * (up.float() @ down.float())
            layer.weight.copy_(layer.weight.float().cpu() + change)
    if (table := tensors.get(_CLASS_TABLE)) is not None:
        classes = len(table) - 1  # the last row is that of "no class"
        transformer.config = dataclasses.replace(transformer.config, num_classes=classes)
        condition = transformer.cls_embedding
        assert isinstance(condition, ClassCondition)
        condition.num_classes = classes
        weight = condition.embedding_table.weight
        condition.embedding_table = nn.Embedding(*table.shape).to(weight)
        condition.embedding_table.weight.copy_(table)


def _check(transformer: Transformer, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Check that every matrix has a layer of its size."""
    layers = dict(transformer.named_modules())
    for full_name, shape in shapes.items():
        name = full_name.removeprefix(_PREFIX)
        layer_name, _, part = name.removesuffix(".weight").rpartition(".")
        layer = layers.get(layer_name)
        if name == _CLASS_TABLE:
            fits = transformer.config.condition == "class" and shape[1] == transformer.config.dim
        else:
            fits = isinstance(layer, nn.Linear) and (
                (part == "lora_A" and shape[1] == layer.in_features)
                or (part == "lora_B" and shape[0] == layer.out_features)
            )
        if not fits:
            raise InputError(
                f"{source} belongs to another model: it changes {name} {shape}, which this one "
                f"does not have; name the model that it was trained on"
            )
