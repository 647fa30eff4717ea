"""Errors on the wire and back: one table from exception class to gRPC code and reason, and to the
HTTP status, type and code of OpenAI's API.

A reason belongs to exactly one class, so a client gets back the class that was raised. Messages
of errors that are the server's own fault are logged and withheld.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

import grpc
import structlog
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lora_runtime import errors

DOMAIN = "loramux"
ADAPTER_RESOURCE = "loramux.v1.Adapter"
RETRY_AFTER_S = 1.0
"""Where nothing better is known."""
LOADING_RETRY_S = 5
"""Of a server that loads: after two tries a second apart clients of OpenAI's API would give up."""
MAX_ERROR_BYTES = 1024
"""Details travel in HTTP/2 trailers, of which peers take about 8 KB, and hold the text thrice."""
MAX_FIELD_LENGTH = 200
INTERNAL_MESSAGE = "internal error; the server's log has it"

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WireError:
    """How one exception class looks to clients."""

    code: grpc.StatusCode
    reason: str
    http_status: int


_Code = grpc.StatusCode

WIRE_ERRORS: Mapping[type[errors.LoramuxError], WireError] = MappingProxyType(
    {
        errors.LoramuxError: WireError(_Code.INTERNAL, "INTERNAL", 500),
        errors.InvalidRequest: WireError(_Code.INVALID_ARGUMENT, "INVALID_REQUEST", 400),
        errors.UnsupportedFeature: WireError(_Code.UNIMPLEMENTED, "UNSUPPORTED_FEATURE", 400),
        errors.PromptTooLong: WireError(_Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG", 400),
        errors.ConfigError: WireError(_Code.INTERNAL, "CONFIG_ERROR", 500),
        errors.BaseRefused: WireError(_Code.INTERNAL, "BASE_REFUSED", 500),
        errors.DataError: WireError(_Code.INTERNAL, "DATA_ERROR", 500),
        errors.AdapterError: WireError(_Code.FAILED_PRECONDITION, "ADAPTER_ERROR", 409),
        errors.AdapterNotFound: WireError(_Code.NOT_FOUND, "ADAPTER_NOT_FOUND", 404),
        errors.AdapterExists: WireError(_Code.ALREADY_EXISTS, "ADAPTER_EXISTS", 409),
        errors.AdapterInUse: WireError(_Code.FAILED_PRECONDITION, "ADAPTER_IN_USE", 409),
        errors.AdapterRefused: WireError(_Code.INVALID_ARGUMENT, "ADAPTER_REFUSED", 400),
        errors.AdapterSourceRefused: WireError(
            _Code.INVALID_ARGUMENT, "ADAPTER_SOURCE_REFUSED", 400
        ),
        errors.BaseMismatch: WireError(_Code.FAILED_PRECONDITION, "BASE_MISMATCH", 400),
        errors.ParityFailed: WireError(_Code.FAILED_PRECONDITION, "PARITY_FAILED", 400),
        errors.AdapterTooLarge: WireError(_Code.FAILED_PRECONDITION, "ADAPTER_TOO_LARGE", 400),
        errors.AdapterFailed: WireError(_Code.FAILED_PRECONDITION, "ADAPTER_FAILED", 422),
        errors.Unauthenticated: WireError(_Code.UNAUTHENTICATED, "UNAUTHENTICATED", 401),
        errors.PermissionDenied: WireError(_Code.PERMISSION_DENIED, "PERMISSION_DENIED", 403),
        errors.RequestFailed: WireError(_Code.INTERNAL, "REQUEST_FAILED", 500),
        errors.Overloaded: WireError(_Code.RESOURCE_EXHAUSTED, "OVERLOADED", 429),
        errors.QuotaUsed: WireError(_Code.RESOURCE_EXHAUSTED, "QUOTA_USED", 429),
        errors.Unavailable: WireError(_Code.UNAVAILABLE, "UNAVAILABLE", 503),
    }
)

_CLASSES = {wire.reason: kind for kind, wire in WIRE_ERRORS.items()}
_UNEXPLAINED: Mapping[grpc.StatusCode, type[Exception]] = {
    _Code.UNAVAILABLE: errors.Unavailable,
    _Code.DEADLINE_EXCEEDED: TimeoutError,
    _Code.CANCELLED: errors.Unavailable,  # a server that stops cancels what reaches it meanwhile
    _Code.RESOURCE_EXHAUSTED: errors.Overloaded,
}
"""Status code → exception, for a status without our details, which the transport made."""
_CANCELLED_HERE = ("Locally cancelled by application!", "Channel closed!")
"""grpc's messages for a call that its own caller ended."""


def wire_error(error: BaseException) -> WireError:
    """Return how an exception looks to clients; unknown ones are INTERNAL."""
    known = (WIRE_ERRORS[kind] for kind in type(error).__mro__ if kind in WIRE_ERRORS)
    return next(known, WIRE_ERRORS[errors.LoramuxError])


def public_message(error: BaseException) -> str:
    """Return what a client may read of an error; log and withhold the server's own faults."""
    if not isinstance(error, errors.LoramuxError) or wire_error(error).code is _Code.INTERNAL:
        logger.error("request failed", exc_info=error)
        return INTERNAL_MESSAGE
    return error.message.encode()[:MAX_ERROR_BYTES].decode(errors="ignore")


def rich_status(error: BaseException) -> status_pb2.Status:
    """Return the google.rpc.Status of an error, details included."""
    wire, message = wire_error(error), public_message(error)
    field = (getattr(error, "field", None) or "")[:MAX_FIELD_LENGTH]
    status = status_pb2.Status(code=wire.code.value[0], message=message)
    retry_after_s = getattr(error, "retry_after_s", None) or RETRY_AFTER_S
    for detail in _details(wire, message, field, retry_after_s):
        status.details.add().Pack(detail)
    return status


def http_error(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status of an error and the body that OpenAI's API has for it.

    A field of our own calls is named as HTTP has it: `max_tokens` for `sampling.max_tokens`.
    """
    wire, message = wire_error(error), public_message(error)
    field = (getattr(error, "field", None) or "")[:MAX_FIELD_LENGTH]
    param = _HTTP_FIELDS.get(field) or field.removeprefix("sampling.").removeprefix("messages.")
    if field != param and message.startswith(field):
        message = param + message[len(field) :]
    if isinstance(error, errors.AdapterExists):
        message = message.replace("with replace", "with load_inplace")
    is_servers = wire.http_status >= 500
    kind = _HTTP_TYPES.get(
        wire.http_status, "server_error" if is_servers else "invalid_request_error"
    )
    code = _HTTP_CODES.get(wire.reason, wire.reason.lower())
    body = {"message": message, "type": kind, "param": param or None, "code": code}
    return wire.http_status, {"error": body}


_HTTP_FIELDS = {
    "token_ids": "prompt",
    "text": "prompt",
    "name": "lora_name",
    "source": "lora_path",
    "messages.template_variables": "chat_template_kwargs",
}
_HTTP_TYPES = {429: "rate_limit_error"}
_HTTP_CODES = {
    "ADAPTER_NOT_FOUND": "model_not_found",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "QUOTA_USED": "rate_limit_exceeded",
    "UNAUTHENTICATED": "invalid_api_key",
}
"""Where OpenAI has a code of its own, by which clients tell what to do."""


def grpc_status(error: BaseException) -> grpc.Status:
    """Return what a gRPC servicer aborts with."""
    return rpc_status.to_status(rich_status(error))


_UNREACHABLE = re.compile(r"failed to connect to all addresses.*ipv[46]:(\S+): (.*)")
"""grpc's message where nobody listens, or no connection comes about."""
_MAY_BE_TLS = re.compile("handshake|verification|socket closed|reset by peer", re.IGNORECASE)
"""Of its reasons those that one side without TLS has, or a certificate that does not fit."""


def from_rpc_error(error: grpc.RpcError) -> Exception:
    """Return the exception a server raised, with its field and when to try again.

    TimeoutError stands for a deadline that passed, CancelledError for a call that was ended here.
    """
    code, text = error.code(), error.details() or error.code().name
    status = rpc_status.from_call(error)
    details = status.details if status else ()
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    delays = [retry.retry_delay.ToMilliseconds() for each in details if each.Unpack(retry)]
    retry_after_s = delays[0] / 1000 if delays else None
    for detail in details:
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in _CLASSES:
            field = info.metadata.get("field")
            return _CLASSES[info.reason](text, field=field, retry_after_s=retry_after_s)
    if code is _Code.UNAVAILABLE and (address := _UNREACHABLE.search(text)):
        return errors.Unavailable(_unreachable(unquote(address[1]), address[2]))
    if text in _CANCELLED_HERE:
        return CancelledError(text)
    if code is _Code.RESOURCE_EXHAUSTED and "larger than max" in text:
        return errors.InvalidRequest(f"the message was not sent: {text}")
    return _UNEXPLAINED.get(code, errors.LoramuxError)(text)


def _unreachable(address: str, reason: str) -> str:
    if _MAY_BE_TLS.search(reason):
        return (
            f"no connection with the server at {address}; if it has TLS, connect by TLS, with its "
            f"roots and under a name of its certificate (--tls-ca or --tls, in Python "
            f"tls_credentials), and else without: {reason}"
        )
    advice = "is it running, and has it loaded its base? `loramux serve`"
    return f"no server at {address} ({advice}): {reason}"


def _details(wire: WireError, message: str, field: str, retry_after_s: float) -> Iterator[Message]:
    metadata = {"field": field} if field else {}
    yield error_details_pb2.ErrorInfo(reason=wire.reason, domain=DOMAIN, metadata=metadata)
    if field and wire.code in (_Code.INVALID_ARGUMENT, _Code.UNIMPLEMENTED):
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        yield error_details_pb2.BadRequest(field_violations=[violation])
    if wire.code is _Code.NOT_FOUND:
        yield error_details_pb2.ResourceInfo(resource_type=ADAPTER_RESOURCE, description=message)
    if wire.code in (_Code.RESOURCE_EXHAUSTED, _Code.UNAVAILABLE):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(1000 * retry_after_s))
        yield retry
