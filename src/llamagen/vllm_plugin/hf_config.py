"""The model's configuration as vLLM and transformers read it, and the ids of its vocabulary.

Ids of vLLM's tokens, with n classes and V codes:

    class-conditional   0 .. n-1 labels     n "no class"       n+1 .. n+V codes
    text-conditional                        0 a text feature   1 .. V codes

The last id before the codes also ends a sequence.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from llamagen.config import SamplingConfig, TransformerConfig, config_from_dict, config_to_dict
from llamagen.support.errors import InputError

ARCHITECTURE = "LlamaGenForImageCodes"

_HEAD_MULTIPLE = 32
"""Head dimensions that are multiples of it are fast in vLLM on CPUs, and supported on all GPUs."""


class LlamaGenConfig(PretrainedConfig):
    """The ``config.json`` of an exported folder.

    The names that vLLM asks for (``hidden_size``, ``num_attention_heads``, ...) describe the
    sequence with its streams, and follow from the rest.
    """

    model_type = "llamagen"

    def __init__(
        self,
        transformer: dict[str, Any] | None = None,
        streams: int = 2,
        negative_prompts: bool = False,
        sampling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the exported values: ``TransformerConfig`` and ``SamplingConfig`` as dictionaries.

        ``streams`` is 2 with guidance, 1 without; with ``negative_prompts`` both take conditions.
        """
        if streams not in (1, 2):
            raise InputError(f"streams is {streams}, expected 2 (with guidance) or 1 (without)")
        # Plain values: transformers copies, compares and writes what it finds here.
        self.transformer = _complete(TransformerConfig, transformer, "transformer")
        self.streams = streams
        self.negative_prompts = negative_prompts
        self.sampling = _complete(SamplingConfig, sampling, "sampling")
        given = {"architectures": [ARCHITECTURE], "tie_word_embeddings": False, **kwargs}
        super().__init__(**given)

    @property
    def model(self) -> TransformerConfig:
        """The transformer's own configuration."""
        return config_from_dict(TransformerConfig, self.transformer, source="transformer")

    @property
    def default_sampling(self) -> SamplingConfig:
        """Settings for requests that say nothing; without guidance where there is none."""
        plain = {"guidance_scale": 1.0, "guidance_stop": None} if self.streams == 1 else {}
        return config_from_dict(SamplingConfig, {**self.sampling, **plain}, source="sampling")

    @property
    def is_text(self) -> bool:
        """Whether prompts are text features."""
        return bool(self.transformer["condition"] == "text")

    @property
    def first_code(self) -> int:
        """Id of code 0."""
        return 1 if self.is_text else int(self.transformer["num_classes"]) + 1

    @property
    def end_id(self) -> int:
        """Id that ends a sequence: "no class", or that of a text feature."""
        return self.first_code - 1

    @property
    def masks_padding(self) -> bool:
        """Whether one stream's condition may be shorter than the other's."""
        return self.is_text and self.streams == 2 and self.negative_prompts

    @property
    def vocab_size(self) -> int:
        """Every id, and at least the logits of all streams side by side."""
        codes = int(self.transformer["codebook_size"])
        return max(self.streams * codes, self.first_code + codes)

    @property
    def hidden_size(self) -> int:
        """Width of all streams."""
        return self.streams * int(self.transformer["dim"])

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return int(self.transformer["layers"])

    @property
    def num_attention_heads(self) -> int:
        """Query heads of all streams."""
        return self.streams * self.model.heads

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads of all streams."""
        return self.streams * self.model.num_kv_heads

    @property
    def intermediate_size(self) -> int:
        """Hidden size of the feed-forward layer, which the streams share."""
        return self.model.ffn_dim

    @property
    def head_dim(self) -> int:
        """Width of a head in the KV cache: filled up with zeros, and one more to mask padding."""
        needed = self.model.head_dim + self.masks_padding
        return -(-needed // _HEAD_MULTIPLE) * _HEAD_MULTIPLE

    @property
    def max_position_embeddings(self) -> int:
        """Positions of the longest condition and all codes."""
        return self.model.condition_length + self.model.num_codes

    @property
    def mrope_section(self) -> list[int] | None:
        """Tells vLLM that the model counts positions itself: a prompt's length is not its own."""
        return [1, 1, 1] if self.is_text else None


def _complete(kind: type[Any], values: dict[str, Any] | None, source: str) -> dict[str, Any]:
    return config_to_dict(config_from_dict(kind, values or {}, source=source))
