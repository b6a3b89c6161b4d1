"""A real server in this process, for tests: uvicorn in a thread, on a free port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from llamagen.generation.engine import NativeEngine
from llamagen.pipeline import Pipeline
from llamagen.serving.api import create_app
from llamagen.serving.metrics import ServerMetrics
from llamagen.serving.models import ServedModel
from llamagen.serving.settings import ServerSettings


@dataclass
class Running:
    """A server that runs."""

    url: str
    app: FastAPI
    models: dict[str, ServedModel]


def slow_down(model: ServedModel, seconds: float) -> None:
    """Makes every step of a model's engine take at least so long."""
    batch = model.engine._batch
    step = batch.step

    def slow() -> None:
        time.sleep(seconds)
        step()

    batch.step = slow


@contextmanager
def running(
    pipelines: dict[str, Pipeline],
    *,
    max_images: int = 8,
    settings: ServerSettings | None = None,
) -> Iterator[Running]:
    """Serves the pipelines by their names."""
    settings = settings or ServerSettings()
    metrics = ServerMetrics()
    models = {}
    for name, pipe in pipelines.items():
        engine = NativeEngine(pipe.transformer, max_images=max_images)
        engine.start()
        models[name] = ServedModel(
            name, pipe, engine, metrics=metrics, max_in_flight=max_images + settings.max_queue
        )
    app = create_app(list(models.values()), metrics=metrics, settings=settings)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app, models)
    finally:
        server.should_exit = True
        thread.join()
