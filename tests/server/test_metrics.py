from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from lora_runtime.core import BaseSpec, RequestTiming
from lora_runtime.engine.client import EngineInfo, EngineStats, StateStats
from loramux.server.observability.calls import Rpc
from loramux.server.observability.metrics import Metrics

SPEC = BaseSpec(
    name="tiny",
    fingerprint="f" * 64,
    linears={},
    embedding="model.embed_tokens",
    head="lm_head",
    is_tied=True,
    num_layers=2,
    hidden_size=8,
    vocab_size=100,
    max_model_len=64,
    quantization="nf4",
    dtype="float32",
    device="cpu",
    model_type="llama",
)
INFO = EngineInfo(
    base=SPEC,
    kernel_backend="torch",
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    block_size=16,
    num_blocks=40,
    pool_bytes=1000,
    max_slots=8,
    max_adapter_layers=8,
)
STATS = EngineStats(
    is_alive=True,
    num_running=3,
    num_waiting=2,
    kv_blocks_used=10,
    kv_blocks_total=40,
    pool_bytes_used=250,
    pool_bytes_total=1000,
    num_preemptions=7,
    num_prefix_queries=500,
    num_prefix_hits=123,
    num_steps=99,
    running_adapters=("d1", "d2"),
    waiting_adapters=("d2",),
    resident_adapters=("d1", "d2", "d3"),
)
STATES = StateStats(
    num_rows=3,
    num_rows_free=13,
    num_snapshots=5,
    num_snapshots_free=11,
    num_snapshot_hits=21,
    num_snapshot_evictions=2,
    num_recomputed_tokens=640,
)
TINY = {"model_name": "tiny"}


class QuietEngine:
    """An engine that only has numbers."""

    info = INFO

    def __init__(self):
        self.now = STATS

    def stats(self):
        return self.now


@pytest.fixture
def engine():
    return QuietEngine()


@pytest.fixture
def metrics(engine):
    return Metrics(engine)


def scrape(metrics: Metrics) -> dict[tuple[str, frozenset], float]:
    """Read the page with Prometheus's own parser."""
    text = metrics.render()[0].decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return scrape(metrics).get((name, frozenset(labels.items())))


def labels_of(metrics: Metrics, name: str, label: str) -> set[str]:
    return {dict(labels)[label] for found, labels in scrape(metrics) if found == name}


def test_the_engine_is_read_at_every_scrape(metrics, engine):
    assert value(metrics, "vllm:num_requests_running", **TINY) == 3
    assert value(metrics, "vllm:num_requests_waiting", **TINY) == 2
    assert value(metrics, "vllm:kv_cache_usage_perc", **TINY) == 0.25
    assert value(metrics, "vllm:num_preemptions_total", **TINY) == 7
    assert value(metrics, "vllm:prefix_cache_queries_total", **TINY) == 500
    assert value(metrics, "vllm:prefix_cache_hits_total", **TINY) == 123
    assert value(metrics, "loramux:adapter_pool_used_bytes", **TINY) == 250
    assert value(metrics, "loramux:adapter_pool_total_bytes", **TINY) == 1000
    assert value(metrics, "loramux:adapters_resident", **TINY) == 3
    assert value(metrics, "vllm:cache_config_info", block_size="16", num_gpu_blocks="40") == 1
    assert not any(name.startswith("loramux:state_") for name, _ in scrape(metrics))
    engine.now = dataclasses.replace(STATS, num_running=0, is_alive=False)
    assert value(metrics, "vllm:num_requests_running", **TINY) == 0
    assert value(metrics, "loramux:engine_up", **TINY) == 0


def test_states_of_recurrent_layers_are_read_where_the_base_has_such(metrics, engine):
    engine.now = dataclasses.replace(STATS, states=STATES)
    assert value(metrics, "loramux:state_slots_used", **TINY) == 3
    assert value(metrics, "loramux:state_slots_free", **TINY) == 13
    assert value(metrics, "loramux:state_snapshots", **TINY) == 5
    assert value(metrics, "loramux:state_snapshots_free", **TINY) == 11
    assert value(metrics, "loramux:state_snapshot_hits_total", **TINY) == 21
    assert value(metrics, "loramux:state_snapshot_evictions_total", **TINY) == 2
    assert value(metrics, "loramux:state_recomputed_tokens_total", **TINY) == 640


