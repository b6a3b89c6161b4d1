"""Condition in, images out: the pipeline, editing, ranking and saving."""

from llamagen.pipeline.pipeline import EngineName, Pipeline, PipelineOutput

__all__ = ["EngineName", "Pipeline", "PipelineOutput"]
