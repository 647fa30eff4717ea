"""The four kinds of handlers that grpc has, by whether request and response are streams: what each
interceptor needs to wrap one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

_NAMES = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


def behaviour_of(handler: Any) -> Callable[..., Any]:
    """Return the function of a handler that answers: (request or requests, context) → response."""
    name = _NAMES[handler.request_streaming, handler.response_streaming]
    behaviour: Callable[..., Any] = getattr(handler, name)
    return behaviour


def maker(*, request_streaming: bool, response_streaming: bool) -> Callable[..., Any]:
    """Return what makes a handler of one kind from a behaviour and how messages are read and
    written.
    """
    name = _NAMES[request_streaming, response_streaming]
    make: Callable[..., Any] = getattr(grpc, f"{name}_rpc_method_handler")
    return make
