"""One connection of the HTTP port: who holds it without using it loses it."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from loramux.server.access.http_gate import CERTIFICATE
from loramux.server.access.tls import certificate_names

HEAD_S = 20.0
"""Seconds that a request's head may take, from the connection's beginning or the last answer. A
body has a limit of its own; what remains of one that was refused has this one.
"""
STALL_S = 120.0
"""Seconds in which a client must have read some of what waits for it."""


class HttpConnection(H11Protocol):
    """HTTP/1.1 with bounds on time, whose requests know the names in the certificate that their
    client showed. Anybody may open connections, and each is a file of the process.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _num_unread = 0
    """Bytes that waited for the client when it was last seen to read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Keep the names in the state that each request of the connection begins with."""
        super().connection_made(transport)
        names = certificate_names(transport.get_extra_info("peercert"))
        self.app_state = {**self.app_state, CERTIFICATE: names}
        self._follow_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._head_timer = _stopped(self._head_timer)
        self._stall_timer = _stopped(self._stall_timer)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Look whether a request has begun."""
        super().handle_events()
        self._follow_head()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._follow_head()

    def pause_writing(self) -> None:
        """Give the client STALL_S to read, again and again as long as it does."""
        super().pause_writing()
        if self._stall_timer is None:
            self._follow_reader()

    def resume_writing(self) -> None:
        """It has read."""
        self._stall_timer = _stopped(self._stall_timer)
        super().resume_writing()

    def _follow_reader(self) -> None:
        self._num_unread = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALL_S, self._end_if_stalled)

    def _end_if_stalled(self) -> None:
        if self.transport.get_write_buffer_size() < self._num_unread:
            self._follow_reader()
        else:
            self.transport.abort()

    def _follow_head(self) -> None:
        """The clock runs while no request is being answered, whatever comes meanwhile."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or self.transport.is_closing():
            self._head_timer = _stopped(self._head_timer)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