def test_requests_and_tokens_are_counted_per_adapter_and_in_total(metrics):
    metrics.on_adapter_loaded("pirate", "d1", 500, 0.1)
    for adapters, num_tokens in (((), 4), (("pirate",), 5)):
        request = metrics.on_started(adapters)
        metrics.on_first_token(request, 0.05)
        metrics.on_tokens(request, 1, None)
        metrics.on_tokens(request, num_tokens - 1, 0.3)
        timing = RequestTiming(queue_s=1.0, prefill_s=2.0, decode_s=4.0)
        metrics.on_finished(request, "stop", 10, num_tokens, 7.0, timing)
    for adapter, num_tokens in (("", 4), ("pirate", 5)):
        assert value(metrics, "loramux:requests_started_total", adapter=adapter) == 1
        ended = value(metrics, "loramux:requests_total", adapter=adapter, finished_reason="stop")
        assert ended == 1
        assert value(metrics, "loramux:prompt_tokens_total", adapter=adapter) == 10
        assert value(metrics, "loramux:generation_tokens_total", adapter=adapter) == num_tokens
    assert value(metrics, "loramux:adapter_bytes", adapter="pirate") == 500
    assert value(metrics, "vllm:prompt_tokens_total", **TINY) == 20
    assert value(metrics, "vllm:generation_tokens_total", **TINY) == 9
    assert value(metrics, "vllm:request_success_total", **TINY, finished_reason="stop") == 2
    assert value(metrics, "vllm:time_to_first_token_seconds_count", **TINY) == 2
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum", **TINY) == 14
    assert value(metrics, "vllm:request_queue_time_seconds_sum", **TINY) == 2
    assert value(metrics, "vllm:request_prefill_time_seconds_sum", **TINY) == 4
    assert value(metrics, "vllm:request_decode_time_seconds_sum", **TINY) == 8


def test_time_between_tokens_is_per_token_and_leaves_out_the_first(metrics):
    request = metrics.on_started(())
    metrics.on_tokens(request, 2, None)
    assert value(metrics, "vllm:inter_token_latency_seconds_count", **TINY) == 0
    metrics.on_tokens(request, 3, 0.6)
    assert value(metrics, "vllm:inter_token_latency_seconds_count", **TINY) == 3
    total = value(metrics, "vllm:inter_token_latency_seconds_sum", **TINY)
    assert total == pytest.approx(0.6)
    at_most_200_ms = value(metrics, "vllm:inter_token_latency_seconds_bucket", **TINY, le="0.15")
    assert at_most_200_ms == 0


def test_a_cancelled_request_has_vllms_word_for_it_and_no_phases(metrics):
    metrics.on_finished(metrics.on_started(()), "cancelled", 3, 0, 0.5, None)
    assert value(metrics, "vllm:request_success_total", **TINY, finished_reason="abort") == 1
    ours = value(metrics, "loramux:requests_total", adapter="", finished_reason="cancelled")
    assert ours == 1
    assert value(metrics, "vllm:request_queue_time_seconds_count", **TINY) == 0


def test_series_of_an_unloaded_adapter_are_deleted_and_do_not_come_back(metrics):
    metrics.on_adapter_loaded("pirate", "d1", 500, 0.1)
    metrics.on_finished(metrics.on_started(("pirate",)), "stop", 1, 1, 1.0, None)
    request = metrics.on_started(("pirate",))
    assert b'"pirate"' in metrics.render()[0]
    metrics.on_adapter_unloaded("pirate")
    metrics.on_tokens(request, 5, 0.1)
    metrics.on_finished(request, "cancelled", 1, 6, 1.0, None)
    assert b"pirate" not in metrics.render()[0]
    assert value(metrics, "loramux:generation_tokens_total", adapter="_other") == 5


@pytest.mark.parametrize("seed", range(20))
def test_what_has_started_is_what_has_ended_and_what_runs(engine, seed):
    """Under every label, whatever was loaded, replaced and unloaded in between."""
    rng = random.Random(seed)
    metrics, running = Metrics(engine, max_adapter_labels=2), []
    for _ in range(300):
        name = rng.choice("abcd")
        match rng.randrange(5):
            case 0:
                metrics.on_adapter_loaded(name, f"d{name}", 1, 0.1)
            case 1:
                metrics.on_adapter_unloaded(name)
            case 2 if running:
                request = running.pop(rng.randrange(len(running)))
                metrics.on_finished(request, rng.choice(("stop", "error")), 1, 1, 0.1, None)
            case _:
                adapters = rng.choice(((), (name,), (name,), (name, "e")))
                running.append(metrics.on_started(adapters))
    open_under = Counter()
    for (name, labels), count in scrape(metrics).items():
        if name == "loramux:requests_started_total":
            open_under[dict(labels)["adapter"]] += count
        elif name == "loramux:requests_total":
            open_under[dict(labels)["adapter"]] -= count
    assert all(count >= 0 for count in open_under.values()), open_under
    assert sum(open_under.values()) == len(running)
    for request in running:
        metrics.on_finished(request, "stop", 1, 1, 0.1, None)
    assert value(metrics, "vllm:request_success_total", **TINY, finished_reason="stop")
    shown = scrape(metrics)
    started = sum(n for (name, _), n in shown.items() if name == "loramux:requests_started_total")
    assert started == sum(n for (name, _), n in shown.items() if name == "loramux:requests_total")


