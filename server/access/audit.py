"""The audit log: who changed what, and who was turned away. No keys, prompts or outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from lora_runtime.errors import AdapterNotFound, LoramuxError, Unauthenticated
from loramux.server.access.caller import Caller

MAX_LOGGED = 200
"""Characters of what a client wrote."""

logger = structlog.get_logger(__name__)


@contextmanager
def audited(caller: Caller, action: str, **objects: str) -> Iterator[None]:
    """Log what a caller does to the server's adapters, and how it ends."""
    try:
        yield
    except BaseException as error:
        _log(caller, action, outcome=type(error).__name__, **objects)
        raise
    _log(caller, action, outcome="done", **objects)


def log_stranger(peer: str, action: str, error: Unauthenticated) -> None:
    """Log a call without a key that is known."""
    logger.warning(
        "audit", action=action, peer=peer, outcome=type(error).__name__, why=error.message
    )


def log_refusal(caller: Caller, action: str, error: LoramuxError) -> None:
    """Log a call that its caller's key is not for."""
    _log(caller, action, outcome=type(error).__name__)


@contextmanager
def missing_logged(caller: Caller, name: str) -> Iterator[None]:
    """Log that an adapter is not there for its caller; why not is only said here."""
    try:
        yield
    except AdapterNotFound as error:
        if caller.key_id:
            why = "not loaded" if caller.sees(name) else "not of this key"
            _log(caller, "use adapter", outcome=type(error).__name__, adapter=name, why=why)
        raise


def _log(caller: Caller, action: str, outcome: str, **facts: str) -> None:
    logger.info(
        "audit",
        action=action,
        key=caller.key_id,
        tenant=caller.tenant,
        peer=caller.peer,
        outcome=outcome,
        **{name: fact[:MAX_LOGGED] for name, fact in facts.items()},
    )
