"""The transformer before its first step: new or another model's weights, with LoRA or not."""

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
    SamplingConfig,
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
from llamagen.training.checkpoint import CHECKPOINTS_NAME, latest_checkpoint
from llamagen.training.config import TransformerTraining
from llamagen.training.lora import add_lora, init_lora_tensor, merged_state, original_name
from llamagen.training.next_code import (
    TRANSFORMER,
    Conditioning,
    FeatureConditioning,
    NextCodeModel,
    TokenConditioning,
    init_encoder_tensor,
)
from llamagen.training.parallel import initialise, seeded, set_tensor

_CLASS_TABLE = "cls_embedding.embedding_table.weight"
_DROPOUT = ("token_dropout", "attention_dropout", "residual_dropout", "ffn_dropout", "drop_path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSide:
    """Text encoder of a run: small and trained along, or frozen, or replaced by its features."""

    small: SmallTextEncoderConfig | None = None
    config: TextConfig | None = None
    """Of an encoder that is not trained."""
    encoder: TextEncoder | None = None
    features: TextStore | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Fields of ``TransformerConfig``."""
        if self.small is not None:
            return {"text_dim": self.small.dim, "text_length": self.small.max_length}
        source = self.features or self.encoder
        assert source is not None
        assert self.config is not None
        return {"text_dim": source.width, "text_length": self.config.max_length}

    def loaded(self, features: Path | None) -> TextSide:
        """Return it with its encoder, or with the store of ``features``, as training needs it."""
        if self.config is None:
            return self
        if features is not None:
            return dataclasses.replace(self, features=TextStore.open(features))
        with distributed.main_first():
            return dataclasses.replace(self, encoder=TextEncoder.from_pretrained(self.config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """How the model of a run is built and filled."""

    recipe: TransformerTraining
    config: TransformerConfig
    labels: Labels | None = None
    """None if it is conditioned on text."""
    new_classes: bool = False
    """Whether they are not those of the model to start from."""
    text: TextSide = TextSide()
    """Empty if it is conditioned on classes."""

    def build(self, *, lora: bool = True) -> NextCodeModel:
        """Return the model with arbitrary weights, on torch's default device."""
        transformer = Transformer(self.config)
        if lora and self.recipe.lora.lora_rank > 0:
            add_lora(transformer, self.recipe.lora)
        if self.text.small is None:
            return NextCodeModel(transformer)
        encoder = TextEncoder.small(self.text.small, clean=self.recipe.text.clean_captions)
        code_sets = self.recipe.text.code_set_weight > 0
        return NextCodeModel(transformer, encoder, code_sets=code_sets)

    def conditioning(self, model: NextCodeModel) -> Conditioning:
        """Return how images become conditions of ``model``."""
        encoder, features = model.encoder or self.text.encoder, self.text.features
        if encoder is not None:
            return TokenConditioning(encoder, frozen=model.encoder is None)
        return Conditioning() if features is None else FeatureConditioning(features)

    def fill(self, model: NextCodeModel) -> None:
        """Give the model, or this process's part of it, its first weights."""

        def init_tensor(name: str, tensor: Tensor, generator: torch.Generator) -> None:
            small = self.text.small
            if small is not None and init_encoder_tensor(name, tensor, generator, small):
                return
            if not init_lora_tensor(name, tensor, generator):
                model.transformer.init_tensor(_transformer_name(name), tensor, generator)

        initialise(model.saved, self.recipe.loop.seed, init_tensor)
        if self.recipe.init is not None:
            self._copy_source(self.recipe.init, model)

    def whole(self, state: Mapping[str, Tensor]) -> NextCodeModel:
        """Return the model with this state; low-rank matrices are merged into it."""
        if self.recipe.lora.lora_rank > 0:
            state = merged_state(state, self.recipe.lora)
        with torch.device("meta"):
            model = self.build(lora=False)
        model.saved.load_state_dict(state, assign=True)
        return model.eval()

    def pipeline(self, tokenizer: ImageTokenizer, model: NextCodeModel) -> Pipeline:
        """Return a pipeline with ``model``."""
        own = self.recipe.sampling
        return Pipeline(
            tokenizer,
            model.transformer,
            labels=self.labels,
            name=self.recipe.out.name,
            sampling=None if own == SamplingConfig() else own,
            text_encoder=model.encoder or self.text.encoder or self.text.config,
        )

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint says of the model; ``start_of`` reads it."""
        parts = {"config": self.config, "small_text": self.text.small, "text": self.text.config}
        return {
            "kind": Transformer.kind,
            "classes": list(self.labels.names) if self.labels is not None else [],
            **{name: config_to_dict(part) for name, part in parts.items() if part is not None},
        }

    def _copy_source(self, source: str, model: NextCodeModel) -> None:
        found = checkpoints.resolve_pipeline(source)
        state = checkpoints.load_transformer(found.transformer, dtype=torch.float32).state_dict()
        if self.new_classes:
            # Random rows; that of "no class", which guidance needs, stays.
            table = torch.empty(self.config.num_classes + 1, self.config.dim)
            generator = seeded(self.recipe.loop.seed, _CLASS_TABLE)
            model.transformer.init_tensor(_CLASS_TABLE, table, generator)
            table[-1] = state[_CLASS_TABLE][-1]
            state[_CLASS_TABLE] = table
        own = _own_encoder(found)
        if own is not None and model.encoder is not None:
            encoder = TextEncoder.from_pretrained(own, dtype=torch.float32)
            state |= {f"encoder.{name}": value for name, value in encoder.named_parameters()}
        parameters = {_transformer_name(name): value for name, value in model.named_parameters()}
        for name, tensor in state.items():
            set_tensor(parameters[name], tensor)


def find_start(
    recipe: TransformerTraining, *, codebook_size: int, grid: Grid, class_names: tuple[str, ...]
) -> Start:
    """Return how to start, or what a run started with if its folder holds a checkpoint.

    All processes call it, with the codebook and grid of the data's codes, and the names of its
    classes, which a text-conditional model does not use. Raises FileNotFoundError if the model to
    start from does not exist, InputError if it is damaged or does not fit recipe and codes.
    """
    checkpoint = latest_checkpoint(recipe.out / CHECKPOINTS_NAME)
    if checkpoint is not None:
        # The model that the run started from may be gone by now.
        start = start_of(recipe, checkpoint.about["model"], str(checkpoint.path))
        return dataclasses.replace(start, text=start.text.loaded(recipe.text.text_features))
    found = None if recipe.init is None else checkpoints.resolve_pipeline(recipe.init)
    text, labels = TextSide(), None
    sizes: dict[str, Any] = {"codebook_size": codebook_size, "grid": grid}
    if recipe.condition == "class":
        labels = Labels(class_names)
        sizes["num_classes"] = len(class_names)
    else:
        text = _find_text(recipe, found)
        sizes |= text.sizes
    if found is None:
        config = TransformerConfig(**vars(recipe.model), condition=recipe.condition, **sizes)
        return Start(recipe=recipe, config=config, labels=labels, text=text)
    source = checkpoints.load_transformer(found.transformer, device="meta").config
    _check_source(recipe, source, sizes)
    # Dropout is no part of a model: it is the recipe's.
    sizes |= {name: getattr(recipe.model, name) for name in _DROPOUT}
    if recipe.model.order == "random" != source.order:
        if recipe.lora.lora_rank > 0:
            raise InputError(
                f"{recipe.init} predicts in raster order, and LoRA does not train the query that "
                f"random order needs; train all weights, or start from a model of random order"
            )
        # A raster model's weights are a start: only the queries are new.
        sizes["order"] = "random"
    return Start(
        recipe=recipe,
        config=dataclasses.replace(source, **sizes),
        labels=labels,
        new_classes=labels is not None and labels.names != (found.labels and found.labels.names),
        text=text,
    )


def start_of(recipe: TransformerTraining, about: Mapping[str, Any], source: str) -> Start:
    """Return how a model is built from what the checkpoint ``source`` says of it."""
    small, config = about.get("small_text"), about.get("text")
    return Start(
        recipe=recipe,
        config=config_from_dict(TransformerConfig, about["config"], source),
        labels=Labels(tuple(about["classes"])) if recipe.condition == "class" else None,
        text=TextSide(
            small=small and config_from_dict(SmallTextEncoderConfig, small, source),
            config=config and config_from_dict(TextConfig, config, source),
        ),
    )


def _find_text(recipe: TransformerTraining, found: checkpoints.PipelineSource | None) -> TextSide:
    """Return the text encoder of a new run, perhaps that of the model it starts from."""
    asked = recipe.text
    if asked.text_features is not None:
        store = TextStore.open(asked.text_features)
        if asked.text_encoder not in (None, store.text.encoder):
            raise InputError(
                f"the text features in {asked.text_features} were made by {store.text.encoder}, "
                f"not by {asked.text_encoder}; extract them again with that, or leave "
                f"`text_encoder` out"
            )
        return TextSide(config=store.text, features=store)
    own, name = _own_encoder(found), asked.text_encoder
    if name is None and own is None and found is not None and found.text is not None:
        name = found.text.encoder
    if name is not None:
        config = TextConfig(encoder=name, max_length=asked.text_length, clean=asked.clean_captions)
        return TextSide(config=config).loaded(None)
    if recipe.lora.lora_rank > 0:
        raise InputError(
            "LoRA adapts a transformer alone; name the text encoder that stays as it is with "
            "`text_encoder`, or train without LoRA"
        )
    if own is None:
        return TextSide(small=asked.small)
    encoder = TextEncoder.from_pretrained(own, dtype=torch.float32)
    return TextSide(small=encoder.small_config(dropout=asked.text_dropout))


def _own_encoder(found: checkpoints.PipelineSource | None) -> TextConfig | None:
    """Return the text encoder in a pipeline's own folder, if it has one."""
    if found is None or found.folder is None or found.text is None:
        return None
    is_own = Path(found.text.encoder) == found.folder / checkpoints.TEXT_ENCODER_FOLDER
    return found.text if is_own else None


def _transformer_name(name: str) -> str:
    """Return a weight's name in a transformer on its own, without low-rank matrices."""
    return original_name(name.removeprefix(TRANSFORMER))


def _check_source(
    recipe: TransformerTraining, source: TransformerConfig, sizes: Mapping[str, Any]
) -> None:
    """Check that the model to start from has the condition, codes and architecture of the run."""
    refuse_quantized(source, "be trained")
    if source.condition != recipe.condition:
        raise InputError(
            f"{recipe.init} is conditioned on {source.condition}, but the run on "
            f"{recipe.condition}; start from another model, or change `condition`"
        )
    if source.codebook_size != sizes["codebook_size"]:
        raise InputError(
            f"{recipe.init} predicts {source.codebook_size} codes but the tokenizer has "
            f"{sizes['codebook_size']}; use the tokenizer that it was trained with"
        )
    for name in ("text_dim", "text_length"):
        if name in sizes and sizes[name] != getattr(source, name):
            raise InputError(
                f"{recipe.init} has {name} {getattr(source, name)}, but the text encoder "
                f"{sizes[name]}; use the one that it was trained with"
            )
    for name, usual in vars(TransformerArchitecture()).items():
        asked, actual = getattr(recipe.model, name), getattr(source, name)
        is_free = name in _DROPOUT or (name, asked) == ("order", "random")
        if not is_free and asked not in (usual, actual):
            raise InputError(
                f"the recipe's model has {name} {asked}, but {recipe.init} has {actual}; "
                f"leave it out"
            )
