"""Conditions as prompts of vLLM.

A label is the id of a token. Everything else (a text, or a class that guidance leads away from)
goes in as embeddings of both streams, which are made here from the few weights that they need.

Shapes: C positions of a condition, D width of the transformer, S streams.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen.models.pretrained import WEIGHTS_NAME
from llamagen.models.transformer import ClassCondition, TextCondition
from llamagen.support.errors import InputError
from llamagen.support.weights import read_safetensors
from llamagen.vllm_plugin.export import read_exported


class Prompts:
    """Makes the prompts of one exported model."""

    def __init__(self, folder: Path | str, dtype: torch.dtype) -> None:
        """Read the weights of the condition in an exported folder, in the engine's precision."""
        self.config = config = read_exported(folder)
        self.takes_embeddings = config.is_text or (config.negative_prompts and config.streams == 2)
        """Whether any prompt is more than a label."""
        kind = TextCondition if config.is_text else ClassCondition
        with torch.device("meta"):
            self._condition: TextCondition | ClassCondition = kind(config.model)
        prefix = "cls_embedding."
        weights = {
            name.removeprefix(prefix): read().to(dtype)
            for name, read in read_safetensors(Path(folder) / WEIGHTS_NAME)
            if name.startswith(prefix)
        }
        self._condition.load_state_dict(weights, assign=True)

    @torch.inference_mode()
    def of(self, condition: Tensor, unconditional: Tensor | None = None) -> dict[str, Any]:
        """Return the prompt of one image.

        Both are a label () or text features (C, text_dim) without padding; by default the second is
        the model's own "no class" or "no text". InputError if they do not fit the model, or the
        engine takes no other one for the unconditional stream.
        """
        self._check(condition)
        if unconditional is not None:
            self._check(unconditional)
            if self.config.streams == 2 and not self.config.negative_prompts:
                raise InputError(
                    "this engine takes no negative prompts; start it (or export its model) with "
                    "negative_prompts"
                )
        # Without guidance it has no effect.
        if unconditional is None or self.config.streams == 1:
            unconditional = self._condition.unconditional(condition.unsqueeze(0))[0]
        if not self.config.is_text and int(unconditional) == self.config.end_id:
            return {"prompt_token_ids": [int(condition)]}
        streams = (condition, unconditional)[: self.config.streams]
        embedded = [self._condition(each.cpu().unsqueeze(0))[0] for each in streams]  # (C, D)
        # Zeros in front are the padding that the model masks.
        length = max(map(len, embedded))
        padded = [F.pad(each, (0, 0, length - len(each), 0)) for each in embedded]
        return {"prompt_embeds": torch.cat(padded, dim=-1)}

    def _check(self, condition: Tensor) -> None:
        """Raise InputError unless this is a condition of one image."""
        is_text = self.config.is_text
        if condition.ndim != (2 if is_text else 0):
            what = "text features (length, width)" if is_text else "one label"
            raise InputError(
                f"the condition has shape {tuple(condition.shape)}, expected {what} of one image"
            )
        self._condition.check(condition.unsqueeze(0))
        if is_text and len(condition) == 0:
            raise InputError("the text features are empty; give at least one")
