"""Spans of real requests: attributes, times, parents; a collector's faults; the log's lines."""

from __future__ import annotations

import asyncio
import builtins
import io
import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lora_runtime.errors import AdapterNotFound, ConfigError, RequestFailed
from loramux.server.logs import setup_logging
from loramux.server.observability.request_log import RequestLog
from loramux.server.observability.tracing import CLOSE_S, STANDARD_VARIABLES, Tracing, span_exporter
from loramux.v1 import generation_pb2
from tests.server.test_app import LocalEngine, running
from tests.server.test_observed_calls import TRACEPARENT
from tests.server.world import stubs_of, until
from tests.tiny_tokenizer import write_tokenizer

SECRET = "the secret prompt"


@pytest.fixture(autouse=True)
def no_standard_variables(monkeypatch):
    for name in STANDARD_VARIABLES:
        monkeypatch.delenv(name, raising=False)


async def generate(client, text=SECRET, **options):
    return [response async for response in client.generate(text, **options)]


class Watched:
    """Spans as an exporter gets them, once everything is sent."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(self._exporter)

    async def spans(self):
        await self.tracing.close()
        spans = self._exporter.get_finished_spans()
        roots = [span for span in spans if span.kind is SpanKind.SERVER]
        return roots, [span for span in spans if span not in roots]


async def test_a_request_is_a_span_with_genai_attributes_and_its_phases_below(serve):
    watched = Watched()
    async with serve([watched.tracing]) as world:
        await world.load("pirate", "p")
        began = time.time()
        await generate(
            world.client,
            adapter="pirate",
            max_tokens=3,
            temperature=0.5,
            top_p=0.9,
            seed=7,
            tenant="team",
            request_id="mine",
        )
    (root,), phases = await watched.spans()
    assert root.name == "text_completion pirate"
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "loramux",
        "gen_ai.request.model": "pirate",
        "gen_ai.response.model": "pirate",
        "gen_ai.response.id": "mine",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": pytest.approx(0.9),
        "gen_ai.request.seed": 7,
        "gen_ai.usage.input_tokens": len(SECRET),
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "loramux.tenant": "team",
        "loramux.adapters": ("pirate",),
    }
    assert expected.items() <= dict(root.attributes).items()
    assert 0 <= root.attributes["gen_ai.latency.time_to_first_token"] < 5
    assert [event.name for event in root.events] == ["first token"]
    assert began * 1e9 - 1e7 <= root.start_time <= root.events[0].timestamp <= root.end_time
    assert root.status.status_code is StatusCode.UNSET and root.parent is None
    assert [span.name for span in phases] == ["queue", "prefill", "decode"]
    assert all(span.parent.span_id == root.context.span_id for span in phases)
    assert [span.start_time for span in phases[1:]] == [span.end_time for span in phases[:-1]]
    lengths = [(span.end_time - span.start_time) / 1e9 for span in phases]
    # what the scripted engine reports: see RequestTiming in tests/fakes.py
    (finished,) = world.observer.of("on_finished")
    timing = finished[-1]
    assert lengths == pytest.approx([timing.queue_s, timing.prefill_s, timing.decode_s], abs=1e-6)
    assert phases[-1].end_time <= root.end_time
    assert root.resource.attributes["service.name"] == "loramux"
    shown = "".join(span.to_json() for span in (root, *phases))
    assert SECRET not in shown and "ppp" not in shown


async def test_a_callers_trace_goes_on_and_a_broken_header_begins_another(serve):
    watched = Watched()
    request = generation_pb2.GenerateRequest(text="ab")
    request.sampling.max_tokens = 1
    async with serve([watched.tracing]) as world, stubs_of(world) as stubs:
        for header in (TRACEPARENT, "00-xyz", "a" * 2000):
            metadata = (("traceparent", header),)
            async for _ in stubs.generation.Generate(request, metadata=metadata):
                pass
    (continued, *others), phases = await watched.spans()
    _, trace_id, span_id, _ = TRACEPARENT.split("-")
    assert f"{continued.context.trace_id:032x}" == trace_id
    assert f"{continued.parent.span_id:016x}" == span_id
    assert [span.context.trace_id for span in phases[:3]] == [continued.context.trace_id] * 3
    assert [span.parent for span in others] == [None, None]
    assert len({span.context.trace_id for span in (continued, *others)}) == 3


async def test_several_outputs_are_one_span_with_the_phases_of_each(serve):
    watched = Watched()
    async with serve([watched.tracing]) as world:
        await generate(world.client, n=2, max_tokens=4)
    (root,), phases = await watched.spans()
    assert root.attributes["gen_ai.request.choice.count"] == 2
    assert root.attributes["gen_ai.usage.output_tokens"] == 8
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    found = sorted((span.attributes["loramux.output.index"], span.name) for span in phases)
    assert found == [(i, name) for i in (0, 1) for name in ("decode", "prefill", "queue")]


async def test_a_caller_that_does_not_sample_gets_no_spans(serve):
    watched = Watched()
    request = generation_pb2.GenerateRequest(text="ab")
    async with serve([watched.tracing]) as world, stubs_of(world) as stubs:
        metadata = (("traceparent", TRACEPARENT[:-2] + "00"),)
        async for _ in stubs.generation.Generate(request, metadata=metadata):
            pass
    assert await watched.spans() == ([], [])


async def test_what_fails_says_so_and_what_is_left_is_cancelled(serve):
    watched = Watched()
    async with serve([watched.tracing]) as world:
        with pytest.raises(AdapterNotFound):
            await generate(world.client, adapter="ghost")
        world.engine.failure = RequestFailed(f"quotes {SECRET}")
        with pytest.raises(RequestFailed):
            await generate(world.client)
        world.engine.failure = None
        reading = asyncio.create_task(generate(world.client, max_tokens=400))
        await until(lambda: world.engine.running)
        reading.cancel()
        await until(lambda: not world.engine.running)
        await asyncio.sleep(0.05)
    roots, phases = await watched.spans()
    shown = [
        (
            span.attributes.get("error.type"),
            *span.attributes["gen_ai.response.finish_reasons"],
            span.status.status_code,
        )
        for span in roots
    ]
    assert shown == [
        ("AdapterNotFound", "error", StatusCode.ERROR),
        ("RequestFailed", "error", StatusCode.ERROR),
        (None, "cancelled", StatusCode.UNSET),
    ]
    assert phases == []
    assert not any(SECRET in span.to_json() for span in roots)


@contextmanager
def collector(answer):
    """A collector over HTTP: `answer(handler, body)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            answer(self, self.rfile.read(int(self.headers["content-length"])))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("suffix", ["", "/", "/v1/traces"])
async def test_a_collector_gets_the_spans_over_http(serve, suffix):
    received = []

    def answer(handler, body):
        received.append((handler.path, ExportTraceServiceRequest.FromString(body)))
        handler.send_response(200)
        handler.end_headers()

    with collector(answer) as url:
        tracing = Tracing(span_exporter(url + suffix))
        async with serve([tracing]) as world:
            await generate(world.client, max_tokens=2)
        await tracing.close()
    ((path, request),) = received
    assert path == "/v1/traces"
    (spans,) = [scope.spans for r in request.resource_spans for scope in r.scope_spans]
    assert [span.name for span in spans] == ["queue", "prefill", "decode", "text_completion tiny"]


async def test_a_server_sends_its_spans_before_it_ends_and_counts_its_calls(tmp_path):
    received = []

    def answer(handler, body):
        received.append(ExportTraceServiceRequest.FromString(body))
        handler.send_response(200)
        handler.end_headers()

    write_tokenizer(tmp_path)
    asked = {"model": "tiny", "prompt": [5, 6], "max_tokens": 2}
    with collector(answer) as url:
        async with running(LocalEngine(tmp_path), otlp_endpoint=url) as server:
            await (await server.start_stream(3))
            for body in (asked, {**asked, "stream": True, "n": 2}):
                headers = {"traceparent": TRACEPARENT}
                answered = await server.http.post("/v1/completions", json=body, headers=headers)
                assert answered.status_code == 200, answered.text
            page = (await server.http.get("/metrics")).text
            os.kill(os.getpid(), signal.SIGTERM)
            await server.task
    spans = [s for r in received for t in r.resource_spans for c in t.scope_spans for s in c.spans]
    phases = ["queue", "prefill", "decode"]
    names = [span.name for span in spans]
    assert sorted(names) == sorted(["text_completion tiny"] * 3 + phases * 4)
    traces = {span.trace_id.hex() for span in spans}
    assert len(traces) == 2 and TRACEPARENT.split("-")[1] in traces
    assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="Generate"' in page
    assert '{handler="/v1/completions",method="POST",status="200"} 2.0' in page


def refusing(handler, body):
    handler.send_response(503)
    handler.end_headers()


def hanging(handler, body):
    time.sleep(3)


@pytest.mark.parametrize("answer", [refusing, hanging])
async def test_a_faulty_collector_disturbs_neither_requests_nor_the_end(serve, answer):
    with collector(answer) as url:
        tracing = Tracing(span_exporter(url))
        async with serve([tracing]) as world:
            for _ in range(50):
                responses = await generate(world.client, max_tokens=2)
                assert responses[-1].HasField("finished")
        begun = time.monotonic()
        await tracing.close()
        assert time.monotonic() - begun < CLOSE_S + 0.5


def test_nothing_is_sent_unless_asked_and_the_standard_variables_ask(monkeypatch):
    assert span_exporter("") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    exporter = span_exporter("")
    assert exporter is not None and "http://collector:4318/v1/traces" in str(vars(exporter))


@pytest.mark.parametrize("asked", ["otlp_endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT"])
def test_without_the_extra_the_error_names_it(monkeypatch, asked):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert span_exporter("") is None
    if asked != "otlp_endpoint":
        monkeypatch.setenv(asked, "http://x")
    with pytest.raises(ConfigError, match=rf"{asked} asks.*loramux\[tracing\]"):
        span_exporter("http://x" if asked == "otlp_endpoint" else "")


async def test_each_request_has_one_line_in_the_log_with_ids_and_no_text(serve):
    stream, watched = io.StringIO(), Watched()
    setup_logging(level="info", log_format="json", stream=stream)
    try:
        async with serve([watched.tracing, RequestLog()]) as world:
            await world.load("pirate", "p")
            await generate(
                world.client, adapter="pirate", max_tokens=3, tenant="team", request_id="mine"
            )
            with pytest.raises(AdapterNotFound):
                await generate(world.client, adapter="ghost", tenant="team")
            with pytest.raises(grpc.RpcError):
                async with stubs_of(world) as stubs:  # refused while it is parsed: no request yet
                    await stubs.generation.Tokenize(generation_pb2.TokenizeRequest(), timeout=0)
    finally:
        structlog.reset_defaults()
    (root, refused), _ = await watched.spans()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    done, failed = [line for line in lines if line["event"] == "request ended"]
    assert done.pop("seconds") >= done.pop("first_token_seconds") >= 0
    for key in ("timestamp", "event"):
        del done[key], failed[key]
    assert done == {
        "request_id": "mine",
        "tenant": "team",
        "adapters": ["pirate"],
        "prompt_tokens": len(SECRET),
        "cached_tokens": 0,
        "output_tokens": 3,
        "reasons": ["length"],
        "trace_id": f"{root.context.trace_id:032x}",
        "level": "info",
        "logger": "loramux.server.observability.request_log",
    }
    assert failed["error"] == "AdapterNotFound" and failed["reasons"] == ["error"]
    assert failed["field"] == "adapters[0].name" and failed["tenant"] == "team"
    assert SECRET not in stream.getvalue()
