"""Whatever one request holds, those of others go on: how long the event loop stands still while the
largest bodies and messages come, over real sockets.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import Awaitable, Callable

import grpc
import pytest

from loramux.v1 import generation_pb2
from tests.server.http_api import serving_http

MAX_PAUSE_S = 0.05
MAX_TRIES = 20
MB = 1 << 20


async def pause_during(call: Callable[[], Awaitable[None]]) -> float:
    """The longest time in which nothing else ran during a call: of several tries the shortest,
    since a busy machine makes them longer and never shorter.
    """
    shortest = math.inf
    for _ in range(MAX_TRIES):
        calling = asyncio.ensure_future(call())
        longest, last = 0.0, time.monotonic()
        while not calling.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        calling.result()
        shortest = min(shortest, longest)
        if shortest < MAX_PAUSE_S:
            break
    return shortest


def list_of(item: str) -> str:
    """As many of an item as a body has room for."""
    return f"[{','.join([item] * min(2_000_000, 7 * MB // (len(item) + 1)))}]"


def pairs_of(value: str) -> str:
    return ",".join(f'"{index}":{value}' for index in range(500_000))


TURN = '{"role":"user","content":"hi"}'
BODIES = {
    "numbers": ("/v1/completions", f'"prompt":{list_of("7")}', 400),
    "fractions": ("/v1/completions", f'"prompt":{list_of("0.5")}', 400),
    "nothing": ("/v1/completions", f'"prompt":{list_of("null")}', 400),
    "lists": ("/v1/completions", f'"prompt":{list_of("[]")}', 400),
    "objects": ("/v1/completions", f'"prompt":{list_of("{}")}', 400),
    "texts": ("/v1/completions", f'"prompt":"a","stop":{list_of(json.dumps("a"))}', 400),
    "biases": ("/v1/completions", f'"prompt":"a","logit_bias":{{{pairs_of("1")}}}', 400),
    "a text of quotes": ("/v1/completions", f'"prompt":{json.dumps(chr(34) * 3 * MB)}', 400),
    "a text": ("/v1/completions", f'"prompt":"{"x" * 7 * MB}"', 400),
    "just as many numbers as are read": (
        "/v1/completions", f'"prompt":[{",".join(["49152"] * 1_000_000)}]', 400
    ),
    "just as many texts": (
        "/v1/completions", f'"prompt":[{",".join([json.dumps("a")] * 130_000)}]', 400
    ),
    "just as many turns": (
        "/v1/chat/completions", f'"messages":[{",".join([TURN] * 16_000)}]', 400
    ),
    "a batch of prompts": (
        "/v1/completions",
        f'"prompt":[{",".join(["[" + ",".join(["70"] * 8000) + "]"] * 100)}],"max_tokens":1', 200
    ),
    "ids": ("/detokenize", f'"tokens":[{",     ".join(["70"] * 14_000)}]', 200),
}  # fmt: skip


def post(port: int, path: str, content: bytes) -> int:
    """The status of an answer, with little use of the interpreter."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + content)
        return int(connection.recv(100).split()[1])


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_of_any_kind_holds_up_nobody(serve, name) -> None:
    path, fields, status = BODIES[name]
    content = f'{{"model":"tiny",{fields}}}'.encode()
    async with serve(max_model_len=100_000) as world, serving_http(world.service) as api:

        async def call() -> None:
            assert await asyncio.to_thread(post, api.port, path, content) == status

        assert await pause_during(call) < MAX_PAUSE_S


def generate_of(**fields) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(**fields)


def with_sampling(**fields) -> generation_pb2.GenerateRequest:
    return generate_of(text="a", sampling=fields)


MESSAGES = {
    "ids": lambda: generate_of(token_ids={"ids": [5] * 7 * MB}),
    "ids of a million": lambda: generate_of(token_ids={"ids": [40_000] * MB}),
    "stops": lambda: with_sampling(stop=[""] * 3 * MB),
    "stop ids": lambda: with_sampling(stop_token_ids=[5] * 7 * MB),
    "biases": lambda: with_sampling(logit_bias={i: 1.0 for i in range(500_000)}),
    "turns": lambda: generate_of(messages={"messages": [{}] * 2 * MB}),
    "just as many turns": lambda: generate_of(
        messages={"messages": [{"role": "user", "content": "hi"}] * 16_000}
    ),
    "adapters": lambda: generate_of(text="a", adapters=[{}] * 2 * MB),
    "choices": lambda: with_sampling(structured_output={"choice": {"texts": [""] * 3 * MB}}),
    "a text": lambda: generate_of(text="x" * 7 * MB),
}


@pytest.mark.parametrize("name", MESSAGES)
async def test_a_message_of_any_kind_holds_up_nobody(serve, name) -> None:
    message = MESSAGES[name]().SerializeToString()
    async with (
        serve(max_model_len=100_000) as world,
        grpc.aio.insecure_channel(world.target) as channel,
    ):
        method = channel.unary_stream("/loramux.v1.GenerationService/Generate")

        async def call() -> None:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in method(message):
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

        assert await pause_during(call) < MAX_PAUSE_S
