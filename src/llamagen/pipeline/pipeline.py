"""Prompts or classes in, images out: the class most users ever touch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor, nn

import llamagen.checkpoints as checkpoints
import llamagen.support.labels as label_files
import llamagen.support.storage as storage
from llamagen.backends.cpu.convolution import accelerate
from llamagen.checkpoints.adapters import merge_adapter
from llamagen.config import Grid, KVCacheDType, Quantization, SamplingConfig, TextConfig
from llamagen.generation.batch import check_share
from llamagen.generation.engine import Engine, NativeEngine, ProgressCallback, refuse_edits
from llamagen.generation.memory import decoding_batch_size
from llamagen.generation.request import GenerationRequest
from llamagen.generation.seeds import one_seed_each
from llamagen.models.tokenizer import ImageTokenizer, images_to_uint8
from llamagen.models.transformer import Transformer
from llamagen.models.transformer.quantization import quantize, refuse_quantized
from llamagen.pipeline.conditions import (
    Condition,
    Prompts,
    class_reader,
    embedded_conditions,
    one_each,
    read_conditions,
    text_reader,
)
from llamagen.pipeline.ranking import Ranking, best_of_each, check_ranking, score_images
from llamagen.support.devices import copy_to_host, find_device, find_dtype
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from llamagen.support.pictures import arrays_to_pil
from llamagen.vllm_plugin.engine import VllmEngine

if TYPE_CHECKING:
    from llamagen.text.encoder import TextEncoder

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (NativeEngine, VllmEngine)}
"""The engines that can generate codes, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """Result of a pipeline call."""

    images: list[Image.Image]
    """Empty where only the codes were asked for."""
    codes: Tensor
    """(images, rows, columns) int64, on the CPU."""
    seeds: tuple[int, ...]
    """Seed of each image: with the same model and settings it makes the image again."""
    metadata: tuple[dict[str, Any], ...]
    """Per image: model, class or prompt, seed and settings; ``pictures.save_png`` stores them."""


