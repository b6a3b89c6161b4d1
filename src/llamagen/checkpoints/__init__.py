"""Models in folders, in the package, in published .pt files and on the hub."""

from llamagen.checkpoints.load import load_model, load_tokenizer, load_transformer
from llamagen.checkpoints.names import PUBLIC_MODELS, demo_sampling, find_public
from llamagen.checkpoints.published import read_checkpoint
from llamagen.checkpoints.sources import (
    TEXT_ENCODER_FOLDER,
    PipelineIndex,
    PipelineSource,
    find_shipped,
    is_pipeline_folder,
    nearest_names,
    read_index,
    resolve_pipeline,
    shipped_models,
    write_index,
)

__all__ = [
    "PUBLIC_MODELS",
    "TEXT_ENCODER_FOLDER",
    "PipelineIndex",
    "PipelineSource",
    "demo_sampling",
    "find_public",
    "find_shipped",
    "is_pipeline_folder",
    "load_model",
    "load_tokenizer",
    "load_transformer",
    "nearest_names",
    "read_checkpoint",
    "read_index",
    "resolve_pipeline",
    "shipped_models",
    "write_index",
]
