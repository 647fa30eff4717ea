"""One line of the log for each request that ends: who asked for what, and how it went."""

from __future__ import annotations

from typing import Any

import structlog

from loramux.server.observability.records import RequestRecord

logger = structlog.get_logger(__name__)


class RequestLog:
    """Writes the lines. None holds a prompt, an output or an error's message, which may quote the
    prompt.
    """

    def on_ended(self, record: RequestRecord) -> None:
        """Write a request's line."""
        logger.info("request ended", **_facts(record))


def _facts(record: RequestRecord) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "request_id": record.request_id,
        "tenant": record.tenant,
        "adapters": list(record.adapters),
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "output_tokens": record.num_output_tokens,
        "reasons": list(record.reasons),
        "seconds": round(record.seconds, 4),
    }
    if record.call.caller.key_id:
        facts["key"] = record.call.caller.key_id
    if record.first_token_s is not None:
        facts["first_token_seconds"] = round(record.first_token_s, 4)
    if record.is_failed:
        facts["error"] = type(record.error).__name__
        facts["field"] = getattr(record.error, "field", None)
    if record.trace_id:
        facts["trace_id"] = record.trace_id
    return facts
