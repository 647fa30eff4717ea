"""One table from exception class to wire, complete and reversible."""

from __future__ import annotations

import grpc
import pytest
import structlog
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details

from lora_runtime import errors
from loramux.server.errors import (
    INTERNAL_MESSAGE,
    MAX_ERROR_BYTES,
    WIRE_ERRORS,
    from_rpc_error,
    rich_status,
    wire_error,
)


def all_classes() -> list[type[errors.LoramuxError]]:
    found, queue = [], [errors.LoramuxError]
    while queue:
        found.append(queue.pop())
        queue += found[-1].__subclasses__()
    return [kind for kind in found if kind.__module__ == errors.__name__]


def unpack(error: BaseException, kind: type[Message]) -> Message | None:
    message = kind()
    return next((message for d in rich_status(error).details if d.Unpack(message)), None)


def test_every_class_has_a_row_and_every_reason_one_class() -> None:
    assert set(WIRE_ERRORS) == set(all_classes())
    assert len({wire.reason for wire in WIRE_ERRORS.values()}) == len(WIRE_ERRORS)


@pytest.mark.parametrize("kind", all_classes(), ids=lambda kind: kind.__name__)
def test_reason_and_field_travel(kind: type[errors.LoramuxError]) -> None:
    info = unpack(kind("why", field="some.field"), details.ErrorInfo)
    assert (info.reason, info.domain) == (WIRE_ERRORS[kind].reason, "loramux")
    assert info.metadata == {"field": "some.field"}


@pytest.mark.parametrize("kind", [errors.InvalidRequest, errors.AdapterSourceRefused])
def test_bad_requests_name_the_field(kind: type[errors.LoramuxError]) -> None:
    violations = unpack(kind("why", field="source"), details.BadRequest).field_violations
    assert [(v.field, v.description) for v in violations] == [("source", "why")]
    assert unpack(kind("why"), details.BadRequest) is None


def test_overload_says_when_to_retry_and_not_found_what() -> None:
    assert unpack(errors.Overloaded("full"), details.RetryInfo).retry_delay.seconds >= 1
    resource = unpack(errors.AdapterNotFound("gone"), details.ResourceInfo)
    assert resource.resource_type == "loramux.v1.Adapter"
    assert unpack(errors.InvalidRequest("no"), details.RetryInfo) is None


@pytest.mark.parametrize(
    "error",
    [OSError(5, "I/O", "/srv/secret"), errors.ConfigError("/srv/secret"), KeyError("/srv/secret")],
    ids=repr,
)
def test_the_servers_own_faults_are_logged_and_withheld(error: Exception) -> None:
    with structlog.testing.capture_logs() as logs:
        status = rich_status(error)
    assert status.message == INTERNAL_MESSAGE
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert b"secret" not in status.SerializeToString()
    assert [log["log_level"] for log in logs] == ["error"]


def test_an_unknown_subclass_is_its_parents_kind() -> None:
    class Special(errors.AdapterNotFound):
        pass

    assert wire_error(Special("gone")) is WIRE_ERRORS[errors.AdapterNotFound]


@pytest.mark.parametrize("text", ["x" * 9000, "\N{SNOWMAN}" * 9000])
def test_a_long_message_fits_into_trailers(text: str) -> None:
    status = rich_status(errors.InvalidRequest(text, field="f" * 9000))
    assert len(status.message.encode()) <= MAX_ERROR_BYTES
    assert status.message == text[: len(status.message)]
    assert len(status.SerializeToString()) < 4096


def test_a_call_that_a_stopping_server_cancels_was_not_cancelled_by_its_caller() -> None:
    """grpc cancels what reaches a server between its stop and its last connection's end."""
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), details="CANCELLED"
    )
    assert isinstance(from_rpc_error(error), errors.Unavailable)