def test_adapters_beyond_the_cap_share_one_label(engine):
    metrics = Metrics(engine, max_adapter_labels=2)
    for number in range(50):
        metrics.on_adapter_loaded(f"a{number}", f"d{number}", 1, 0.1)
        metrics.on_started((f"a{number}",))
    name = "loramux:requests_started_total"
    assert labels_of(metrics, name, "adapter") == {"a0", "a1", "_other"}
    assert value(metrics, name, adapter="_other") == 48
    metrics.on_adapter_unloaded("a0")
    metrics.on_adapter_loaded("new", "d", 1, 0.1)
    metrics.on_started(("new",))
    assert labels_of(metrics, name, "adapter") == {"new", "a1", "_other"}


def test_names_nobody_loaded_make_no_series(metrics):
    for number in range(50):
        metrics.on_started((f"ghost{number}",))
    assert labels_of(metrics, "loramux:requests_started_total", "adapter") == {"_other"}


def test_every_composition_shares_one_label(metrics):
    for name in ("a", "b", "c"):
        metrics.on_adapter_loaded(name, f"d{name}", 1, 0.1)
    for names in (("a", "b"), ("b", "c"), ("a", "b", "c"), ("a", "ghost")):
        request = metrics.on_started(names)
        metrics.on_tokens(request, 3, None)
        metrics.on_finished(request, "stop", 5, 3, 1.0, None)
    assert labels_of(metrics, "loramux:requests_started_total", "adapter") == {"_composition"}
    assert value(metrics, "loramux:requests_started_total", adapter="_composition") == 4
    assert value(metrics, "loramux:generation_tokens_total", adapter="_composition") == 12
    assert value(metrics, "loramux:prompt_tokens_total", adapter="_composition") == 20
    metrics.on_adapter_unloaded("a")
    assert value(metrics, "loramux:requests_started_total", adapter="_composition") == 4


def test_routers_see_adapter_names_and_a_fresh_timestamp(metrics):
    metrics.on_adapter_loaded("pirate", "d2", 1, 0.1)
    metrics.on_adapter_loaded("haiku", "d1", 1, 0.1)
    metrics.on_adapter_loaded("idle", "d3", 1, 0.1)
    shown = value(
        metrics,
        "vllm:lora_requests_info",
        max_lora="8",
        running_lora_adapters="haiku,pirate",
        waiting_lora_adapters="pirate",
    )
    assert shown is not None and abs(shown - time.time()) < 5


def test_a_replaced_adapter_keeps_its_series_under_its_new_content(metrics):
    metrics.on_adapter_loaded("pirate", "d1", 500, 0.1)
    metrics.on_started(("pirate",))
    metrics.on_adapter_loaded("pirate", "d9", 700, 0.1)
    assert value(metrics, "loramux:requests_started_total", adapter="pirate") == 1
    assert value(metrics, "loramux:adapter_bytes", adapter="pirate") == 700
    assert labels_of(metrics, "vllm:lora_requests_info", "running_lora_adapters") == {""}


ACCEPT = {
    "Prometheus 2.42": "application/openmetrics-text;version=1.0.0,"
    "application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "Prometheus 3": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
    "Prometheus 3 told to escape": "application/openmetrics-text;version=1.0.0;"
    "escaping=underscores;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
    "text by values": "text/plain;version=1.0.0;escaping=values",
    "text by dots": "text/plain;version=1.0.0;escaping=dots",
    "a browser": "text/html,*/*;q=0.8",
    "nobody": "",
}
"""What scrapers send, by who they are: as Prometheus 2.42 does, and 3.x by its source."""
CONTENT_TYPES = {
    "Prometheus 2.42": "application/openmetrics-text; version=1.0.0; charset=utf-8; "
    "escaping=underscores",
    "Prometheus 3": "application/openmetrics-text; version=1.0.0; charset=utf-8; "
    "escaping=allow-utf-8",
}


