"""Images from folders, tables and data sets, and the codes that a tokenizer makes of them."""

from llamagen.data.columns import SourceConfig
from llamagen.data.images import CorruptImageError, ImageCollection, ImageFolder, open_image
from llamagen.data.sources import open_images

__all__ = [
    "CorruptImageError",
    "ImageCollection",
    "ImageFolder",
    "SourceConfig",
    "open_image",
    "open_images",
]
