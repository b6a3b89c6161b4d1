"""CLIP: how well images fit captions (arXiv 2103.00020), through ``transformers``.

Shapes: B images or captions, D numbers of a feature, H x W pixels, S x S pixels of CLIP's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from llamagen.evaluation.features import require_images
from llamagen.support.errors import InputError
from llamagen.support.weights import digest
from llamagen.text.transformers_library import load_pretrained

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
"""The model of most published CLIP scores."""
CAPTION_PREFIX = "A photo depicts "
"""Precedes every caption in the CLIP score (arXiv 2104.08718, section 3)."""

# Of the images that CLIP was trained on, in [0, 1].
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder(nn.Module):
    """CLIP's two encoders: images and captions to features whose product is their similarity."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        """``transformers.CLIPModel``, its tokenizer, and its name in reports."""
        super().__init__()
        # As Any: its class is known to ``transformers`` only.
        self.model: Any = model
        self.tokenizer, self.name = tokenizer, name
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls, source: str | Path = DEFAULT_CLIP, *, device: torch.device | str = "cpu"
    ) -> Self:
        """Load CLIP in float32 from a folder of ``transformers`` or a hub repository "owner/name".

        InputError if there is no such model, or packages are not installed.
        """
        folder = Path(source).expanduser()
        where = str(folder) if folder.is_dir() else str(source)
        model, tokenizer, missing = load_pretrained(
            "CLIP", where, "Model", ("clip",), who="the CLIP score needs", dtype=torch.float32
        )
        # Missing weights are initialised at random, with no more than a warning.
        if missing:
            raise InputError(f"{where} lacks weights of CLIP, as {missing[0]}; download it again")
        return cls(model.to(device), tokenizer, str(source))

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def width(self) -> int:
        """Length of a feature."""
        return int(self.model.config.projection_dim)

    @property
    def fingerprint(self) -> str:
        """A digest of its weights and tokens; scores of others cannot be compared."""
        tokens = repr(sorted(self.tokenizer.get_vocab().items()))
        return f"clip/{digest(tokens, self.model.named_parameters(), torch.float32)}"

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return features (B, D) of images uint8 (B, 3, H, W), float32 and of length 1.

        The short side is resized to S pixels (224) and the middle square is taken, as CLIP does.
        InputError if the images are of another type or shape.
        """
        require_images(images)
        if len(images) == 0:
            return torch.empty(0, self.width, device=self.device)
        pixels = _prepare(images, self.model.config.vision_config.image_size).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], *, prefix: str = CAPTION_PREFIX) -> Tensor:
        """Return features (B, D) of captions after a prefix, float32 and of length 1.

        They are truncated to CLIP's 77 tokens.
        """
        if not texts:
            return torch.empty(0, self.width, device=self.device)
        tokens = self.tokenizer(
            [prefix + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        with torch.autocast(self.device.type, enabled=False):
            pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
            return F.normalize(self.model.text_projection(pooled), dim=-1)


def _prepare(images: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, H, W) to CLIP's input (B, 3, S, S), normalised."""
    # By Pillow as in the original: other bicubic resizings differ, most of all when they shrink.
    arrays = images.movedim(1, -1).cpu().numpy()
    squares = [np.asarray(_square(Image.fromarray(array), side)) for array in arrays]
    x = torch.from_numpy(np.stack(squares)).movedim(-1, 1).float() / 255.0
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _DEVIATION))
    return (x - mean) / deviation


def _square(image: Image.Image, side: int) -> Image.Image:
    """The middle of an image whose short side was resized to ``side`` pixels."""
    short = min(image.size)
    width, height = (side * each // short for each in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    # Halves are rounded to even numbers, as in the original.
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))
