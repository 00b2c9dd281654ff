"""Connections' manners, which uvicorn leaves open: nobody may keep one for nothing, and there are only so many."""

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # a peer that has vanished is noticed in two minutes
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 105\r\n\r\n"
    b'{"error": {"message": "too many connections", "type": "server_error", "param": null, "code": "too_many"}}'
)


@dataclass(frozen=True)
class Limits:
    """What connections may take.

    Attributes:
        most: How many may be open; others get a 503.
        headers_s: Seconds from a connection's beginning, or a request's first byte, to the end of its headers.
        stalled_s: Seconds that a reader may leave its full buffer unread.
    """

    most: int = 8192
    headers_s: float = 20.0
    stalled_s: float = 60.0


class Connection(H11Protocol):
    """uvicorn's protocol with `Limits`, and TCP's own way to notice peers that have vanished."""

    def __init__(self, *args: Any, limits: Limits, **settings: Any):
        super().__init__(*args, **settings)
        self._limits = limits
        self._headers_due: asyncio.TimerHandle | None = None
        self._read_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self._limits.most:
            transport.write(_FULL)
            transport.close()
            self.transport = transport
            return
        super().connection_made(transport)
        connected = transport.get_extra_info("socket")
        if connected is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        if self.flow is not None:  # or it was one too many
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.flow is None:
            return
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # headers are complete
            self._cancel_headers()
        elif self._headers_due is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_headers()  # of the next request

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_due = self.loop.call_later(self._limits.stalled_s, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_due is not None:
            self._read_due.cancel()
            self._read_due = None

    def _expect_headers(self) -> None:
        self._headers_due = self.loop.call_later(self._limits.headers_s, self._abort)

    def _abort(self) -> None:
        """Close at once: what is unread stays unread."""
        self.transport.abort()

    def _cancel_headers(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _cancel(self) -> None:
        self._cancel_headers()
        if self._read_due is not None:
            self._read_due.cancel()
            self._read_due = None
