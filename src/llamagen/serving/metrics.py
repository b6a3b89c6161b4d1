"""Metrics of a server, for Prometheus."""

from __future__ import annotations

from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

_Metric = TypeVar("_Metric", bound=MetricWrapperBase)

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)


class ServerMetrics:
    """All metrics, in a registry of the server's own: a process may have several servers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def new(kind: type[_Metric], name: str, text: str, *labels: str, **more: Any) -> _Metric:
            labels = ("model", *labels)
            return kind(f"llamagen_{name}", text, labels, registry=self.registry, **more)

        self.requests = new(Counter, "requests", "Requests for images, by HTTP status.", "status")
        self.images = new(Counter, "images", "Images that were made.")
        self.codes = new(Counter, "codes", "Codes that were drawn.")
        self.in_flight = new(Gauge, "images_in_flight", "Images accepted and not yet made.")
        self.waiting = new(Gauge, "images_waiting", "Images of which no code is drawn yet.")
        self.batch = new(Histogram, "batch_images", "Images in a step.", buckets=_BATCH)
        text = "Time of a step: one code of every image."
        self.step = new(Histogram, "step_seconds", text, buckets=_STEP_SECONDS)
        text = "Time from a request to the first row of its first image."
        self.wait = new(Histogram, "first_row_seconds", text, buckets=_SECONDS)
        self.total = new(Histogram, "request_seconds", "Time of a whole request.", buckets=_SECONDS)

    def stepped(self, model: str, images: int, seconds: float) -> None:
        """Count a step of the engine; any thread may call it."""
        self.batch.labels(model).observe(images)
        self.step.labels(model).observe(seconds)
