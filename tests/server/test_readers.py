"""Callers that read slowly, or not at all, over real sockets: who reads keeps its stream, and who
does not keeps nothing that others need.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from loramux.server.observability.metrics import Metrics
from loramux.server.rpc import boundary, servicers
from loramux.server.rpc.server import start_grpc
from loramux.server.running_calls import Calls
from loramux.v1 import generation_pb2
from tests.server import http2
from tests.server.world import until

GENERATE = "/loramux.v1.GenerationService/Generate"
WINDOW = 65_535
"""Bytes that a server may send before the first word of its client."""
HANDLED = (
    'grpc_server_handled_total{{grpc_code="{}",grpc_method="Generate",'
    'grpc_service="loramux.v1.GenerationService",grpc_type="server_stream"}}'
)


@asynccontextmanager
async def calling(serve, num_tokens: int):
    """A world, its calls and metrics, and a caller of Generate that grants nothing of its own."""
    request = generation_pb2.GenerateRequest(
        text="hi", sampling={"max_tokens": num_tokens, "logprobs": 20}
    )
    async with serve(max_model_len=15_000) as world:
        calls, metrics = Calls(), Metrics(world.engine)
        server = await start_grpc(world.service, "127.0.0.1:0", calls=calls, observer=metrics)
        caller = await http2.connected(server.port)
        following = asyncio.create_task(caller.follow())
        try:
            await caller.call(GENERATE, request.SerializeToString())
            yield world, calls, metrics, caller
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            caller.writer.close()
            await server.stop(0)


async def test_a_caller_that_does_not_read_loses_its_call_in_time(serve, monkeypatch) -> None:
    monkeypatch.setattr(servicers, "STALL_S", 0.5)
    monkeypatch.setattr(boundary, "END_S", 0.2)
    async with calling(serve, 14_000) as (world, calls, metrics, caller):
        await until(lambda: bool(world.engine.running))
        await until(lambda: not world.engine.running and not calls._tasks)
        await until(lambda: f"{HANDLED.format('RESOURCE_EXHAUSTED')} 1.0" in page(metrics))
        assert caller.num_bytes == WINDOW and caller.trailers is None
        caller.grant(1 << 20)  # it reads after all, and learns why there is no more
        await until(lambda: caller.trailers is not None)
        assert b"has not been read for 0.5 s" in caller.trailers
        assert b"grpc-status\x018" in caller.trailers


async def test_a_caller_that_reads_slowly_keeps_its_stream(serve, monkeypatch) -> None:
    """One message in a while, for several times what a stall may last."""
    monkeypatch.setattr(servicers, "STALL_S", 0.5)
    async with calling(serve, 1000) as (_, _, metrics, caller):
        await until(lambda: caller.num_bytes == WINDOW)
        for _ in range(10):
            await asyncio.sleep(0.2)
            caller.grant(2000)
        await until(lambda: caller.num_bytes == WINDOW + 10 * 2000)
        caller.grant(1 << 20)
        await until(lambda: caller.trailers is not None)
        assert b"grpc-status\x010" in caller.trailers
        await until(lambda: f"{HANDLED.format('OK')} 1.0" in page(metrics))


def page(metrics: Metrics) -> str:
    return metrics.render()[0].decode()
