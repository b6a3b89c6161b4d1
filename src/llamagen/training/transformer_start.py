"""What a transformer is before its first step: new, or another model's weights, LoRA or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llamagen.checkpoints as checkpoints
from llamagen.config import (
    Grid,
    SmallTextEncoderConfig,
    TextConfig,
    TransformerArchitecture,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
)
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import Transformer
from llamagen.models.transformer.quantization import refuse_quantized
from llamagen.pipeline import Pipeline
from llamagen.support import distributed
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from llamagen.text.encoder import TextEncoder
from llamagen.text.features import TextStore
from llamagen.training.checkpoint import has_checkpoint, read_checkpoint
from llamagen.training.conditioning import (
    Conditioning,
    FeatureConditioning,
    LabelConditioning,
    TokenConditioning,
)
from llamagen.training.config import TransformerTraining
from llamagen.training.lora import add_lora, init_lora_tensor, merged_state, original_name
from llamagen.training.next_code import TRANSFORMER, NextCodeModel, init_encoder_tensor
from llamagen.training.parallel import initialise, seeded, set_tensor, shards_model
from llamagen.training.run_folder import checkpoint_folder

_CLASS_TABLE = "cls_embedding.embedding_table.weight"
_DROPOUT = ("token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout", "drop_path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """How the model of a run is built and filled."""

    recipe: TransformerTraining
    config: TransformerConfig
    source_labels: Labels | None = None
    """Classes of the model that it starts from, if there is one."""
    labels: Labels | None
    """None if it is conditioned on text."""
    small_text: SmallTextEncoderConfig | None = None
    """The text encoder that is trained along, if one is."""
    text: TextConfig | None = None
    """Where the text encoder is that stays as it is, if there is one."""
    frozen_text: TextEncoder | None = None
    """That encoder, where training needs it."""
    features: TextStore | None = None
    """What it has made of the captions before, where training needs that instead."""

    def build(self) -> NextCodeModel:
        """The model, with weights of no meaning, or without memory if it is to be sharded."""
        loop = self.recipe.loop
        if shards_model(loop):
            with torch.device("meta"):
                model = self._new()
        else:
            model = self._new()
        model.transformer.recompute_blocks = loop.activation_checkpointing == "blocks"
        return model

    def build_empty(self) -> NextCodeModel:
        """The model on the CPU, without any values: for weights that are read from elsewhere."""
        with torch.device("meta"):
            model = self._new()
        return model.to_empty(device="cpu")

    def conditioning(self, model: NextCodeModel) -> Conditioning:
        """How images are told to ``model``."""
        if model.encoder is not None:
            return TokenConditioning(model.encoder, frozen=False)
        if self.frozen_text is not None:
            return TokenConditioning(self.frozen_text, frozen=True)
        if self.features is not None:
            return FeatureConditioning(self.features)
        return LabelConditioning()

    def fill(self, model: NextCodeModel) -> None:
        """Gives the model, or this process's part of it, its first weights."""
        transformer, small = model.transformer, self.small_text

        def init_tensor(name: str, tensor: Tensor, generator: torch.Generator) -> None:
            if small is not None and init_encoder_tensor(name, tensor, generator, small):
                return
            if not init_lora_tensor(name, tensor, generator):
                transformer.init_tensor(_transformer_name(name), tensor, generator)

        initialise(model.saved, self.recipe.loop.seed, init_tensor)
        if self.recipe.init is not None:
            self._copy_source(self.recipe.init, model)

    def whole(self, state: Mapping[str, Tensor]) -> NextCodeModel:
        """The model with this state; low-rank matrices are merged into it."""
        if self.recipe.lora.lora_rank > 0:
            state = merged_state(state, self.recipe.lora)
        with torch.device("meta"):
            model = self._new(lora=False)
        model.saved.load_state_dict(state, assign=True)
        return model.eval()

    def pipeline(self, tokenizer: ImageTokenizer, model: NextCodeModel) -> Pipeline:
        """What draws images with ``model``."""
        text = model.encoder or self.frozen_text or self.text
        return Pipeline(
            tokenizer,
            model.transformer,
            labels=self.labels,
            name=self.recipe.out.name,
            sampling=self.recipe.sampling,
            text_encoder=text,
        )

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of the model."""
        values: dict[str, Any] = {
            "kind": Transformer.kind,
            "config": config_to_dict(self.config),
            "classes": list(self.labels.names) if self.labels is not None else [],
        }
        if self.small_text is not None:
            values["small_text"] = config_to_dict(self.small_text)
        if self.text is not None:
            values["text"] = config_to_dict(self.text)
        return values

    def _new(self, *, lora: bool = True) -> NextCodeModel:
        transformer = Transformer(self.config)
        if lora and self.recipe.lora.lora_rank > 0:
            add_lora(transformer, self.recipe.lora)
        if self.small_text is None:
            return NextCodeModel(transformer)
        clean = self.recipe.text.clean_captions
        return NextCodeModel(
            transformer,
            TextEncoder.small(self.small_text, clean=clean),
            code_sets=self.recipe.text.code_set_weight > 0,
        )

    def _copy_source(self, source: str, model: NextCodeModel) -> None:
        found = checkpoints.resolve_pipeline(source)
        state = checkpoints.load_transformer(found.transformer, dtype=torch.float32).state_dict()
        if self.labels is not None and self._has_other_classes():
            state[_CLASS_TABLE] = self._new_class_table(model, state[_CLASS_TABLE])
        parameters = {_transformer_name(name): value for name, value in model.named_parameters()}
        for name, tensor in state.items():
            set_tensor(parameters[name], tensor)
        if model.encoder is not None and _has_own_encoder(found):
            assert found.text is not None
            encoder = TextEncoder.from_pretrained(found.text, dtype=torch.float32)
            trained = dict(model.encoder.named_parameters())
            for name, tensor in encoder.named_parameters():
                set_tensor(trained[name], tensor)

    def _has_other_classes(self) -> bool:
        assert self.labels is not None
        return self.source_labels is None or self.source_labels.names != self.labels.names

    def _new_class_table(self, model: NextCodeModel, old: Tensor) -> Tensor:
        """Random rows for the classes; "no class", which guidance rests on, stays what it was."""
        table = torch.empty(self.config.num_classes + 1, self.config.dim)
        generator = seeded(self.recipe.loop.seed, _CLASS_TABLE)
        model.transformer.init_tensor(_CLASS_TABLE, table, generator)
        table[-1] = old[-1]
        return table


def find_start(
    recipe: TransformerTraining, *, codebook_size: int, grid: Grid, class_names: tuple[str, ...]
) -> Start:
    """How to begin, or what was begun with if the run's folder holds a checkpoint.

    Args:
        recipe: the run.
        codebook_size: number of codes.
        grid: rows and columns of an image's codes.
        class_names: of the data; without meaning for a text-conditional model.

    Raises:
        FileNotFoundError: the model to start from does not exist.
        InputError: it is damaged, or recipe, codes and model do not fit together.
    """
    sizes: dict[str, Any] = {"codebook_size": codebook_size, "grid": grid}
    folder = checkpoint_folder(recipe.out)
    about: dict[str, Any] | None = None
    if has_checkpoint(folder):
        # The model that the run started from may be gone by now.
        about = read_checkpoint(folder).about["model"]
    text: dict[str, Any] = {}
    if recipe.condition == "class":
        labels = Labels(class_names)
        sizes["num_classes"] = len(class_names)
    else:
        labels = None
        text = _find_text(recipe, about, str(folder))
        sizes |= _text_sizes(text, recipe)
    if recipe.init is None:
        config = TransformerConfig(**vars(recipe.model), condition=recipe.condition, **sizes)
        return Start(recipe=recipe, config=config, labels=labels, **text)
    if about is not None:
        source = config_from_dict(TransformerConfig, about["config"], str(folder))
        return Start(recipe=recipe, config=_with_dropout(source, recipe), labels=labels, **text)
    found = checkpoints.resolve_pipeline(recipe.init)
    source = checkpoints.load_transformer(found.transformer, device="meta").config
    refuse_quantized(source, "be trained")
    if source.condition != recipe.condition:
        raise InputError(
            f"{recipe.init} is conditioned on {source.condition}, but the run on "
            f"{recipe.condition}; start from another model, or change `condition`"
        )
    if source.codebook_size != codebook_size:
        raise InputError(
            f"{recipe.init} predicts {source.codebook_size} codes but the tokenizer has "
            f"{codebook_size}; use the tokenizer that it was trained with"
        )
    for name in ("text_dim", "text_length"):
        if name in sizes and sizes[name] != getattr(source, name):
            raise InputError(
                f"{recipe.init} has {name} {getattr(source, name)}, but the text encoder "
                f"{sizes[name]}; use the one that it was trained with"
            )
    _require_agreement(recipe, source)
    config = dataclasses.replace(_with_dropout(source, recipe), **sizes)
    return Start(recipe=recipe, config=config, source_labels=found.labels, labels=labels, **text)


def start_of(recipe: TransformerTraining, about: Mapping[str, Any], source: str) -> Start:
    """How the model of a checkpoint is built, from what the checkpoint says of it.

    Raises:
        InputError: that is damaged; ``source`` names the checkpoint.
    """
    text: dict[str, Any] = {}
    if "small_text" in about:
        text["small_text"] = config_from_dict(SmallTextEncoderConfig, about["small_text"], source)
    if "text" in about:
        text["text"] = config_from_dict(TextConfig, about["text"], source)
    return Start(
        recipe=recipe,
        config=config_from_dict(TransformerConfig, about["config"], source),
        labels=Labels(tuple(about["classes"])) if recipe.condition == "class" else None,
        **text,
    )


def _find_text(
    recipe: TransformerTraining, about: Mapping[str, Any] | None, folder: str
) -> dict[str, Any]:
    """The text encoder of a run, frozen or small, as ``Start`` has it."""
    asked = recipe.text
    if asked.text_features is not None:
        store = _open_features(asked.text_features, asked.text_encoder)
        return {"text": store.text, "features": store}
    found = None
    if recipe.init is not None and asked.text_encoder is None and about is None:
        found = checkpoints.resolve_pipeline(recipe.init)
    name = asked.text_encoder
    if name is None and about is not None and "text" in about:
        name = about["text"]["encoder"]
    if name is None and found is not None and found.text is not None:
        name = None if _has_own_encoder(found) else found.text.encoder
    if name is not None:
        text = TextConfig(encoder=name, max_length=asked.text_length, clean=asked.clean_captions)
        with distributed.main_first():
            return {"text": text, "frozen_text": TextEncoder.from_pretrained(text)}
    if recipe.lora.lora_rank > 0:
        raise InputError(
            "LoRA adapts a transformer alone; name the text encoder that stays as it is with "
            "`text_encoder`, or train without LoRA"
        )
    if about is not None:
        known = config_from_dict(SmallTextEncoderConfig, about["small_text"], folder)
        return {"small_text": known}
    if found is not None and _has_own_encoder(found):
        assert found.text is not None
        encoder = TextEncoder.from_pretrained(found.text, dtype=torch.float32)
        return {"small_text": encoder.small_config(dropout=asked.text_dropout)}
    return {"small_text": asked.small}


def _open_features(folder: Path, encoder: str | None) -> TextStore:
    store = TextStore.open(folder)
    if encoder is not None and encoder != store.text.encoder:
        raise InputError(
            f"the text features in {folder} were made by {store.text.encoder}, not by {encoder}; "
            f"extract them again with that, or leave `text_encoder` out"
        )
    return store


def _text_sizes(text: dict[str, Any], recipe: TransformerTraining) -> dict[str, Any]:
    frozen, small = text.get("frozen_text"), text.get("small_text")
    features: TextStore | None = text.get("features")
    if features is not None:
        return {"text_dim": features.width, "text_length": features.text.max_length}
    if frozen is not None:
        return {"text_dim": frozen.width, "text_length": recipe.text.text_length}
    assert small is not None
    return {"text_dim": small.dim, "text_length": small.max_length}


def _has_own_encoder(found: checkpoints.PipelineSource) -> bool:
    """Whether a pipeline has a text encoder in its own folder."""
    if found.folder is None or found.text is None:
        return False
    return Path(found.text.encoder) == found.folder / checkpoints.TEXT_ENCODER_FOLDER


def _transformer_name(name: str) -> str:
    """A weight's name in a transformer on its own, without low-rank matrices."""
    return original_name(name.removeprefix(TRANSFORMER))


def _with_dropout(source: TransformerConfig, recipe: TransformerTraining) -> TransformerConfig:
    """The source's architecture with the recipe's regularisation, which is no part of a model."""
    dropout: dict[str, Any] = {name: getattr(recipe.model, name) for name in _DROPOUT}
    return dataclasses.replace(source, **dropout)


def _require_agreement(recipe: TransformerTraining, source: TransformerConfig) -> None:
    """Checks that the recipe asks for no other architecture than the model it starts from has."""
    default = TransformerArchitecture()
    for field in dataclasses.fields(default):
        asked, usual = getattr(recipe.model, field.name), getattr(default, field.name)
        there = getattr(source, field.name)
        if field.name not in _DROPOUT and asked not in (usual, there):
            raise InputError(
                f"the recipe's model has {field.name} {asked}, but {recipe.init} has {there}; "
                f"leave it out"
            )
