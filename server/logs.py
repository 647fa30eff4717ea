"""One log for everything in the process: structlog's events and the libraries' records alike.

No prompt or output is ever an event's value, and tracebacks show no local variables.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor

from lora_runtime.terminal import shown

TRANSFER_LIBRARIES = (
    "aiobotocore",
    "aiohttp",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "httpcore2",
    "httpx2",
    "s3fs",
    "urllib3",
)
"""Their finer messages have signed URLs and tokens in them."""

_SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)


def setup_logging(*, level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Log to `stream` (stderr) as JSON or for people; `auto` picks by whether it is a terminal.

    Libraries are heard from `warning` on, or from `debug` on when `level` is debug, but for those
    that fetch adapters: from `warning` on in any case.
    """
    stream = stream or sys.stderr
    is_json = log_format == "json" or (log_format == "auto" and not stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *(_json() if is_json else _console(stream)),
            ],
        )
    )
    logging.basicConfig(
        handlers=[handler], level="DEBUG" if level == "debug" else "WARNING", force=True
    )
    logging.getLogger("loramux").setLevel(level.upper())
    for name in TRANSFER_LIBRARIES:
        logging.getLogger(name).setLevel("WARNING")
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


def _without_control_characters(_: object, __: str, event: EventDict) -> EventDict:
    """Show what clients sent, like an adapter's source, so that no terminal acts on it."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = shown(value)
    return event


def _json() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _console(stream: TextIO) -> list[Processor]:
    plain = structlog.dev.plain_traceback
    return [
        _without_control_characters,
        structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain),
    ]
