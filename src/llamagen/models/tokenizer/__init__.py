"""The image tokenizer: an autoencoder between images and grids of codes."""

from llamagen.models.tokenizer.model import ImageTokenizer as ImageTokenizer
from llamagen.models.tokenizer.model import TokenizerOutput as TokenizerOutput
from llamagen.models.tokenizer.model import images_to_uint8 as images_to_uint8
from llamagen.models.tokenizer.model import uint8_to_images as uint8_to_images
from llamagen.models.tokenizer.quantizers import Quantizer as Quantizer
