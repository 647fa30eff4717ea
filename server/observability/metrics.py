"""Every Prometheus series of the server; the only user of prometheus_client.

Counts what the service and the wires report and reads the engine's numbers when it is scraped.
Names with `vllm:` mean what vLLM's mean, so its dashboards and routers work; `loramux:` ones are
ours, `grpc_server_` and `http_` ones those of the usual Prometheus middlewares.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    Summary,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector

from lora_runtime.core import FinishReason, RequestTiming
from lora_runtime.engine.client import EngineClient, EngineStats
from loramux.server.observability.calls import Rpc

MAX_ADAPTER_LABELS = 200
"""Adapters with series of their own; the rest are counted under `OTHER`."""
BASE = ""
OTHER = "_other"
COMPOSITION = "_composition"
"""Requests with several adapters, whichever they are: a label for every combination that callers
make up would have no bound. No adapter name starts with an underscore."""

# Bounds of the histograms' buckets, in seconds: vLLM's, so that its dashboards fit, and finer ones
# at the low end, which small bases reach.
TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60,
    120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods with a label of their own; a client may send any word."""

# No second series for each counter, which no dashboard reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

Encode = Callable[..., bytes]


@dataclass(slots=True, eq=False)
class Label:
    """The adapter label that a request is counted under, from its start to its end.

    When the adapter is unloaded, `name` becomes `OTHER`: what its requests still do counts there.
    """

    name: str
    num_in_flight: int = 0


VLLM_REASONS = {FinishReason.CANCELLED.value: "abort"}
"""Where vLLM's word for a finish reason differs from ours."""


