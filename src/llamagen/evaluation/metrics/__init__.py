"""Metrics as pure functions on arrays."""

from llamagen.evaluation.metrics.psnr import psnr
from llamagen.evaluation.metrics.ssim import ssim

__all__ = ["psnr", "ssim"]
