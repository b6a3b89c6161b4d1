"""Images drawn by vLLM in this process, and by our own engine for comparison."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llamagen.config import SamplingConfig
from llamagen.generation import GenerationRequest, NativeEngine

GREEDY = SamplingConfig(guidance_scale=3.0, temperature=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Image:
    condition: Tensor
    """A label (), or text features (C, text_dim)."""
    seed: int = 0
    sampling: SamplingConfig = GREEDY
    unconditional: Tensor | None = None


def request_of(image: Image) -> GenerationRequest:
    return GenerationRequest(
        condition=image.condition,
        seed=image.seed,
        sampling=image.sampling,
        negative=image.unconditional,
    )


def alone(model, image: Image) -> list[int]:
    """The codes that our own engine generates for this image and no other."""
    return NativeEngine(model).generate([request_of(image)]).flatten().tolist()


class Engine:
    """A model on vLLM."""

    def __init__(self, model, folder, options=None, **settings):
        from vllm import LLM

        from llamagen.vllm_plugin.export import export_for_vllm
        from llamagen.vllm_plugin.prompts import Prompts

        export_for_vllm(model, folder, options)
        values = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_seqs": 64,
            "kv_cache_memory_bytes": 2**25,
            "disable_log_stats": False,
            **settings,
        }
        self.prompts = Prompts(folder, getattr(torch, values["dtype"]))
        self.config = self.prompts.config
        self.llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            enable_prompt_embeds=self.prompts.takes_embeddings,
            **values,
        )

    def request(self, image: Image):
        """vLLM's prompt and parameters."""
        from llamagen.vllm_plugin.sampling import sampling_params

        prompt = self.prompts.of(image.condition, image.unconditional)
        return prompt, sampling_params(self.config, image.sampling, image.seed)

    def draw(self, images) -> list[list[int]]:
        """Codes of images that vLLM is asked for at once."""
        prompts, params = zip(*map(self.request, images), strict=True)
        outputs = self.llm.generate(list(prompts), list(params), use_tqdm=False)
        return [self.codes(output) for output in outputs]

    def codes(self, output) -> list[int]:
        return [token - self.config.first_code for token in output.outputs[0].token_ids]

    def preemptions(self) -> int:
        """How often vLLM has taken a request's memory away so far."""
        return sum(
            metric.value
            for metric in self.llm.get_metrics()
            if metric.name == "vllm:num_preemptions"
        )


def mixed_settings(count: int, *, codes: int, guided: bool = True) -> list[SamplingConfig]:
    """Settings that differ in everything."""
    return [
        SamplingConfig(
            guidance_scale=[1.0, 1.5, 4.0, 7.5, 0.0][i % 5] if guided else 1.0,
            guidance_stop=[None, None, 0, codes // 2, 1, codes][i % 6],
            temperature=[1.0, 0.0, 0.7, 1.3][i % 4],
            top_k=[0, 1, 5, 20, 1000][(i // 2) % 5],
            top_p=[1.0, 0.9, 0.5][(i // 3) % 3],
        )
        for i in range(count)
    ]


def texts(count: int, *, longest: int, width: int = 16, seed: int = 0) -> list[Tensor]:
    """Text features of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1 + i % longest, width, generator=generator) for i in range(count)]
