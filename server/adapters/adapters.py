"""What callers do with adapters: each call is held against the caller's rights and quota, and what
changes something is in the audit log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import structlog

from lora_runtime.errors import AdapterInUse
from lora_runtime.text.text_side import TextSide
from loramux.server.access.audit import audited, missing_logged
from loramux.server.access.caller import Caller
from loramux.server.adapters.changes import NameChanges
from loramux.server.adapters.loads import Loads, refusals_logged
from loramux.server.adapters.on_demand import OnDemand
from loramux.server.adapters.registry import Registry
from loramux.server.adapters.uploads import AdapterStore, to_the_end
from loramux.server.calls import AdapterRecord, StoredAdapter, UploadCall

logger = structlog.get_logger(__name__)


class Adapters:
    """A server's adapters, as far as each caller may see and change them."""

    def __init__(
        self,
        *,
        registry: Registry,
        changes: NameChanges,
        loads: Loads,
        on_demand: OnDemand,
        store: AdapterStore,
    ) -> None:
        self._registry = registry
        self._changes = changes
        self._loads = loads
        self._on_demand = on_demand
        self._store = store

    def records(self, caller: Caller) -> list[AdapterRecord]:
        """Return every adapter that the caller may see, by name."""
        return [record for record in self._registry.records() if caller.sees(record.name)]

    def get(self, caller: Caller, name: str) -> AdapterRecord:
        """Return one adapter. Raises AdapterNotFound, also for one that the caller may not see."""
        with missing_logged(caller, name):
            return self._registry.get(name, sees=caller.sees)

    def text_side(self, caller: Caller, name: str) -> TextSide | None:
        """Return an adapter's own text side; None is the base's. Raises AdapterNotFound (field
        `model`), or Unavailable while it is loaded again after a restart.
        """
        with missing_logged(caller, name):
            return self._registry.resolve(name, field="model", sees=caller.sees).text

    async def load(
        self,
        caller: Caller,
        name: str,
        source: str,
        *,
        replace: bool = False,
        pin: bool = False,
    ) -> tuple[AdapterRecord, bool]:
        """Load a client-given source under a name; see `Sources.resolve`, `RemoteSources.fetch` and
        `NameChanges.load`. What lies elsewhere is fetched anew if it has changed there.

        Raises PermissionDenied, as all that changes something does.
        """
        with audited(caller, "load", adapter=name, source=source), refusals_logged(name, source):
            caller.check_manages(name)
            caller.check_source(source)
            self._on_demand.forget(name)
            location = self._loads.allowed(source)
            with self._loads.counted(caller, name):
                if location is not None:
                    return await self._loads.load_remote(
                        caller, name, location, replace=replace, pin=pin
                    )
                return await self._loads.load_folder(caller, name, source, replace=replace, pin=pin)

    async def upload(
        self, caller: Caller, call: UploadCall, data: AsyncIterator[bytes]
    ) -> AdapterRecord:
        """Receive an adapter's files, load them like a folder, and keep them in the store.

        Its source is then the store's name of the content, which `load` takes again. What
        fails or is cancelled leaves nothing in the store; see `AdapterStore.receive` and
        `NameChanges.load` for what is raised.
        """
        logged = refusals_logged(call.name, "an upload")
        with audited(caller, "upload", adapter=call.name), logged:
            caller.check_manages(call.name, field="start.name")
            self._registry.check_name(call.name)
            with self._loads.counted(caller, call.name):
                async with self._store.receive(call, data, tenant=caller.tenant) as upload:
                    num_bytes = sum(file.num_bytes for file in call.files)
                    logger.info(
                        "adapter uploaded", adapter=call.name, source=upload.digest, bytes=num_bytes
                    )
                    return await to_the_end(self._loads.load_upload(caller, call, upload))

    async def rollback(self, caller: Caller, name: str) -> AdapterRecord:
        """Give a name its former content back; see `NameChanges.rollback`."""
        with audited(caller, "rollback", adapter=name):
            caller.check_manages(name)
            return await self._changes.rollback(name)

    async def unload(
        self, caller: Caller, name: str, *, cancel: bool = False, wait: bool = False
    ) -> AdapterRecord:
        """Take a name away, and end the fetch of what it was to hold; see `NameChanges.unload`."""
        with audited(caller, "unload", adapter=name):
            caller.check_manages(name)
            if self._loads.end_fetch(name) and not self._registry.is_known(name):
                return self._registry.get(name)
            return await self._changes.unload(name, cancel=cancel, wait=wait)

    @property
    def max_store_bytes(self) -> int:
        """The most bytes that the store of uploaded adapters may hold."""
        return self._store.max_bytes

    async def stored(self, caller: Caller) -> list[StoredAdapter]:
        """Return what uploads have left in the store, and which names hold it: to an operator of
        some adapters what their names hold.
        """
        caller.check_manages()
        held, shown = self._registry.holders(), []
        for stored in await self._store.stored():
            names = tuple(filter(caller.sees, held.get(stored.source, ())))
            if names or caller.is_over_all:
                shown.append(replace(stored, adapters=names))
        return shown

    async def delete_stored(self, caller: Caller, source: str) -> StoredAdapter:
        """Delete a content from the store; return what it was. An operator of all adapters may.

        Raises AdapterNotFound, or AdapterInUse while a name holds it or would go back to it.
        """
        with audited(caller, "delete", source=source):
            caller.check_over_all()
            stored = await self._store.find(source)
            if holders := self._registry.holders().get(stored.source):
                raise AdapterInUse(
                    f"{source} is held by {', '.join(holders)[:200]}; unload that first",
                    field="source",
                )
            await self._store.delete(stored)
        logger.info("stored adapter deleted", source=stored.source, bytes=stored.num_bytes)
        return stored