@pytest.mark.parametrize("scraper", ACCEPT)
def test_names_keep_their_colons_whoever_scrapes(metrics, scraper):
    metrics.on_adapter_loaded("pirate", "d1", 500, 0.1)
    body, content_type = metrics.render(ACCEPT[scraper])
    parse = openmetrics if "openmetrics" in content_type else text_string_to_metric_families
    families = list(parse(body.decode()))
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    assert samples["vllm:num_requests_running"] == 3
    assert samples["loramux:adapter_bytes"] == 500
    assert samples["vllm:num_preemptions_total"] == 7
    assert "vllm:e2e_request_latency_seconds_bucket" in samples
    assert not [name for name in samples if name.startswith(("vllm_", "loramux_"))]
    assert not [name for name in samples if name.endswith("_created")]
    assert "escaping=dots" not in content_type
    assert content_type == CONTENT_TYPES.get(scraper, content_type)


def snapshot(metrics: Metrics) -> set[tuple[str, frozenset]]:
    return set(scrape(metrics)) - {key for key in scrape(metrics) if "lora_requests_info" in key[0]}


def test_series_return_to_their_start_after_a_thousand_adapters(metrics, engine):
    def live(number: int) -> None:
        name = f"a{number}"
        metrics.on_adapter_loaded(name, f"d{number}", 1, 0.1)
        engine.now = dataclasses.replace(STATS, resident_adapters=(f"d{number}",))
        request = metrics.on_started((name,))
        metrics.on_first_token(request, 0.1)
        metrics.on_tokens(request, 2, 0.1)
        timing = RequestTiming(queue_s=1.0, prefill_s=2.0, decode_s=4.0)
        metrics.on_finished(request, "stop", 1, 2, 1.0, timing)

    before = snapshot(metrics)
    for number in range(1000):
        live(number)
        if number % 2:
            metrics.on_adapter_unloaded(f"a{number}")
    kept = {labels for name, labels in snapshot(metrics) if name == "loramux:adapter_loaded"}
    assert len(kept) == 200
    for number in range(0, 1000, 2):
        metrics.on_adapter_unloaded(f"a{number}")
    new = snapshot(metrics) - before
    assert {dict(labels).get("adapter") for _, labels in new} <= {"_other"}
    for number in range(1000, 1100):
        live(number)
        metrics.on_adapter_unloaded(f"a{number}")
    assert snapshot(metrics) - before == new
    assert value(metrics, "loramux:adapter_unloads_total", **TINY) == 1100


def test_an_adapter_shows_its_tier_and_its_waits(metrics, engine):
    for name, digest in (("hot", "d1"), ("cold", "d9")):
        metrics.on_adapter_loaded(name, digest, 1, 0.1)
    assert value(metrics, "loramux:adapter_loaded", adapter="hot", tier="device") == 1
    assert value(metrics, "loramux:adapter_loaded", adapter="cold", tier="host") == 1
    engine.now = dataclasses.replace(STATS, resident_adapters=("d9",), num_adapter_evictions=3)
    assert value(metrics, "loramux:adapter_loaded", adapter="hot", tier="device") is None
    assert value(metrics, "loramux:adapter_loaded", adapter="cold", tier="device") == 1
    assert value(metrics, "loramux:adapter_pool_evictions_total", **TINY) == 3
    request = metrics.on_started(("hot",))
    metrics.on_first_token(request, 0.25)
    timing = RequestTiming(queue_s=1.5, prefill_s=2.0, decode_s=4.0)
    metrics.on_finished(request, "stop", 1, 2, 1.0, timing)
    assert value(metrics, "loramux:request_queue_seconds_sum", adapter="hot") == 1.5
    assert value(metrics, "loramux:time_to_first_token_seconds_sum", adapter="hot") == 0.25


def test_calls_have_the_labels_of_the_usual_middlewares(metrics):
    rpc = Rpc("unary", "loramux.v1.AdapterService", "ListAdapters")
    labels = {
        "grpc_type": "unary",
        "grpc_service": "loramux.v1.AdapterService",
        "grpc_method": "ListAdapters",
    }
    metrics.on_rpc_started(rpc)
    metrics.on_rpc_handled(rpc, "NOT_FOUND", 0.5)
    assert value(metrics, "grpc_server_started_total", **labels) == 1
    assert value(metrics, "grpc_server_handled_total", **labels, grpc_code="NOT_FOUND") == 1
    assert value(metrics, "grpc_server_handling_seconds_sum", **labels) == 0.5
    for number in range(9):
        metrics.on_http_handled(f"MADE{number}", "/v1/models", 405, 0.25)
    made_up = {"method": "_other", "handler": "/v1/models"}
    assert value(metrics, "http_requests_total", **made_up, status="405") == 9
    assert value(metrics, "http_request_duration_seconds_sum", **made_up) == 2.25


def test_openmetrics_is_given_when_asked_for(metrics):
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