class Metrics:
    """Hears how requests and adapters fare (`RequestObserver`) and renders it for a scrape."""

    def __init__(
        self, engine: EngineClient, *, max_adapter_labels: int = MAX_ADAPTER_LABELS
    ) -> None:
        self._registry = CollectorRegistry()
        self._max_adapter_labels = max_adapter_labels
        self._digests: dict[str, str] = {}
        self._labelled: dict[str, Label] = {}
        self._base, self._other, self._composition = Label(BASE), Label(OTHER), Label(COMPOSITION)
        self._totals = _Totals(self._registry, engine.info.base.name)
        self._adapters = _AdapterSeries(self._registry)
        self._calls = _CallSeries(self._registry)
        self._registry.register(_EngineCollector(engine, self._digests, self._labelled))
        ProcessCollector(registry=self._registry)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the exposition and its content type, in the format an Accept header asks for.

        Names stay as they are under every scheme of escaping but `dots`, which is not offered: a
        colon is legal in all of them. prometheus-client's OpenMetrics would write `vllm_` under
        `underscores`, which is what Prometheus 2 gets.
        """
        encode, content_type = choose_encoder(accept.replace("escaping=dots", ""))
        return cast("Encode", encode)(self._registry, escaping=ALLOWUTF8), content_type

    def on_started(self, adapters: tuple[str, ...]) -> Label:
        """Count a request that goes to the engine; the other methods want its label."""
        label = self._label(adapters)
        label.num_in_flight += 1
        self._adapters.started.labels(label.name).inc()
        return label

    def on_first_token(self, label: Label, seconds: float) -> None:
        """Observe the time to a request's first token."""
        self._totals.first_token.observe(seconds)
        self._adapters.first_token.labels(label.name).observe(seconds)

    def on_tokens(self, label: Label, num_tokens: int, seconds_since_last: float | None) -> None:
        """Count new tokens; `seconds_since_last` is None for a request's first ones."""
        self._totals.output_tokens.inc(num_tokens)
        self._adapters.output_tokens.labels(label.name).inc(num_tokens)
        if seconds_since_last is not None:
            for _ in range(num_tokens):
                self._totals.inter_token.observe(seconds_since_last / num_tokens)

    def on_finished(
        self,
        label: Label,
        reason: str,
        num_prompt_tokens: int,
        num_output_tokens: int,
        e2e_s: float,
        timing: RequestTiming | None,
    ) -> None:
        """Count an ended request; its output tokens were counted as they came."""
        label.num_in_flight -= 1
        self._adapters.finished.labels(label.name, reason).inc()
        self._adapters.prompt_tokens.labels(label.name).inc(num_prompt_tokens)
        if timing is not None:
            self._adapters.queue.labels(label.name).observe(timing.queue_s)
        self._totals.finish(reason, num_prompt_tokens, e2e_s, timing)

    def on_adapter_loaded(self, name: str, digest: str, nbytes: int, seconds: float) -> None:
        """Give a loaded adapter series of its own while the cap allows."""
        self._digests[name] = digest
        if len(self._labelled) < self._max_adapter_labels:
            self._labelled.setdefault(name, Label(name))
        if name in self._labelled:
            self._adapters.nbytes.labels(name).set(nbytes)
        self._totals.adapter_load.observe(seconds)

    def on_adapter_unloaded(self, name: str) -> None:
        """Delete the adapter's series; its running requests, starts too, become `OTHER`."""
        self._digests.pop(name, None)
        self._adapters.forget(name)
        self._totals.adapter_unloads.inc()
        label = self._labelled.pop(name, None)
        if label is not None and label.num_in_flight:
            self._adapters.started.labels(OTHER).inc(label.num_in_flight)
            label.name = OTHER

    def on_rpc_started(self, rpc: Rpc) -> None:
        """Count a gRPC call that has come in."""
        self._calls.rpc_started.labels(rpc.kind, rpc.service, rpc.method).inc()

    def on_rpc_handled(self, rpc: Rpc, code: str, seconds: float) -> None:
        """Count a gRPC call that has ended; `code` is its status's name."""
        labels = rpc.kind, rpc.service, rpc.method
        self._calls.rpc_handled.labels(*labels, code).inc()
        self._calls.rpc_seconds.labels(*labels).observe(seconds)

    def on_http_handled(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered HTTP request; `route` is the pattern that its path matched."""
        method = method if method in HTTP_METHODS else OTHER
        self._calls.http_handled.labels(method, route, str(status)).inc()
        self._calls.http_seconds.labels(method, route).observe(seconds)

    def _label(self, adapters: tuple[str, ...]) -> Label:
        match adapters:
            case ():
                return self._base
            case (name,):
                return self._labelled.get(name, self._other)
        return self._composition


class _Totals:
    """Series over all requests, labelled with the base's name as vLLM's are."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, ["model_name"], buckets=buckets, registry=registry)
            return made.labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=registry).labels(model_name)

        self._model_name = model_name
        self.adapter_unloads = counter("loramux:adapter_unloads", "Names taken away.")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of ended requests.")
        self.output_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.success = Counter(
            "vllm:request_success",
            "Ended requests by reason.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        for reason in FinishReason:  # so that the first of its kind is seen as an increase
            self.success.labels(model_name, VLLM_REASONS.get(reason, reason))
        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token = histogram(
            "vllm:inter_token_latency_seconds", "From one token to the next.", TOKEN_BUCKETS
        )
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", REQUEST_BUCKETS)
        self.queue = histogram(
            "vllm:request_queue_time_seconds", "Arrival to first step.", REQUEST_BUCKETS
        )
        self.prefill = histogram(
            "vllm:request_prefill_time_seconds", "First step to first token.", REQUEST_BUCKETS
        )
        self.decode = histogram(
            "vllm:request_decode_time_seconds", "First token to last.", REQUEST_BUCKETS
        )
        self.adapter_load = histogram(
            "loramux:adapter_load_seconds", "Reading and checking an adapter.", REQUEST_BUCKETS
        )

    def finish(
        self, reason: str, num_prompt_tokens: int, e2e_s: float, timing: RequestTiming | None
    ) -> None:
        self.success.labels(self._model_name, VLLM_REASONS.get(reason, reason)).inc()
        self.prompt_tokens.inc(num_prompt_tokens)
        self.e2e.observe(e2e_s)
        if timing is not None:
            self.queue.observe(timing.queue_s)
            self.prefill.observe(timing.prefill_s)
            self.decode.observe(timing.decode_s)


class _AdapterSeries:
    """Series labelled with an adapter's name; "", `OTHER` and `COMPOSITION` are no names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"loramux:{name}", text, ["adapter", *labels], registry=registry)

        self.started = counter("requests_started", "Requests given to the engine.")
        self.finished = counter("requests", "Ended requests by reason.", "finished_reason")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of ended requests.")
        self.output_tokens = counter("generation_tokens", "Tokens generated.")
        # Sums and counts alone: buckets for every adapter would be most of the page.
        self.first_token = Summary(
            "loramux:time_to_first_token_seconds",
            "Arrival to first token.",
            ["adapter"],
            registry=registry,
        )
        self.queue = Summary(
            "loramux:request_queue_seconds",
            "Arrival to first step.",
            ["adapter"],
            registry=registry,
        )
        self.nbytes = Gauge(
            "loramux:adapter_bytes",
            "Bytes a loaded adapter takes on the device.",
            ["adapter"],
            registry=registry,
        )

    def forget(self, name: str) -> None:
        for metric in vars(self).values():
            metric.remove_by_labels({"adapter": name})


class _CallSeries:
    """Series over the calls of both wires, named and labelled as the usual middlewares do."""

    def __init__(self, registry: CollectorRegistry) -> None:
        rpc = ["grpc_type", "grpc_service", "grpc_method"]
        self.rpc_started = Counter(
            "grpc_server_started", "gRPC calls that came in.", rpc, registry=registry
        )
        self.rpc_handled = Counter(
            "grpc_server_handled", "gRPC calls by status.", [*rpc, "grpc_code"], registry=registry
        )
        self.rpc_seconds = Histogram(
            "grpc_server_handling_seconds",
            "Start to end of a gRPC call.",
            rpc,
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.http_handled = Counter(
            "http_requests",
            "HTTP requests by route and status.",
            ["method", "handler", "status"],
            registry=registry,
        )
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "Start to end of an HTTP request.",
            ["method", "handler"],
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )


class _EngineCollector(Collector):
    """Reads the engine's own numbers at the moment of a scrape."""

    def __init__(
        self, engine: EngineClient, digests: Mapping[str, str], labelled: Mapping[str, Label]
    ) -> None:
        self._engine = engine
        self._digests, self._labelled = digests, labelled
        """Adapter name → digest, and → label, kept by `Metrics`."""

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        model_name = self._engine.info.base.name
        for name, text, value in _gauges(stats):
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([model_name], value)
            yield gauge
        for name, text, count in _counters(stats):
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([model_name], count)
            yield counter
        yield self._cache_config()
        yield self._adapter_tiers(stats)
        yield self._lora_requests(stats)

    def _cache_config(self) -> Metric:
        info = self._engine.info
        family = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache's size.",
            labels=["block_size", "num_gpu_blocks"],
        )
        family.add_metric([str(info.block_size), str(info.num_blocks)], 1)
        return family

    def _adapter_tiers(self, stats: EngineStats) -> Metric:
        family = GaugeMetricFamily(
            "loramux:adapter_loaded",
            "1 for a loaded adapter; `tier` is device where it is in the pool, else host.",
            labels=["adapter", "tier"],
        )
        resident = set(stats.resident_adapters)
        for name in self._labelled:
            tier = "device" if self._digests[name] in resident else "host"
            family.add_metric([name, tier], 1)
        return family

    def _lora_requests(self, stats: EngineStats) -> Metric:
        """vLLM's routers read adapter names from the labels and freshness from the value."""
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters with requests, and the time.", labels=labels
        )
        running, waiting = (
            self._names(digests) for digests in (stats.running_adapters, stats.waiting_adapters)
        )
        family.add_metric([str(self._engine.info.max_slots), running, waiting], time.time())
        return family

    def _names(self, digests: tuple[str, ...]) -> str:
        names = (name for name, digest in self._digests.items() if digest in digests)
        return ",".join(sorted(names))


