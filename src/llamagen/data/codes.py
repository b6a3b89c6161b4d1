"""What identifies the codes of an image tokenizer."""

from __future__ import annotations

import hashlib
import json

import torch

from llamagen.config import config_to_dict
from llamagen.tokenizer import ImageTokenizer


def tokenizer_fingerprint(tokenizer: ImageTokenizer) -> str:
    """A short text that two tokenizers share only if their codes mean the same."""
    whole = hashlib.sha256(json.dumps(config_to_dict(tokenizer.config)).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]
