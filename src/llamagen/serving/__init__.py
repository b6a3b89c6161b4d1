"""Models behind an HTTP API: the engine that draws, the API, the page to try it."""
