"""Metrics: pure functions on arrays."""

from llamagen.evaluation.metrics.clip_score import clip_score
from llamagen.evaluation.metrics.codebook import CodebookUse, codebook_use
from llamagen.evaluation.metrics.frechet import frechet_distance
from llamagen.evaluation.metrics.inception_score import inception_score
from llamagen.evaluation.metrics.kernel import KernelDistance, kernel_distance
from llamagen.evaluation.metrics.manifold import PrecisionRecall, nearest, precision_recall
from llamagen.evaluation.metrics.psnr import psnr
from llamagen.evaluation.metrics.ssim import ssim
from llamagen.evaluation.metrics.statistics import FeatureStatistics

__all__ = [
    "CodebookUse",
    "FeatureStatistics",
    "KernelDistance",
    "PrecisionRecall",
    "clip_score",
    "codebook_use",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "nearest",
    "precision_recall",
    "psnr",
    "ssim",
]
