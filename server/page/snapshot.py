"""What the status page shows, as plain values for JSON."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, Protocol

from loramux.server.access.caller import Caller
from loramux.server.calls import AdapterRecord, AdapterState, ServerInfo
from loramux.server.page.history import COLUMNS, History
from loramux.server.service import Service

MAX_LISTED_ERROR = 300
"""Characters of an error in the list; the adapter's own answer has all of it."""


class Condition(Protocol):
    """What is asked of a server; the parts are None while the engine is loading."""

    @property
    def service(self) -> Service | None: ...

    @property
    def history(self) -> History | None: ...

    def is_alive(self) -> bool:
        """Tell whether there is a live engine."""
        ...

    def is_ready(self) -> bool:
        """Tell whether requests are taken and likely to be answered."""
        ...


def snapshot(condition: Condition, caller: Caller, since: int) -> dict[str, Any]:
    """Return what the page shows a caller: the adapters that it may see; and, if it is an operator
    of the whole server, under `load` what all tenants together make of it, with the samples after
    the first `since`.

    `state` is `loading` (then it comes alone), `ready`, `not ready` or `dead`.
    """
    service, history = condition.service, condition.history
    if service is None or history is None:
        return {"state": "loading"}
    state = "ready" if condition.is_ready() else "not ready" if condition.is_alive() else "dead"
    resident = history.resident()
    return {
        "state": state,
        "server": _server(service.facts.info(caller), history),
        "load": _load(history, since) if caller.is_over_all else None,
        "adapters": [_listed(r, history, resident) for r in service.adapters.records(caller)],
    }


def adapter(record: AdapterRecord, history: History) -> dict[str, Any]:
    """Return all that is known of one adapter."""
    listed = _listed(record, history, history.resident())
    listed |= {
        "error": record.error,
        "loaded_at_s": record.loaded_at_s,
        "notes": list(record.notes),
        "former_digest": record.former.digest if record.former else "",
    }
    if (loaded := record.loaded) is not None:
        facts = loaded.facts
        listed |= {
            "num_parameters": loaded.num_parameters,
            "target_modules": list(loaded.target_modules),
            "num_layers": facts.num_layers,
            "honoured": {name: str(value) for name, value in facts.honoured.items()},
            "inert": dict(facts.inert),
        }
    return listed


def _server(info: ServerInfo, history: History) -> dict[str, Any]:
    engine, base = info.engine, info.engine.base
    return {
        "started_at_s": history.started_at_s,
        "uptime_s": round(time.time() - history.started_at_s, 1),
        "version": info.versions.get("loramux", ""),
        "base": info.base_name,
        "quantization": base.quantization,
        "dtype": base.dtype,
        "device": base.device,
        "model_type": base.model_type,
        "kernel_backend": engine.kernel_backend,
        "has_chat_template": info.has_chat_template,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_queued_requests": engine.max_queued_requests,
        "max_slots": engine.max_slots,
    }


def _load(history: History, since: int) -> dict[str, Any]:
    """The samples stand in columns: their names would be most of the bytes of 300 samples."""
    stats, (number, samples) = history.stats(), history.since(since)
    return {
        "kv_blocks_used": stats.kv_blocks_used,
        "kv_blocks_total": stats.kv_blocks_total,
        "pool_bytes_used": stats.pool_bytes_used,
        "pool_bytes_total": stats.pool_bytes_total,
        "num_resident_adapters": len(stats.resident_adapters),
        "num_preemptions": stats.num_preemptions,
        "num_prefix_queries": stats.num_prefix_queries,
        "num_prefix_hits": stats.num_prefix_hits,
        "base": asdict(history.traffic()),
        "num_samples_taken": number,
        "samples": {name: [getattr(sample, name) for sample in samples] for name in COLUMNS},
    }


def _listed(record: AdapterRecord, history: History, resident: frozenset[str]) -> dict[str, Any]:
    loaded, traffic = record.loaded, history.traffic(record.name)
    is_on_device = record.is_pinned or record.digest in resident
    is_draining = record.state is AdapterState.DRAINING
    return {
        "name": record.name,
        "source": record.source,
        "state": record.state.value,
        "digest": record.digest,
        "variant": loaded.facts.variant if loaded else "",
        "ranks": list(loaded.ranks) if loaded else [],
        "num_bytes": loaded.nbytes if loaded else 0,
        "tier": "" if loaded is None else "device" if is_on_device else "host",
        "is_pinned": record.is_pinned,
        "num_downloaded_bytes": record.num_downloaded_bytes,
        "num_bytes_to_download": record.num_bytes_to_download,
        "num_in_flight": record.num_in_flight,
        # What drains shares its name, and the name's traffic, with its successor.
        "num_requests": 0 if is_draining else traffic.num_requests,
        "num_output_tokens": 0 if is_draining else traffic.num_output_tokens,
        "has_own_template": bool(record.text and record.text.is_own_template),
        "error": record.error[:MAX_LISTED_ERROR],
        "has_former": record.former is not None,
    }
