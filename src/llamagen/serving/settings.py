"""Limits of a server, with defaults that are safe on a machine of one's own."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and secrets of ``create_app``."""

    api_key: str | None = None
    """What clients must send as "Authorization: Bearer KEY"; None lets everybody in."""
    max_queue: int = 64
    """Images that may wait beside those that are being drawn; further requests get a 429."""
    max_images: int = 10
    """Images of one request (n)."""
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
    timeout: float = 300.0
    """Seconds that a request may take."""
    file_lifetime: float = 3600.0
    """Seconds that an image can be fetched from its URL."""
    file_memory: int = 256 * 1024 * 1024
    """Bytes of all images that can be fetched; the oldest go first."""
    ui: bool = False
    """Serve the page at /."""
