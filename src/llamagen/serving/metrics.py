"""What a server tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)


class ServerMetrics:
    """All of them, in a registry of the server's own: several servers can be in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "llamagen_requests",
            "Requests for images, by HTTP status.",
            ["model", "status"],
            registry=registry,
        )
        self.images = Counter(
            "llamagen_images", "Images that were made.", ["model"], registry=registry
        )
        self.codes = Counter(
            "llamagen_codes", "Codes that were drawn.", ["model"], registry=registry
        )
        self.in_flight = Gauge(
            "llamagen_images_in_flight",
            "Images accepted and not yet made.",
            ["model"],
            registry=registry,
        )
        self.waiting = Gauge(
            "llamagen_images_waiting",
            "Images of which no code is drawn yet.",
            ["model"],
            registry=registry,
        )
        self.batch = Histogram(
            "llamagen_batch_images",
            "Images in a step.",
            ["model"],
            buckets=_BATCH,
            registry=registry,
        )
        self.step = Histogram(
            "llamagen_step_seconds",
            "Time of a step: one code of every image.",
            ["model"],
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self.wait = Histogram(
            "llamagen_first_row_seconds",
            "Time from a request to the first row of its first image.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.total = Histogram(
            "llamagen_request_seconds",
            "Time of a whole request.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )

    def stepped(self, model: str, images: int, seconds: float) -> None:
        """Counts a step of the engine; any thread may call it."""
        self.batch.labels(model).observe(images)
        self.step.labels(model).observe(seconds)

    def page(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
