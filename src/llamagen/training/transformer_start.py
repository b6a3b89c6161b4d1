"""What a transformer is before its first step: new, or another model's weights, LoRA or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from llamagen import checkpoints
from llamagen.config import Grid, TransformerConfig, config_from_dict
from llamagen.errors import InputError
from llamagen.labels import Labels
from llamagen.training.checkpoint import has_checkpoint, read_checkpoint
from llamagen.training.config import TransformerSize, TransformerTraining
from llamagen.training.lora import add_lora, init_lora_tensor, original_name
from llamagen.training.parallel import initialise, seeded, set_tensor, shards_model
from llamagen.training.run_folder import checkpoint_folder
from llamagen.transformer import Transformer

_CLASS_TABLE = "cls_embedding.embedding_table.weight"
_DROPOUT = ("token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout", "drop_path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """How the transformer of a run is built and filled."""

    recipe: TransformerTraining
    config: TransformerConfig
    source_labels: Labels | None = None
    """Classes of the model that it starts from, if there is one."""
    labels: Labels

    def build(self) -> Transformer:
        """The transformer, with weights of no meaning, or without memory if it is to be sharded."""
        loop = self.recipe.loop
        if shards_model(loop):
            with torch.device("meta"):
                model = Transformer(self.config)
                self._adapt(model)
        else:
            model = Transformer(self.config)
            self._adapt(model)
        model.recompute_blocks = loop.activation_checkpointing == "blocks"
        return model

    def fill(self, model: Transformer) -> None:
        """Gives the transformer, or this process's part of it, its first weights."""

        def init_tensor(name: str, tensor: Tensor, generator: torch.Generator) -> None:
            if not init_lora_tensor(name, tensor, generator):
                model.init_tensor(original_name(name), tensor, generator)

        initialise(model, self.recipe.loop.seed, init_tensor)
        if self.recipe.init is not None:
            self._copy_source(self.recipe.init, model)

    def _adapt(self, model: Transformer) -> None:
        if self.recipe.lora.lora_rank > 0:
            add_lora(model, self.recipe.lora)

    def _copy_source(self, source: str, model: Transformer) -> None:
        found = checkpoints.resolve_pipeline(source)
        state = checkpoints.load_transformer(found.transformer, dtype=torch.float32).state_dict()
        if self.source_labels is None or self.source_labels.names != self.labels.names:
            state[_CLASS_TABLE] = self._new_class_table(model, state[_CLASS_TABLE])
        parameters = {original_name(name): value for name, value in model.named_parameters()}
        for name, tensor in state.items():
            set_tensor(parameters[name], tensor)

    def _new_class_table(self, model: Transformer, old: Tensor) -> Tensor:
        """Random rows for the classes; "no class", which guidance rests on, stays what it was."""
        table = torch.empty(self.config.num_classes + 1, self.config.dim)
        model.init_tensor(_CLASS_TABLE, table, seeded(self.recipe.loop.seed, _CLASS_TABLE))
        table[-1] = old[-1]
        return table


def find_start(
    recipe: TransformerTraining, *, codebook_size: int, grid: Grid, class_names: tuple[str, ...]
) -> Start:
    """How to begin, or what was begun with if the run's folder holds a checkpoint.

    Raises:
        FileNotFoundError: the model to start from does not exist.
        InputError: it is damaged, or recipe, codes and model do not fit together.
    """
    labels = Labels(class_names)
    sizes: dict[str, Any] = {
        "codebook_size": codebook_size,
        "grid": grid,
        "num_classes": len(class_names),
    }
    if recipe.init is None:
        return Start(recipe=recipe, config=recipe.model.config(**sizes), labels=labels)
    folder = checkpoint_folder(recipe.out)
    if has_checkpoint(folder):
        # The model that the run started from may be gone by now.
        begun = read_checkpoint(folder).about["model"]["config"]
        source = config_from_dict(TransformerConfig, begun, str(folder))
        return Start(recipe=recipe, config=_with_dropout(source, recipe), labels=labels)
    found = checkpoints.resolve_pipeline(recipe.init)
    source = checkpoints.load_transformer(found.transformer, device="meta").config
    if source.condition != "class":
        raise InputError(f"{recipe.init} is conditioned on text; start from a model with classes")
    if source.codebook_size != codebook_size:
        raise InputError(
            f"{recipe.init} predicts {source.codebook_size} codes but the tokenizer has "
            f"{codebook_size}; use the tokenizer that it was trained with"
        )
    _require_agreement(recipe, source)
    config = dataclasses.replace(_with_dropout(source, recipe), **sizes)
    return Start(recipe=recipe, config=config, source_labels=found.labels, labels=labels)


def _with_dropout(source: TransformerConfig, recipe: TransformerTraining) -> TransformerConfig:
    """The source's architecture with the recipe's regularisation, which is no part of a model."""
    dropout: dict[str, Any] = {name: getattr(recipe.model, name) for name in _DROPOUT}
    return dataclasses.replace(source, **dropout)


def _require_agreement(recipe: TransformerTraining, source: TransformerConfig) -> None:
    """Checks that the recipe asks for no other architecture than the model it starts from has."""
    default = TransformerSize()
    for field in dataclasses.fields(default):
        asked, usual = getattr(recipe.model, field.name), getattr(default, field.name)
        there = getattr(source, field.name)
        if field.name not in _DROPOUT and asked not in (usual, there):
            raise InputError(
                f"the recipe's model has {field.name} {asked}, but {recipe.init} has {there}; "
                f"leave it out"
            )
