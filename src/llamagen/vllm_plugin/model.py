"""The transformer in vLLM's layers, for sequences that carry one or two streams.

Every position holds the hidden states of its streams side by side: the conditional one and, with
guidance, the unconditional one. To the weights each stream is a row of its own; attention alone
sees a position as one, with the heads of both streams, so each stream attends to itself and vLLM
schedules, caches and preempts the two together.

Shapes: T positions of the batch, S streams, D width, H and K query and key-value heads of this
process, E head dimension, F that of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from llamagen.models.transformer import apply_rope, rope_table
from llamagen.vllm_plugin.hf_config import LlamaGenConfig
from llamagen.vllm_plugin.sampling import refuse_unsupported

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sequence import IntermediateTensors

_RENAMED: dict[str, tuple[str, *tuple[int, ...]]] = {
    "attention.wqkv": ("attention.qkv_proj",),
    "attention.wo": ("attention.o_proj",),
    "feed_forward.w1": ("feed_forward.gate_up_proj", 0),
    "feed_forward.w3": ("feed_forward.gate_up_proj", 1),
    "feed_forward.w2": ("feed_forward.down_proj",),
}
"""Weights of ``Transformer`` that have another name here; the number of those that are a part."""

_CLASS_TABLE = "cls_embedding.embedding_table.weight"
_CODE_TABLE = "tok_embeddings.weight"

_MASKED = 4096.0
"""Queries times keys of padding, before the scale: far below what exp can tell from zero."""


class CodeAttention(nn.Module):
    """Attention of all streams at once, each to its own positions."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: LlamaGenConfig = vllm_config.model_config.hf_config
        model, processes = config.model, get_tensor_model_parallel_world_size()
        self.streams = config.streams
        self.head_dim = model.head_dim
        self.padding = config.head_dim - model.head_dim
        self.heads = model.heads // processes
        self.kv_heads = max(1, model.num_kv_heads // processes)
        quant = vllm_config.quant_config
        plain: dict[str, Any] = {"bias": False, "quant_config": quant}
        sizes = model.dim, model.head_dim, model.heads, model.num_kv_heads
        self.qkv_proj = QKVParallelLinear(*sizes, prefix=f"{prefix}.qkv_proj", **plain)
        self.o_proj = RowParallelLinear(model.dim, model.dim, prefix=f"{prefix}.o_proj", **plain)
        self.attention = Attention(
            self.streams * self.heads,
            config.head_dim,
            model.head_dim**-0.5,
            num_kv_heads=self.streams * self.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            prefix=f"{prefix}.attention",
        )

    def forward(self, x: Tensor, rope: Tensor, masked: Tensor | None) -> Tensor:
        """``x`` (T S, D) with ``rope`` (T, E / 2, 2) to (T S, D).

        ``masked`` (T, S, 1) is 1 where a stream's position is padding.
        """
        qkv, _ = self.qkv_proj(x)
        heads = qkv.unflatten(-1, (-1, self.head_dim))  # (T S, H + 2K, E)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = self._rotate(q, rope), self._rotate(k, rope)  # (T, S H, E), (T, S K, E)
        v = v.reshape(-1, self.streams * self.kv_heads, self.head_dim)
        q, k, v = (F.pad(part, (0, self.padding)) for part in (q, k, v))
        if masked is not None:
            # The first of the added dimensions is 1 in queries and, in the keys of padding, so low
            # that nothing attends to them.
            q[..., self.head_dim] = 1.0
            k[..., self.head_dim] = -_MASKED * masked.expand(-1, -1, self.kv_heads).flatten(1)
        out = self.attention(q.flatten(1), k.flatten(1), v.flatten(1))
        out = out.view(-1, self.heads, self.head_dim + self.padding)[..., : self.head_dim]
        return self.o_proj(out.flatten(1))[0]

    def _rotate(self, part: Tensor, rope: Tensor) -> Tensor:
        """(T S, heads, E) to (T, S heads, E), rotated by each position's cell."""
        together = part.reshape(-1, self.streams * part.shape[1], self.head_dim)
        return apply_rope(together.unsqueeze(0), rope)[0]


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        model = vllm_config.model_config.hf_config.model
        dim, hidden = model.dim, model.ffn_dim
        plain: dict[str, Any] = {"bias": False, "quant_config": vllm_config.quant_config}
        self.gate_up_proj = MergedColumnParallelLinear(
            dim, [hidden] * 2, prefix=f"{prefix}.gate_up_proj", **plain
        )
        self.down_proj = RowParallelLinear(hidden, dim, prefix=f"{prefix}.down_proj", **plain)
        self.activation = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        """(T S, D) to the same shape."""
        hidden, _ = self.gate_up_proj(x)
        return self.down_proj(self.activation(hidden))[0]


class CodeBlock(nn.Module):
    """Attention, then feed-forward, each pre-normed with a residual connection."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        model = vllm_config.model_config.hf_config.model
        self.attention_norm = RMSNorm(model.dim, eps=model.norm_eps)
        self.attention = CodeAttention(vllm_config, f"{prefix}.attention")
        self.ffn_norm = RMSNorm(model.dim, eps=model.norm_eps)
        self.feed_forward = FeedForward(vllm_config, f"{prefix}.feed_forward")

    def forward(
        self, x: Tensor, residual: Tensor, rope: Tensor, masked: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The last block's output and its residual, (T S, D) each, to those of this block."""
        x, residual = self.attention_norm(x, residual)
        x = self.attention(x, rope, masked)
        x, residual = self.ffn_norm(x, residual)
        return self.feed_forward(x), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class CodeStack(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LlamaGenConfig = vllm_config.model_config.hf_config
        model, quant = config.model, vllm_config.quant_config
        self.streams, self.dim = config.streams, model.dim
        self.first_code = config.first_code
        self.ids = config.first_code + model.codebook_size
        self.masks_padding = config.masks_padding
        self.embedding = VocabParallelEmbedding(
            self.ids, model.dim, quant_config=quant, prefix=f"{prefix}.embedding"
        )
        self.layers = nn.ModuleList(
            CodeBlock(vllm_config, f"{prefix}.layers.{layer}") for layer in range(model.layers)
        )
        self.norm = RMSNorm(model.dim, eps=model.norm_eps)
        # Row 0 is for every condition position, row 1 + i for code i.
        device = self.embedding.weight.device
        table = rope_table(model.grid, model.head_dim, model.rope_base, device)
        self.register_buffer("rope", table.roll(1, dims=0), persistent=False)
        self.rope: Tensor

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (T,) to the embeddings of all streams, (T, S D).

        In the unconditional stream "no class" stands for every label. vLLM does not check the ids
        of a prompt where it has no tokenizer; an image of one that is none is better than a crash.
        """
        ids = ids.clamp(0, self.ids - 1)
        if self.streams == 2:
            without = ids.masked_fill(ids < self.first_code, self.first_code - 1)
            ids = torch.stack([ids, without], dim=-1).flatten()
        return self.embedding(ids).view(-1, self.streams * self.dim)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Normalised states (T, S D) of ids or embeddings at ``positions`` ((3,) T)."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids)
        if positions.ndim == 2:
            # vLLM has three kinds of positions for models that count themselves; one is enough.
            positions = positions[0]
        residual = inputs_embeds.reshape(-1, self.dim)
        rope = self.rope[positions.clamp(0, self.rope.shape[0] - 1)]
        masked = None
        if self.masks_padding:
            # Padding is embedded as zeros; see prompts.
            masked = (residual == 0).all(-1).view(-1, self.streams, 1).to(residual.dtype)
        x = torch.zeros_like(residual)
        for layer in self.layers:
            x, residual = layer(x, residual, rope, masked)
        x, _ = self.norm(x, residual)
        return x.view(-1, self.streams * self.dim)


class LlamaGenForImageCodes(nn.Module):
    """The model that vLLM runs: ids or embeddings to hidden states, hidden states to logits."""

    supports_mrope: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        stages = vllm_config.parallel_config.pipeline_parallel_size
        refuse_unsupported(vllm_config.speculative_config, stages)
        self.config: LlamaGenConfig = vllm_config.model_config.hf_config
        self._prefill_has_codes = vllm_config.use_v2_model_runner
        inside = f"{prefix}." if prefix else ""
        self.model = CodeStack(vllm_config=vllm_config, prefix=f"{inside}model")
        codes, dim = self.config.model.codebook_size, self.config.model.dim
        self.output = ParallelLMHead(
            codes, dim, quant_config=vllm_config.quant_config, prefix=f"{inside}output"
        )
        self.logits_processor = LogitsProcessor(codes)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Ids (T,) to the embeddings of all streams (T, S D)."""
        return self.model.embed(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (T, S D)."""
        del intermediate_tensors  # of pipeline parallelism, which this model does without
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(N, S D) to (N, I): the logits of the streams side by side, filled up to all ids."""
        streams, dim = self.config.streams, self.config.model.dim
        logits = self.logits_processor(self.output, hidden_states.reshape(-1, dim))
        if logits is None:  # on the processes that do not draw
            return None
        logits = logits.reshape(hidden_states.shape[0], streams * logits.shape[-1])
        missing = self.config.vocab_size - logits.shape[-1]
        return F.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[object]
    ) -> tuple[Tensor, int]:
        """Return the positions (3, length) of a text prompt, and the offset of later codes'.

        A condition stands at 0 wherever it stands in the prompt, code i at 1 + i: images do not
        depend on the prompt's length. V2 puts the codes of a preempted request behind its prompt,
        in which every position of a text has the id 0.
        """
        del mm_features
        length = len(input_tokens)
        if self._prefill_has_codes:
            length = next((i for i, token in enumerate(input_tokens) if token), length)
        codes = torch.arange(1, len(input_tokens) - length + 1)
        positions = torch.cat([torch.zeros(length, dtype=codes.dtype), codes])
        return positions.expand(3, -1), 1 - length

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of a ``Transformer`` by their names; return those that were filled."""
        parameters = dict(self.named_parameters())
        tables: dict[str, Tensor] = {}
        loaded: set[str] = set()

        def fill(name: str, tensor: Tensor, *part: int) -> None:
            load = getattr(parameters[name], "weight_loader", default_weight_loader)
            load(parameters[name], tensor, *part)
            loaded.add(name)

        for name, tensor in weights:
            if name.startswith("cls_embedding.cap_proj") or name.endswith("uncond_embedding"):
                continue  # texts are projected before they come here
            if name in (_CLASS_TABLE, _CODE_TABLE):
                tables[name] = tensor
                continue
            target, part = name if name == "output.weight" else f"model.{name}", list[int]()
            for theirs, (ours, *which) in _RENAMED.items():
                if theirs in name:
                    target, part = target.replace(theirs, ours), which
            fill(target, tensor, *part)
        codes = tables[_CODE_TABLE]
        # A text has no embedding of its own here; its id has a row all the same.
        front = tables.get(_CLASS_TABLE, codes.new_zeros(1, codes.shape[1]))
        fill("model.embedding.weight", torch.cat([front, codes]))
        return loaded