class Pipeline:
    """An image tokenizer, a transformer over its codes, and its classes or its text encoder.

    Example::

        pipe = Pipeline.from_pretrained("c2i-L-384")
        pipe("golden retriever", num_images_per_prompt=4, seed=0).images[0].save("dog.png")
        pipe = Pipeline.from_pretrained("t2i-XL-256")
        pipe("a lighthouse in a storm, oil painting", negative_prompt="photo").images[0].show()
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        transformer: Transformer,
        *,
        labels: Labels | None = None,
        name: str = "custom",
        sampling: SamplingConfig | None = None,
        text_encoder: TextEncoder | TextConfig | None = None,
        engine: str = "native",
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            tokenizer: turns codes into images.
            transformer: generates codes.
            labels: class names; by default the classes are numbered.
            name: the model's name, as images record it.
            sampling: settings for calls that give none.
            text_encoder: of a text-conditional model, or what it is loaded from when it is first
                needed; without it such a model takes ``prompt_embeds`` only.
            engine: generates the codes: "native", this package, or "vllm", which starts when the
                first image is asked for.
            engine_options: of ``vllm_plugin.engine.VllmEngine``, as tensor_parallel_size.

        Raises:
            InputError: the parts do not fit together, or there is no such engine.
        """
        self._engine_class = _engine_class(engine)
        if engine_options and not self._engine_class.copies_model:
            raise InputError("engine_options go with engine 'vllm'")
        codes, predicted = tokenizer.config.codebook_size, transformer.config.codebook_size
        if codes != predicted:
            raise InputError(
                f"the tokenizer has {codes} codes but the transformer predicts {predicted}; "
                f"use the tokenizer that the transformer was trained with"
            )
        if transformer.config.condition == "class":
            labels = labels or Labels.numbered(transformer.config.num_classes)
            if len(labels) != transformer.config.num_classes:
                raise InputError(
                    f"there are {len(labels)} class names but the transformer has "
                    f"{transformer.config.num_classes} classes; give one name per class"
                )
        self.tokenizer = accelerate(tokenizer)
        self.transformer = transformer
        self.labels = labels
        self.name = name
        self.sampling = sampling or SamplingConfig()
        self.engine = engine
        self._engine_options = dict(engine_options or {})
        self._code_engine: Engine | None = None
        self._text: TextEncoder | TextConfig | None = None
        if transformer.config.condition == "text":
            self._text = text_encoder

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        tokenizer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        labels: Labels | None = None,
        grid: Grid | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        engine: str = "native",
        engine_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a pipeline.

        Args:
            source: a pipeline folder, a hub repository that holds one, the name of a model that
                comes with the package ("cifar10") or of a published one ("c2i-L-384"), or a
                transformer (folder or checkpoint file) given a ``tokenizer``.
            tokenizer: overrides the source's image tokenizer: folder, file or published name.
            text_encoder: overrides the source's text encoder: folder or hub repository.
            labels: overrides the source's class names.
            grid: rows and columns that a checkpoint file was trained on, if it does not say.
            device: "cpu", "cuda", "mps" or a torch device; by default the best there is.
            dtype: "float32", "bfloat16", "float16" or a torch type; by default bfloat16 where
                the device is fast at it.
            engine: generates the codes; with "vllm" the transformer itself stays on the CPU.
            engine_options: of ``vllm_plugin.engine.VllmEngine``, as tensor_parallel_size.

        Raises:
            FileNotFoundError: a part of the source is missing.
            InputError: the source is unknown, damaged, or its parts do not fit together.
        """
        where = find_device(device or "auto")
        precision = find_dtype(dtype, where)
        found = checkpoints.resolve_pipeline(str(source))
        tokenizer = tokenizer or found.tokenizer
        if tokenizer is None:
            raise InputError(f"{source} has no image tokenizer; name one with `tokenizer`")
        transformer = checkpoints.load_transformer(
            found.transformer,
            grid=grid,
            device="cpu" if _engine_class(engine).copies_model else where,
            dtype=precision,
        )
        text = found.text
        if text_encoder is not None:
            text = dataclasses.replace(text or TextConfig(), encoder=str(text_encoder))
        return cls(
            checkpoints.load_tokenizer(tokenizer, device=where, dtype=precision),
            transformer,
            labels=labels or found.labels,
            name=found.name,
            sampling=found.sampling,
            text_encoder=text,
            engine=engine,
            engine_options=engine_options,
        )

    def close(self) -> None:
        """End the engine's processes; the next call starts it again."""
        if self._code_engine is not None:
            self._code_engine.shutdown()
            self._code_engine = None

    @property
    def can_edit(self) -> bool:
        """Whether the engine takes known codes, blends and windows."""
        return self._engine_class.can_edit

    @property
    def code_engine(self) -> Engine:
        """The engine that generates codes; started when it is first needed."""
        if self._code_engine is None:
            self._code_engine = self._engine_class(self.transformer, **self._engine_options)
        return self._code_engine

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The encoder of prompts; loaded when it is first needed.

        Raises:
            InputError: it cannot be loaded, or its features are not those of the transformer.
        """
        if self._text is None:
            return None
        from llamagen.text.encoder import TextEncoder

        if not isinstance(self._text, TextEncoder):
            # bfloat16 as published; float16 overflows.
            precision = torch.float32 if self.dtype == torch.float32 else torch.bfloat16
            encoder = TextEncoder.from_pretrained(self._text, device=self.device, dtype=precision)
            wanted = self.transformer.config.text_dim
            if encoder.width != wanted:
                raise InputError(
                    f"text encoder {self._text.encoder} gives features of width {encoder.width}, "
                    f"but {self.name} takes {wanted}; use the one that it was trained with"
                )
            self._text = encoder
        return self._text

    def load_adapter(self, folder: str | Path) -> Self:
        """Merge a LoRA adapter of this model; return the pipeline.

        Args:
            folder: an adapter in peft's format; class names that lie beside it are taken over.

        Raises:
            FileNotFoundError: a file of the adapter is missing.
            InputError: it is no LoRA adapter, is damaged, or belongs to another model.
        """
        self.close()
        refuse_quantized(self.transformer.config, "take an adapter")
        merge_adapter(self.transformer, folder)
        names = Path(folder) / label_files.FILE_NAME
        if names.is_file():
            self.labels = Labels.load(names)
        elif self.labels is not None and len(self.labels) != self.transformer.config.num_classes:
            self.labels = Labels.numbered(self.transformer.config.num_classes)
        return self

    def quantize(
        self,
        quantization: Quantization | None = None,
        *,
        kv_cache_dtype: KVCacheDType | None = None,
    ) -> Self:
        """Store weights or the KV cache in int8, which is faster to read; return the pipeline.

        Weights that are quantised are saved so.

        Args:
            quantization: of the transformer's weights: "int8", hardly different from bfloat16.
                None leaves them as they are.
            kv_cache_dtype: of the keys and values of earlier codes: "int8" takes half of bfloat16's
                memory, "auto" is the weights' precision. None changes nothing.

        Raises:
            InputError: there is no such quantisation, or vLLM generates the codes.
        """
        if self._engine_class.copies_model:
            raise InputError(
                f"engine {self.engine!r} quantises by itself; quantization goes with engine "
                f"'native'"
            )
        if quantization not in (None, "int8"):
            raise InputError(f"quantization is {quantization!r}, expected 'int8' or none")
        if quantization not in (None, self.transformer.config.quantization):
            quantize(self.transformer)
        if kv_cache_dtype is not None:
            self.transformer.kv_cache_dtype = torch.int8 if kv_cache_dtype == "int8" else None
        return self

    @property
    def device(self) -> torch.device:
        """Where the image tokenizer computes, and the transformer unless vLLM does its work."""
        return self.tokenizer.device

    @property
    def precision(self) -> dict[str, str]:
        """Precision as images record it: dtype, and what is quantised."""
        found = {"dtype": str(self.dtype).removeprefix("torch.")}
        if self.transformer.config.quantization is not None:
            found["quantization"] = self.transformer.config.quantization
        if self.transformer.kv_cache_dtype is not None:
            found["kv_cache_dtype"] = "int8"
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's precision."""
        return self.transformer.dtype

    def to(
        self,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Self:
        """Move both models; return the pipeline.

        Raises:
            InputError: there is no such device or precision here.
        """
        where = self.device if device is None else find_device(device)
        precision = self.dtype if dtype is None else find_dtype(dtype, where)
        self.close()
        self.tokenizer.to(where, precision)
        self.transformer.to("cpu" if self._engine_class.copies_model else where, precision)
        if isinstance(self._text, nn.Module):
            self._text.to(where, None if precision == torch.float16 else precision)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline folder: both models, class names and an index.

        An older pipeline folder of this name is replaced once the new one is complete.

        Raises:
            InputError: the folder holds something else.
        """
        folder = Path(folder)
        replaceable = not folder.exists() or checkpoints.is_pipeline_folder(folder)
        if not replaceable and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is no pipeline folder; choose another name")
        with storage.atomic_folder(folder) as temporary:
            self.tokenizer.save_pretrained(temporary / "tokenizer")
            self.transformer.save_pretrained(temporary / "transformer")
            if self.labels is not None:
                self.labels.save(temporary / label_files.FILE_NAME)
            text = self._saved_text(temporary)
            index = checkpoints.PipelineIndex(name=self.name, sampling=self.sampling, text=text)
            checkpoints.write_index(temporary, index)

    def _saved_text(self, folder: Path) -> TextConfig | None:
        """Write a text encoder that is on no hub into a folder; return its index entry."""
        if self._text is None:
            return None
        known = self._text if isinstance(self._text, TextConfig) else self._text.config
        if known.encoder and not Path(known.encoder).is_dir():
            return known
        encoder = self.text_encoder
        assert encoder is not None
        encoder.save_pretrained(folder / checkpoints.TEXT_ENCODER_FOLDER)
        return dataclasses.replace(known, encoder="")

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None
    ) -> str:
        """Upload the pipeline folder to the hub; return the commit's address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "pipeline"
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    def __call__(
        self,
        prompt: Prompts | None = None,
        *,
        negative_prompt: Prompts | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        blend: Prompts | None = None,
        blend_share: float = 0.5,
        known_codes: Tensor | None = None,
        best_of: int = 1,
        rank_by: Ranking = "likelihood",
        batch_size: int | None = None,
        window: int | None = None,
        callback: ProgressCallback | None = None,
        output_type: Literal["pil", "codes"] = "pil",
        **settings: Any,
    ) -> PipelineOutput:
        """Generate images.

        Args:
            prompt: texts, or for a class-conditional model names or indices of classes; one or
                several.
            negative_prompt: what guidance leads away from instead of "no text" or "no class": one
                for all prompts, or one for each. Without guidance it has no effect.
            num_images_per_prompt: images of each.
            seed: image i of the call gets seed + i, or the i-th of several; by default random.
                The same seed, class and settings give the same image, alone or among others.
            prompt_embeds: instead of ``prompt`` for text-conditional models, text features
                (prompts, length, text_dim), real features last.
            prompt_attention_mask: (prompts, length), 0 where features are padding.
            blend: what each prompt is blended with, one for all or one each: logits of both are
                mixed, so a code is likely where both find it likely.
            blend_share: how much that counts, from 0 to 1.
            known_codes: (rows, columns), or (images, rows, columns), of the images' codes; these
                stay, -1 stands where one is to be drawn. ``Editor`` makes them of images.
            best_of: candidates for each image, of which the best is kept. Candidate j of image i
                gets seed + i * best_of + j, or that one of several.
            rank_by: what is best: "likelihood", the most likely codes, or "condition", those that
                the prompt or class makes likelier.
            batch_size: images drawn at once; by default as many as fit into memory.
            window: codes of each image that a forward pass predicts; the image stays the same (up
                to floating-point ties). 1 draws them one by one; by default more where that is
                faster.
            callback: called after each finished row of a batch; an exception from it ends the
                call.
            output_type: "codes" leaves the images out, which ``decode`` makes of the codes.
            settings: fields of ``SamplingConfig`` (guidance_scale, temperature, top_k, ...), which
                says what each means; by default those that came with the model.

        Raises:
            InputError: a class or setting is not one this model has, or a prompt says nothing.
        """
        if num_images_per_prompt < 1:
            raise InputError(
                f"num_images_per_prompt is {num_images_per_prompt}, expected at least 1"
            )
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected at least 1")
        check_ranking(rank_by, best_of)
        sampling = self.sampling.replace(**settings)
        if prompt_embeds is not None:
            self._refuse_with_embeds(prompt, negative_prompt, blend)
            conditions = embedded_conditions(prompt_embeds, prompt_attention_mask)
        else:
            conditions = self.conditions(
                prompt, negative_prompt, blend=blend, blend_share=blend_share
            )
        copies = num_images_per_prompt * best_of
        conditions = [condition for condition in conditions for _ in range(copies)]
        seeds = one_seed_each(seed, len(conditions))
        known = self._known(known_codes, len(conditions), best_of)
        requests = [
            condition.request(seed=own, sampling=sampling, known_codes=codes, window=window)
            for condition, own, codes in zip(conditions, seeds, known, strict=True)
        ]
        ranking = {} if best_of == 1 else {"best_of": best_of, "rank_by": rank_by}
        batches: list[Tensor] = []
        images: list[Image.Image] = []
        scores: list[Tensor] = []
        arriving: list[Callable[[], list[Image.Image]]] = []
        engine = self._engine_for(requests)
        size = batch_size or engine.batch_size(requests)
        for first in range(0, len(requests), size):
            part = requests[first : first + size]
            on_progress = None if callback is None else _moved(callback, first)
            sampled = engine.generate(part, batch_size=size, on_progress=on_progress)
            batches.append(sampled.cpu())
            if ranking:
                scores.append(score_images(self.transformer, sampled, part, rank_by))
            elif output_type == "pil":
                arriving.append(self.decode_later(batches[-1]))
            # Images are fetched when the next batch has been launched: no GPU waits for that.
            if len(arriving) > 1:
                images += arriving.pop(0)()
        for fetch in arriving:
            images += fetch()
        codes, kept = torch.cat(batches), list(range(len(requests)))
        if ranking:
            kept = best_of_each(torch.cat(scores), best_of)
            codes = codes[kept]
            images = self.decode(codes) if output_type == "pil" else []
        shared = {**ranking, **self.precision, "device": self.device.type}
        return PipelineOutput(
            images=images,
            codes=codes,
            seeds=tuple(seeds[index] for index in kept),
            metadata=tuple(
                {
                    "model": self.name,
                    **conditions[index].metadata,
                    "seed": seeds[index],
                    **dataclasses.asdict(sampling),
                    **shared,
                }
                for index in kept
            ),
        )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise InputError if a prompt says nothing, or names no class of this model."""
        encoder = self.text_encoder
        for prompt in dict.fromkeys(prompts):
            if self.labels is not None:
                self.labels.find(prompt)
            elif encoder is not None:
                encoder.require_text(prompt)

    def conditions(
        self,
        prompts: Prompts | None,
        negative_prompt: Prompts | None = None,
        *,
        blend: Prompts | None = None,
        blend_share: float = 0.5,
    ) -> list[Condition]:
        """Return the condition of each prompt; see ``__call__``.

        Raises:
            InputError: a prompt says nothing, or names no class of this model.
        """
        check_share(blend_share)
        is_class = self.labels is not None
        if prompts is None:
            kind, wanted = ("class", "class names or indices") if is_class else ("text", "a prompt")
            raise InputError(f"{self.name} is {kind}-conditional: give {wanted}")
        each = [prompts] if isinstance(prompts, str | int) else list(prompts)
        if not each:
            what = "class" if is_class else "prompt"
            raise InputError(f"no {what} was given; name at least one")
        negatives = one_each(negative_prompt, len(each), "negative prompts")
        blends = one_each(blend, len(each), "prompts to blend with")
        if self.labels is not None:
            read = class_reader(self.labels)
        elif (encoder := self.text_encoder) is not None:
            read = text_reader(encoder, [*each, *(negatives or ()), *(blends or ())])
        else:
            raise InputError(
                f"{self.name} is conditioned on text features, and comes without a text encoder: "
                f"name one with `text_encoder`, or give prompt_embeds"
            )
        return read_conditions(
            read, each, negative=negatives, blend=blends, blend_share=blend_share
        )

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Decode codes (images, rows, columns) to images."""
        return self.decode_later(codes)()

    def decode_later(self, codes: Tensor) -> Callable[[], list[Image.Image]]:
        """Launch ``decode``; the returned function waits for the images, from any thread."""
        arriving = [
            copy_to_host(images_to_uint8(part).movedim(1, -1))
            for part in self.decode_in_parts(codes)
        ]
        return lambda: [image for wait in arriving for image in arrays_to_pil(wait().numpy())]

    @torch.inference_mode()
    def decode_in_parts(self, codes: Tensor) -> Iterator[Tensor]:
        """Decode codes (images, rows, columns) to images (part, 3, H, W) in [-1, 1], in parts."""
        tokenizer = self.tokenizer
        rows, columns = codes.shape[-2:]
        size = decoding_batch_size(
            tokenizer.config, (rows, columns), device=tokenizer.device, dtype=tokenizer.dtype
        )
        for part in codes.split(size):
            yield tokenizer.decode(part)

    def _engine_for(self, requests: Sequence[GenerationRequest]) -> Engine:
        """Return the engine, once no request has anything wrong with it."""
        if not self.can_edit:
            # Before an engine starts.
            for request in requests:
                refuse_edits(request, self.engine)
        engine = self.code_engine
        for request in requests:
            engine.check(request)
        return engine

    def _refuse_with_embeds(self, *prompts: Prompts | None) -> None:
        """Raise InputError where text features cannot stand for a prompt."""
        if self.labels is not None or any(prompt is not None for prompt in prompts):
            raise InputError(
                "prompt_embeds go with text-conditional models, and with no prompt, "
                "negative_prompt or blend"
            )

    def _known(self, known: Tensor | None, images: int, best_of: int) -> Sequence[Tensor | None]:
        """Known codes of each candidate, (rows, columns)."""
        if known is None:
            return [None] * images
        if known.ndim == 2:
            return [known] * images
        if known.ndim != 3 or len(known) * best_of != images:
            rows, columns = self.transformer.config.grid
            raise InputError(
                f"known_codes have shape {tuple(known.shape)}, expected {(rows, columns)} or "
                f"{(images // best_of, rows, columns)}"
            )
        return list(known.repeat_interleave(best_of, dim=0))


def _engine_class(name: str) -> type[Engine]:
    """Return the engine called ``name``; raise InputError if there is none."""
    if name not in ENGINES:
        raise InputError(f"engine is {name!r}, expected one of {', '.join(ENGINES)}")
    return ENGINES[name]


def _moved(callback: ProgressCallback, first: int) -> ProgressCallback:
    """``callback`` for a batch whose first image is the call's image ``first``."""
    return lambda at: callback(dataclasses.replace(at, first=at.first + first))
