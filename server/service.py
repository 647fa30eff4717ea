"""What the server does, in no wire format, by its parts: gRPC's servicers, HTTP's routes and the
page translate to calls of those that they use. No part knows protobuf, Prometheus or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_runtime.engine.client import EngineClient
from lora_runtime.text.chat_output import AS_TEMPLATES_SAY, Parsers
from lora_runtime.text.text_workers import OwnText
from lora_runtime.text.tokenizer import Tokenizer
from loramux.server.access.caller import Caller
from loramux.server.access.quotas import Quotas
from loramux.server.adapters.adapters import Adapters
from loramux.server.adapters.changes import NameChanges
from loramux.server.adapters.loads import Loads
from loramux.server.adapters.on_demand import OnDemand
from loramux.server.adapters.registry import Registry
from loramux.server.adapters.sources import Sources
from loramux.server.adapters.sources.remote import RemoteSources
from loramux.server.adapters.uploads import AdapterStore
from loramux.server.calls import AdapterState, ServerInfo
from loramux.server.generation.generation import Generation
from loramux.server.generation.prompts import Prompts
from loramux.server.observability.observers import RequestObserver
from loramux.server.observability.records import RequestWatcher
from loramux.server.versions import installed_versions


class ServerFacts:
    """What a server is."""

    def __init__(
        self, engine: EngineClient, adapters: Adapters, tokenizer: Tokenizer, base_name: str
    ) -> None:
        self.base_name = base_name
        """The base's name, which no adapter may have."""
        self._engine = engine
        self._adapters = adapters
        self._tokenizer = tokenizer
        self._versions = installed_versions()

    def info(self, caller: Caller) -> ServerInfo:
        """Return facts about this server, of adapters as far as the caller may see them."""
        records = self._adapters.records(caller)
        return ServerInfo(
            versions=self._versions,
            base_name=self.base_name,
            engine=self._engine.info,
            has_chat_template=self._tokenizer.has_chat_template,
            num_loaded_adapters=sum(r.state is AdapterState.LOADED for r in records),
        )

    def is_alive(self) -> bool:
        """Tell whether the engine works; health follows it."""
        return self._engine.stats().is_alive


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of one server."""

    facts: ServerFacts
    prompts: Prompts
    generation: Generation
    adapters: Adapters
    loads: Loads
    on_demand: OnDemand

    async def close(self) -> None:
        """End the loads that nobody waits for, and the processes that try definitions of forms."""
        await self.on_demand.close()
        self.generation.close()


def build_service(
    *,
    engine: EngineClient,
    tokenizer: Tokenizer,
    own_text: OwnText,
    registry: Registry,
    changes: NameChanges,
    sources: Sources,
    store: AdapterStore,
    observer: RequestObserver,
    base_name: str,
    parsers: Parsers = AS_TEMPLATES_SAY,
    watchers: Sequence[RequestWatcher] = (),
    remote: RemoteSources | None = None,
    on_demand: Mapping[str, str] | None = None,
) -> Service:
    """Put the parts together. Without `remote` every source elsewhere is refused; `on_demand` as in
    `OnDemand`.
    """
    quotas, prompts = Quotas(), Prompts(tokenizer, own_text, engine.info)
    loads = Loads(
        registry=registry,
        changes=changes,
        own_text=own_text,
        sources=sources,
        store=store,
        remote=remote or RemoteSources(store),
        quotas=quotas,
    )
    loaded_on_demand = OnDemand(on_demand or {}, registry, loads)
    adapters = Adapters(
        registry=registry,
        changes=changes,
        loads=loads,
        on_demand=loaded_on_demand,
        store=store,
    )
    generation = Generation(
        engine=engine,
        tokenizer=tokenizer,
        prompts=prompts,
        registry=registry,
        on_demand=loaded_on_demand,
        quotas=quotas,
        observer=observer,
        watchers=watchers,
        base_name=base_name,
        parsers=parsers,
    )
    facts = ServerFacts(engine, adapters, tokenizer, base_name)
    return Service(facts, prompts, generation, adapters, loads, loaded_on_demand)
