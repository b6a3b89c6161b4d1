"""Models in folders, in the package, in published .pt files and on the hub."""

from llamagen.checkpoints.load import load_model as load_model
from llamagen.checkpoints.load import load_tokenizer as load_tokenizer
from llamagen.checkpoints.load import load_transformer as load_transformer
from llamagen.checkpoints.names import PUBLIC_MODELS as PUBLIC_MODELS
from llamagen.checkpoints.names import demo_sampling as demo_sampling
from llamagen.checkpoints.names import find_public as find_public
from llamagen.checkpoints.published import read_checkpoint as read_checkpoint
from llamagen.checkpoints.sources import TEXT_ENCODER_FOLDER as TEXT_ENCODER_FOLDER
from llamagen.checkpoints.sources import PipelineIndex as PipelineIndex
from llamagen.checkpoints.sources import PipelineSource as PipelineSource
from llamagen.checkpoints.sources import find_shipped as find_shipped
from llamagen.checkpoints.sources import is_pipeline_folder as is_pipeline_folder
from llamagen.checkpoints.sources import nearest_names as nearest_names
from llamagen.checkpoints.sources import read_index as read_index
from llamagen.checkpoints.sources import resolve_pipeline as resolve_pipeline
from llamagen.checkpoints.sources import shipped_models as shipped_models
from llamagen.checkpoints.sources import write_index as write_index
