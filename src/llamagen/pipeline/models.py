"""The models of a pipeline: put together, loaded, adapted, moved and saved."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

import llamagen.checkpoints as checkpoints
import llamagen.support.labels as label_files
import llamagen.support.storage as storage
from llamagen.backends import CpuStep, use_reference
from llamagen.backends.cpu.convolution import accelerate
from llamagen.backends.cpu.library import load_kernels
from llamagen.checkpoints.adapters import merge_adapter
from llamagen.config import (
    Grid,
    KVCacheDType,
    Quantization,
    SamplingConfig,
    TextConfig,
    default_sampling,
)
from llamagen.generation.engine import Engine, NativeEngine
from llamagen.models.pretrained import eval_mode
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import Transformer
from llamagen.models.transformer.quantization import quantize, refuse_quantized
from llamagen.support.devices import dtype_name, find_device, find_dtype
from llamagen.support.errors import InputError
from llamagen.support.labels import Labels
from llamagen.support.weights import digest
from llamagen.vllm_plugin.engine import VllmEngine

if TYPE_CHECKING:
    from llamagen.text.encoder import TextEncoder

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (NativeEngine, VllmEngine)}
"""The engines that can generate codes, by name."""


class PipelineModels:
    """An image tokenizer, a transformer over its codes, and its classes or its text encoder."""

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
            tokenizer: decodes the codes.
            transformer: generates them.
            labels: class names; by default the classes are numbered.
            name: the model's name, as images record it.
            sampling: settings for calls that give none.
            text_encoder: of a text-conditional model, or what it is loaded from when it is first
                needed; without it such a model takes ``prompt_embeds`` only.
            engine: "native", this package, or "vllm", which starts with the first image.
            engine_options: of ``vllm_plugin.engine.VllmEngine``, as tensor_parallel_size.

        Raises:
            InputError: the parts do not fit together, or there is no such engine.
        """
        self._engine_class = _engine_class(engine)
        if engine_options and not self._engine_class.copies_model:
            raise InputError("engine_options go with engine 'vllm'")
        codes, config = tokenizer.config.codebook_size, transformer.config
        if codes != config.codebook_size:
            raise InputError(
                f"the tokenizer has {codes} codes but the transformer predicts "
                f"{config.codebook_size}; use the tokenizer that the transformer was trained with"
            )
        if config.condition == "class":
            labels = labels or Labels.numbered(config.num_classes)
            if len(labels) != config.num_classes:
                raise InputError(
                    f"there are {len(labels)} class names but the transformer has "
                    f"{config.num_classes} classes; give one name per class"
                )
        self.tokenizer = accelerate(tokenizer)
        self.transformer = transformer
        self.labels = labels
        self.name = name
        self.sampling = sampling or default_sampling(config)
        self.engine = engine
        self._engine_options = dict(engine_options or {})
        self._code_engine: Engine | None = None
        if config.order == "random" and self._engine_class.copies_model:
            raise InputError(
                f"{name} predicts codes in random order, and {engine} one after another; generate "
                f"with engine 'native'"
            )
        self._text = text_encoder if config.condition == "text" else None

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
            engine_options: see ``Pipeline``.

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
        home = "cpu" if _engine_class(engine).copies_model else where
        transformer = checkpoints.load_transformer(
            found.transformer, grid=grid, device=home, dtype=precision
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
        if isinstance(self._text, TextConfig):
            from llamagen.text.encoder import TextEncoder

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

    @property
    def device(self) -> torch.device:
        """Where the image tokenizer computes, and the transformer unless vLLM does its work."""
        return self.tokenizer.device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's precision."""
        return self.transformer.dtype

    @property
    def computation(self) -> dict[str, str]:
        """What else changes codes, by its rounding, as images record it."""
        kernels = "none"
        with eval_mode(self.transformer):
            used = self.engine == NativeEngine.name and not use_reference()
            if used and CpuStep.supports(self.transformer) and (own := load_kernels()):
                kernels = " ".join(["cpu", *sorted(own.features - {"threads"})])
        found = {"engine": self.engine, "kernels": kernels}
        if isinstance(self._text, nn.Module):
            found["text_encoder_dtype"] = dtype_name(next(self._text.parameters()).dtype)
        return found

    @property
    def precision(self) -> dict[str, str]:
        """Precision as images record it: dtype, and what is quantised."""
        found = {"dtype": dtype_name(self.dtype)}
        if self.transformer.config.quantization is not None:
            found["quantization"] = self.transformer.config.quantization
        if self.transformer.kv_cache_dtype is not None:
            found["kv_cache_dtype"] = "int8"
        return found

    def weight_sample(self) -> str:
        """Return a short text that tells pipelines of other weights apart, by a sample of each."""
        encoder = None if self._text is None else self.text_encoder
        parts = [part for part in (self.tokenizer, self.transformer, encoder) if part is not None]
        # Up to 4096 numbers each: a digest of all would take seconds for the largest models.
        weights = (
            (f"{number}.{name}", weight.flatten()[:: weight.numel() // 4096 + 1].contiguous())
            for number, part in enumerate(parts)
            for name, weight in part.state_dict().items()
        )
        return digest("", weights)

    def fingerprints(self) -> dict[str, str]:
        """Return a short text for each model, the text encoder included, that tells its weights."""
        names = ("transformer", "tokenizer", "text_encoder")
        models = {name: getattr(self, name) for name in names}
        return {name: model.fingerprint() for name, model in models.items() if model is not None}

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
        names, classes = Path(folder) / label_files.FILE_NAME, self.transformer.config.num_classes
        if names.is_file():
            self.labels = Labels.load(names)
        elif self.labels is not None and len(self.labels) != classes:
            self.labels = Labels.numbered(classes)
        return self

    def quantize(
        self,
        quantization: Quantization | None = None,
        *,
        kv_cache_dtype: KVCacheDType | None = None,
    ) -> Self:
        """Store weights or the KV cache in int8, which is faster to read; return the pipeline.

        Args:
            quantization: of the transformer's weights, which are then saved so: "int8", hardly
                different from bfloat16. None leaves them as they are.
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

    def to(
        self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
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
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "pipeline"
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def _engine_class(name: str) -> type[Engine]:
    """Return the engine called ``name``; raise InputError if there is none."""
    if name not in ENGINES:
        raise InputError(f"engine is {name!r}, expected one of {', '.join(ENGINES)}")
    return ENGINES[name]
