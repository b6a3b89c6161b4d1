"""``llamagen serve``."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from llamagen.cli.options import DeviceOptions, EngineOptions, QuantizationOptions, require_at_least
from llamagen.serving.settings import ServerOptions, ServerSettings
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    from llamagen.generation.engine import Engine
    from llamagen.pipeline import Pipeline
    from llamagen.serving.metrics import ServerMetrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(ServerOptions, EngineOptions, QuantizationOptions, DeviceOptions):
    """Serve models over HTTP, by an API in the form of OpenAI's images endpoint."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(name="model", aliases=["-m"])]
    """Models to serve: names, pipeline folders or hub repositories, each as MODEL or NAME=MODEL,
    where NAME is what clients call it. The first serves requests that name none."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, for which an API key is advised."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    batch_size: int | None = None
    """Images drawn at once. Default: as many as fit into memory; with vLLM what it finds right."""
    drain_timeout: float = 60.0
    """Seconds that requests may take to finish after SIGTERM."""
    api_key_file: Path | None = None
    """File with the key that clients must send. The environment's LLAMAGEN_API_KEY does the same;
    a key on the command line could be read by other users."""
    text_encoder: str | None = None
    """Another text encoder than the models': folder or hub repository."""


def run(options: Serve) -> None:
    """Load the models, then serve until told to end."""
    for name in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"serving needs {name}; install it with pip install 'llamagen[serve]'")
    sources = _sources(options)
    key = _api_key(options)
    require_at_least(1, options, "max_queue", "max_images")
    vllm_options = options.vllm_options()
    from llamagen.pipeline import Pipeline
    from llamagen.serving.api import create_app
    from llamagen.serving.metrics import ServerMetrics
    from llamagen.serving.models import ServedModel
    from llamagen.serving.server import serve

    names = [field.name for field in dataclasses.fields(ServerOptions)]
    settings = ServerSettings(api_key=key, **{name: getattr(options, name) for name in names})
    device, dtype = options.resolve()
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "engine": options.engine}
    metrics = ServerMetrics()
    models = []
    for name, source in sources.items():
        pipeline = Pipeline.from_pretrained(source, text_encoder=options.text_encoder, **loading)
        options.quantize(pipeline)
        # Loaded now, so that the first request neither waits for it nor finds that it is damaged.
        _ = pipeline.text_encoder
        if vllm_options is None:
            engine = _native_engine(name, pipeline, options.batch_size, metrics)
        else:
            engine = _vllm_engine(source, pipeline, options.batch_size, vllm_options)
        in_flight = engine.max_images + options.max_queue
        models.append(ServedModel(name, pipeline, engine, metrics=metrics, max_in_flight=in_flight))
    app = create_app(models, metrics=metrics, settings=settings)
    serve(app, host=options.host, port=options.port, drain_timeout=options.drain_timeout)


def _sources(options: Serve) -> dict[str, str]:
    """Return what to load, by name."""
    if not options.models:
        raise InputError("no model was named; give --model, for example --model emoji")
    sources: dict[str, str] = {}
    for text in options.models:
        name, _, source = text.rpartition("=")
        name = name or Path(source).name
        if name in sources:
            raise InputError(f"two models are called {name}; name one with --model NAME=MODEL")
        sources[name] = source
    return sources


def _api_key(options: Serve) -> str | None:
    if options.api_key_file is None:
        return os.environ.get("LLAMAGEN_API_KEY") or None
    key = options.api_key_file.read_text(encoding="utf-8").strip()
    if not key:
        raise InputError(f"{options.api_key_file} is empty; put the key into it")
    return key


def _native_engine(
    name: str, pipeline: Pipeline, batch_size: int | None, metrics: ServerMetrics
) -> Engine:
    from llamagen.generation.engine import NativeEngine

    engine = NativeEngine(
        pipeline.transformer,
        max_images=batch_size,
        observer=lambda images, _, seconds: metrics.stepped(name, images, seconds),
    )
    engine.start()
    return engine


def _vllm_engine(
    source: str, pipeline: Pipeline, batch_size: int | None, options: dict[str, Any]
) -> Engine:
    from llamagen.vllm_plugin.engine import VllmEngine
    from llamagen.vllm_plugin.export import ExportOptions

    limit = {} if batch_size is None else {"max_num_seqs": batch_size}
    # The file, not the transformer: its weights are then linked to, and not written once more.
    export = ExportOptions(negative_prompts=True)
    return VllmEngine(source, export=export, dtype=pipeline.dtype, **options, **limit)
