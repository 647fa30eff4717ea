"""Requests as OpenTelemetry spans with GenAI attributes, sent to a collector over OTLP/HTTP.

A request's spans are made when it has ended, so nothing is done for them while it runs: one for the
request, continuing its caller's trace, and one below it for each phase in the engine. They hold
numbers, names and ids; no prompt and no output. Imports OpenTelemetry only when traces are wanted.
Sources: https://opentelemetry.io/docs/specs/semconv/gen-ai/, https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_runtime.errors import ConfigError
from lora_runtime.text.chat_prompt import ChatPrompt
from loramux.server.calls import Finished
from loramux.server.observability.records import RequestRecord
from loramux.server.versions import installed_versions

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

STANDARD_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Where other programs are told of a collector.
Source: https://opentelemetry.io/docs/specs/otel/protocol/exporter/
"""
TRACES_PATH = "/v1/traces"
EXPORT_TIMEOUT_S = 5.0
CLOSE_S = 1.0
"""Seconds that a stopping server waits for the last spans to be sent."""
PROVIDER = "loramux"
NANOSECONDS = 1_000_000_000

Attribute = str | int | float | list[str]


class Tracing:
    """Makes the spans of ended requests; a queue of bounded length and a thread send them."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        version = installed_versions().get("loramux", "unknown")
        name = os.environ.get("OTEL_SERVICE_NAME") or "loramux"
        resource = Resource.create({"service.name": name, "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("loramux", version)
        self._propagator = TraceContextTextMapPropagator()

    def on_ended(self, record: RequestRecord) -> None:
        """Make a request's spans; the record gets their trace's id."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        began = int(record.began_at_s * NANOSECONDS)
        end = began + int(record.seconds * NANOSECONDS)
        attributes = dict(_attributes(record))
        name = f"{attributes['gen_ai.operation.name']} {attributes['gen_ai.request.model']}"
        span = self._tracer.start_span(
            name,
            context=self._propagator.extract(record.trace_headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=began,
        )
        if record.first_token_s is not None:
            at = began + int(record.first_token_s * NANOSECONDS)
            span.add_event("first token", timestamp=at)
        if record.is_failed:
            span.set_status(Status(StatusCode.ERROR))
        record.trace_id = f"{span.get_span_context().trace_id:032x}"
        context = set_span_in_context(span)
        for output, ended_s in record.outputs:
            for phase, begun_s, over_s in _phases(output, ended_s):
                child = self._tracer.start_span(
                    phase,
                    context=context,
                    attributes={"loramux.output.index": output.index},
                    start_time=began + int(begun_s * NANOSECONDS),
                )
                child.end(began + int(over_s * NANOSECONDS))
        span.end(end)

    async def close(self) -> None:
        """Send what is left, for CLOSE_S at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        deadline = time.monotonic() + CLOSE_S
        while closing.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)


def span_exporter(endpoint: str) -> SpanExporter | None:
    """Return what sends spans to the collector at `endpoint`, or with "" where the standard
    variables say; None if they say nothing.

    Raises ConfigError where traces are asked for and the extra `tracing` is not installed.
    """
    asked = ["otlp_endpoint"] if endpoint else [v for v in STANDARD_VARIABLES if os.environ.get(v)]
    if not asked:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            f"{asked[0]} asks for traces, and OpenTelemetry is not installed; install "
            f"loramux[tracing] or leave {asked[0]} out",
            field="otlp_endpoint",
        ) from None
    url = endpoint.rstrip("/").removesuffix(TRACES_PATH) + TRACES_PATH if endpoint else None
    return OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT_S)


def _attributes(record: RequestRecord) -> Iterator[tuple[str, Attribute]]:
    call, sampling = record.call, record.call.sampling
    is_chat = isinstance(call.prompt, ChatPrompt)
    yield "gen_ai.operation.name", "chat" if is_chat else "text_completion"
    yield "gen_ai.provider.name", PROVIDER
    yield "gen_ai.request.model", record.model
    yield "gen_ai.response.model", record.model
    yield "gen_ai.response.id", record.request_id
    if call.has_max_tokens:
        yield "gen_ai.request.max_tokens", sampling.max_tokens
    if call.num_outputs > 1:
        yield "gen_ai.request.choice.count", call.num_outputs
    yield "gen_ai.request.temperature", sampling.temperature
    yield "gen_ai.request.top_p", sampling.top_p
    yield "gen_ai.request.top_k", sampling.top_k
    yield "gen_ai.request.frequency_penalty", sampling.frequency_penalty
    yield "gen_ai.request.presence_penalty", sampling.presence_penalty
    if sampling.seed is not None:
        yield "gen_ai.request.seed", sampling.seed
    yield "gen_ai.usage.input_tokens", record.num_prompt_tokens
    yield "gen_ai.usage.cache_read.input_tokens", record.num_cached_tokens
    yield "gen_ai.usage.output_tokens", record.num_output_tokens
    yield "gen_ai.response.finish_reasons", list(record.reasons)
    if record.first_token_s is not None:
        yield "gen_ai.latency.time_to_first_token", record.first_token_s
    if record.is_failed:
        yield "error.type", type(record.error).__name__
    yield "loramux.tenant", record.tenant
    yield "loramux.adapters", list(record.adapters)


def _phases(output: Finished, ended_s: float) -> Iterator[tuple[str, float, float]]:
    """The phases of an output in the engine, each with its first and last second since the call.

    They are counted back from the end: what comes before the queue is the prompt's tokenising.
    """
    timing = output.timing
    if timing is None:
        return
    decode_s = ended_s - timing.decode_s
    prefill_s = decode_s - timing.prefill_s
    yield "queue", prefill_s - timing.queue_s, prefill_s
    yield "prefill", prefill_s, decode_s
    yield "decode", decode_s, ended_s
