"""Content as a name will hold it: read by the engine, and reviewed beside its tensors."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import structlog

from lora_runtime.core import FolderRules
from lora_runtime.engine.client import EngineClient, LoadedAdapter
from lora_runtime.errors import AdapterRefused, LoramuxError
from lora_runtime.text.text_side import TextSide
from loramux.server.adapters.names import Content
from loramux.server.adapters.sources import without_path
from loramux.server.calls import AdapterRecord, AdapterState

Reviewed: TypeAlias = tuple[TextSide | None, tuple[str, ...]]
Review: TypeAlias = Callable[[LoadedAdapter], Awaitable[Reviewed]]
"""Judges new content beside its tensors: gives its text side and notes, or raises."""
Resolve: TypeAlias = Callable[[str, str], Awaitable[tuple[Path, FolderRules]]]
"""From a name and its source to the folder and what must hold of it."""

logger = structlog.get_logger(__name__)


async def no_review(loaded: LoadedAdapter) -> Reviewed:
    """Take new content as it is."""
    return None, ()


async def read_again(
    engine: EngineClient, name: str, content: Content, resolve: Resolve, review: Review
) -> AdapterRecord:
    """Load what a source holds. Raises AdapterRefused when that is another content by now."""
    folder, rules = await resolve(name, content.source)
    try:
        loaded = await engine.load_adapter(folder, rules)
    except LoramuxError as error:
        raise without_path(error, folder, content.source) from None
    try:
        if not content.is_of(loaded):
            raise _changed(content, loaded)
        reviewed = await reviewed_content(name, folder, content.source, loaded, review)
    except BaseException:
        await engine.unload_adapter(loaded.digest)
        raise
    return new_record(name, content.source, loaded, reviewed)


async def reviewed_content(
    name: str, folder: Path, source: str, loaded: LoadedAdapter, review: Review
) -> Reviewed:
    """Review new content; what is raised shows no path that the client did not write."""
    try:
        return await review(loaded)
    except LoramuxError as error:
        raise without_path(error, folder, source) from None
    except Exception:
        logger.exception("adapter could not be reviewed", adapter=name)
        raise


def new_record(name: str, source: str, loaded: LoadedAdapter, reviewed: Reviewed) -> AdapterRecord:
    """The record of a name that points to this content from now on."""
    text, notes = reviewed
    return AdapterRecord(
        name=name,
        source=source,
        state=AdapterState.LOADED,
        loaded=replace(loaded, text_files={}),  # read by now, and large
        text=text,
        loaded_at_s=time.time(),
        notes=(*loaded.facts.notes, *notes),
    )


def _changed(content: Content, loaded: LoadedAdapter) -> AdapterRefused:
    now, then = f"{loaded.digest[:12]} now", content.digest[:12]
    if loaded.digest == content.digest:
        now, then = "other text files now", "content"
    return AdapterRefused(
        f"source {content.source!r} holds {now}, not the {then} that the name held; load it with "
        "replace to take it",
        field="source",
    )


def public_reason(error: BaseException) -> str:
    """What callers may read of why an adapter is not there."""
    if isinstance(error, LoramuxError):
        return error.message
    return "the server could not read it; its log says why"
