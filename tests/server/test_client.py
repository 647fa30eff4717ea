"""The Python clients: typed errors, early ends, and what they refuse to send."""

from __future__ import annotations

from concurrent.futures import CancelledError

import pytest

from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterSourceRefused,
    InvalidRequest,
    Unavailable,
)
from loramux.server.client import AsyncClient, Client
from loramux.v1 import types_pb2
from tests.server.world import in_thread, until


async def test_the_blocking_client_does_everything(serve) -> None:
    def use(client: Client) -> None:
        client.wait_ready(5)
        assert client.is_serving()
        assert client.generate("abc", max_tokens=4).text() == "abca"
        kinds = [event.WhichOneof("event") for event in client.generate("abc", max_tokens=2)]
        assert kinds == ["started", "delta", "delta", "finished"]
        assert client.tokenize("ab") == [97, 98]
        assert client.load_adapter("x", "x").adapter.name == "x"
        assert [info.name for info in client.list_adapters()] == ["x"]
        assert client.get_adapter("x").num_bytes == 200
        assert client.server_info().base.name == "tiny"
        assert client.unload_adapter("x", wait=True).name == "x"
        assert client.list_adapters() == []

    async with serve() as world:
        world.write_adapter("x", "a")
        await in_thread(world, use)


async def test_errors_come_back_as_the_class_that_was_raised_with_its_field(serve) -> None:
    def use(client: Client) -> None:
        client.load_adapter("x", "x")
        for kind, field, call in (
            (AdapterNotFound, "adapters[0].name", lambda: client.generate("a", adapter="y").text()),
            (AdapterNotFound, "name", lambda: client.unload_adapter("y")),
            (AdapterExists, "name", lambda: client.load_adapter("x", "other")),
            (AdapterSourceRefused, "source", lambda: client.load_adapter("z", "/etc")),
            (InvalidRequest, "text", lambda: client.tokenize("")),
            (
                AdapterNotFound,
                "adapters[1].name",
                lambda: client.generate("a", adapters={"x": 1, "y": 1}).text(),
            ),
            (
                InvalidRequest,
                "adapters[0].weight",
                lambda: client.generate("a", adapters={"x": float("inf")}).text(),
            ),
            (InvalidRequest, "sampling.n", lambda: client.generate("a", n=129).text()),
            (TimeoutError, None, lambda: client.generate("a" * 200, timeout_s=1e-6).text()),
        ):
            with pytest.raises(kind) as caught:
                call()
            assert type(caught.value) is kind
            assert getattr(caught.value, "field", None) == field

    async with serve() as world:
        world.write_adapter("x", "a")
        world.write_adapter("other", "b")
        await in_thread(world, use)


async def test_leaving_a_stream_early_frees_its_row(serve) -> None:
    def use(client: Client) -> None:
        for event in client.generate("abc", max_tokens=400):
            if event.HasField("delta"):
                break

    async with serve() as world:
        await in_thread(world, use)
        await until(lambda: not world.engine.running)
        stream = world.client.generate("abc", max_tokens=400)
        async for _ in stream:
            break
        stream.cancel()
        await until(lambda: not world.engine.running)


async def test_cancel_from_elsewhere(serve) -> None:
    def use(client: Client) -> None:
        stream = client.generate("abc", max_tokens=400)
        stream.cancel()
        with pytest.raises(CancelledError):
            stream.text()

    async with serve() as world:
        await in_thread(world, use)
        await until(lambda: not world.engine.running)


async def test_nobody_there() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        assert not await client.is_serving()
        with pytest.raises(Unavailable):
            await client.tokenize("a")
        with pytest.raises(Unavailable, match="not ready after 0.2"):
            await client.wait_ready(0.2)


async def test_what_cannot_be_sent_is_refused_here(serve) -> None:
    async with serve() as world:
        for bad in ({"max_tokens": -1}, {"temperature": "hot"}, {"no_such_field": 1}):
            with pytest.raises(InvalidRequest):
                world.client.generate("a", **bad)
        for bad, field in (
            ({"token_ids": [1]}, "input"),
            ({"adapter": "x", "adapters": {}}, "adapters"),
            ({"adapters": {"x": "much"}}, None),
        ):
            with pytest.raises(InvalidRequest) as caught:
                world.client.generate("a", **bad)
            assert caught.value.field == field


async def test_several_adapters_and_their_weights_and_none(serve) -> None:
    async with serve() as world:
        await world.load("x", "a")
        await world.load("y", "b")
        assert await world.client.generate("q", adapters={}, max_tokens=2).text() == "qq"
        assert await world.client.generate("q", adapters={"y": 0.25}, max_tokens=2).text() == "bb"
        mixed = world.client.generate("q", adapters={"y": 3, "x": -1.5}, max_tokens=2)
        assert await mixed.text() == "ab"
        uses = [{u.digest[0]: u.weight for u in seen.adapters} for seen in world.engine.seen]
    assert uses == [{}, {"b": 0.25}, {"b": 3, "a": -1.5}]


async def test_one_stop_string_needs_no_list(serve) -> None:
    async with serve() as world:
        events = [event async for event in world.client.generate("abcdef", stop="cd")]
    assert "".join(event.delta.text for event in events) == "ab"
    assert events[-1].finished.finish_reason == types_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("max_new_tokens", "did you mean 'max_tokens'?"),
        ("adaptr", "did you mean 'adapter'?"),
        ("prompt", "valid are .*messages, .*text"),
    ],
)
async def test_an_option_that_is_none_is_named_with_the_nearest(option: str, expected: str) -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(InvalidRequest, match=f"{option} is no option of a request; {expected}"),
    ):
        client.generate("Hi", **{option: "x"})


@pytest.mark.parametrize(
    "options",
    [{"temperature": "hot"}, {"max_tokens": 1.5}, {"seed": -(2**70)}, {"stop_token_ids": ["x"]}],
)
async def test_a_value_that_cannot_be_sent_is_refused_by_its_name(options) -> None:
    (name,) = options
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match=name) as caught:
        client.generate("Hi", top_p=0.5, **options)
    assert caught.value.field == f"sampling.{name}"


@pytest.mark.parametrize("target", ["localhost", "7110", "http://127.0.0.1:7110", "[::1]"])
async def test_an_address_without_a_port_is_refused(target: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidRequest, match="must be host:port") as caught:
            kind(target)
        assert repr(target) in str(caught.value)


@pytest.mark.parametrize("target", ["localhost:1", "[::1]:1", "unix:here", "dns:///somewhere"])
def test_what_grpc_can_dial_is_taken(target: str) -> None:
    Client(target).close()
