"""The server of a process, with a graceful end."""

from __future__ import annotations

import logging
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from llamagen.support.errors import InputError

_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A server that finishes what runs, and refuses what is new, on a first SIGTERM or interrupt.

    uvicorn closes its socket and waits for the requests that it has; connections that stay open
    get a 503 meanwhile, and ``/ready`` tells load balancers. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._gate = app.state.gate

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Handle a signal. Unlike uvicorn's own, it leaves the exit status at 0."""
        if self.should_exit:
            self.force_exit = True
        else:
            _log.warning("%s: finishing what runs", signal.Signals(sig).name)
        self._gate.draining = self.should_exit = True


def serve(app: FastAPI, *, host: str, port: int, drain_timeout: float) -> None:
    """Serve until a signal ends it; return when everything that ran is finished.

    Port 0 takes a free one, which is printed. Requests may take ``drain_timeout`` seconds to finish
    after the signal. An address that cannot be listened on is an InputError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot listen on {host} port {port} ({error}); choose another with `host` or `port`"
        ) from error
    config = uvicorn.Config(
        app,
        log_level="info",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(drain_timeout),
        timeout_keep_alive=30,
    )
    address, chosen = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"llamagen serves at http://{shown}:{chosen}", flush=True)
    Server(config, app).run(sockets=[listener])
