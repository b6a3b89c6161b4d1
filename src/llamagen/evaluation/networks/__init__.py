"""The networks in whose features images are compared."""

from llamagen.evaluation.networks.clip import CAPTION_PREFIX, DEFAULT_CLIP, ClipEncoder
from llamagen.evaluation.networks.inception import InceptionFeatures, InceptionV3

__all__ = ["CAPTION_PREFIX", "DEFAULT_CLIP", "ClipEncoder", "InceptionFeatures", "InceptionV3"]
