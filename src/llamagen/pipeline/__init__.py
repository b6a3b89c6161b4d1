"""Condition in, images out: the pipeline, editing, ranking and saving."""

from llamagen.pipeline.pipeline import Pipeline, PipelineOutput

__all__ = ["Pipeline", "PipelineOutput"]