def _gauges(stats: EngineStats) -> list[tuple[str, str, float]]:
    cache_share = stats.kv_blocks_used / max(stats.kv_blocks_total, 1)
    found: list[tuple[str, str, float]] = [
        ("vllm:num_requests_running", "Requests that run now.", stats.num_running),
        ("vllm:num_requests_waiting", "Requests that wait now.", stats.num_waiting),
        ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", cache_share),
        ("loramux:engine_up", "1 while the engine lives.", stats.is_alive),
        ("loramux:adapter_pool_used_bytes", "Adapter pool in use.", stats.pool_bytes_used),
        ("loramux:adapter_pool_total_bytes", "Adapter pool.", stats.pool_bytes_total),
        ("loramux:adapters_resident", "Adapters on the device.", len(stats.resident_adapters)),
    ]
    if (states := stats.states) is not None:
        found += [
            ("loramux:state_slots_used", "Recurrent states of running requests.", states.num_rows),
            ("loramux:state_slots_free", "Room for more of them.", states.num_rows_free),
            ("loramux:state_snapshots", "States kept behind prefixes.", states.num_snapshots),
            ("loramux:state_snapshots_free", "Room for more.", states.num_snapshots_free),
        ]
    return found


def _counters(stats: EngineStats) -> list[tuple[str, str, float]]:
    found: list[tuple[str, str, float]] = [
        ("vllm:num_preemptions", "Requests sent back to the queue.", stats.num_preemptions),
        ("vllm:prefix_cache_queries", "Tokens looked up in the cache.", stats.num_prefix_queries),
        ("vllm:prefix_cache_hits", "Tokens found in the cache.", stats.num_prefix_hits),
        ("loramux:engine_steps", "Steps the engine has run.", stats.num_steps),
        (
            "loramux:adapter_pool_loads",
            "Adapters copied into the device pool.",
            stats.num_adapter_loads,
        ),
        (
            "loramux:adapter_pool_evictions",
            "Adapters that lost their place in it to others.",
            stats.num_adapter_evictions,
        ),
    ]
    if (states := stats.states) is not None:
        found += [
            (
                "loramux:state_snapshot_hits",
                "Requests that began with the state behind a prefix.",
                states.num_snapshot_hits,
            ),
            (
                "loramux:state_snapshot_evictions",
                "Snapshots that went for want of room.",
                states.num_snapshot_evictions,
            ),
            (
                "loramux:state_recomputed_tokens",
                "Tokens found in the cache and computed again for want of a snapshot.",
                states.num_recomputed_tokens,
            ),
        ]
    return found
