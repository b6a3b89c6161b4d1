"""Limits of a server, with defaults that are safe on a machine of one's own."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Settings that ``llamagen serve`` has flags for."""

    ui: bool = False
    """Also serve a page to try the models, at /."""
    max_queue: int = 64
    """Images that may wait beside those that are drawn; more are answered with 429."""
    max_images: int = 10
    """Images that a request may ask for."""
    timeout: float = 300.0
    """Seconds that a request may take."""
    strict: bool = False
    """Refuse fields, sizes and other values that the API does not know, instead of leaving them out
    with a warning in the answer."""
    file_lifetime: float = 3600.0
    """Seconds that images can be fetched from their URLs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings(ServerOptions):
    """Limits and secrets of ``create_app``."""

    api_key: str | None = None
    """Key that clients must send as "Authorization: Bearer KEY"; None lets everybody in."""
    max_prompt: int = 4000
    """Characters of a prompt."""
    max_body: int = 64 * 1024
    """Bytes of a request's body, where it holds no image."""
    max_upload: int = 16 * 1024 * 1024
    """Bytes of the body of a request that brings an image."""
    max_upload_memory: int = 256 * 1024 * 1024
    """Bytes of all bodies at a time; further requests get a 429."""
    max_upload_pixels: int = 50_000_000
    """Pixels of an image that is sent; unpacked, each takes up to four bytes."""
    max_extension: int = 2
    """How many times the model's own rows or columns an image can be extended by."""
    max_connections: int = 1024
    """Requests that are answered at once, of any kind."""
    file_memory: int = 256 * 1024 * 1024
    """Bytes of all images that can be fetched; the oldest go first."""
