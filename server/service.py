"""What the server does, in no wire format: gRPC's servicers translate to these calls.

Tokenises, applies stop strings and limits, resolves adapter names and their chat templates, and
gives every request exactly one end. Knows no protobuf, no Prometheus and no tensors.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import structlog

from lora_runtime.adapters.host_cache import HOST_BYTES
from lora_runtime.core import ANY_FOLDER, FolderRules, Request, SamplingParams
from lora_runtime.engine.client import EngineClient, LoadedAdapter
from lora_runtime.engine.queue_places import check_place
from lora_runtime.engine.request_rules import (
    check_num_outputs,
    params_of_outputs,
    request_notes,
    uses,
    with_ends,
)
from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import (
    AdapterInUse,
    AdapterNotFound,
    AdapterSourceRefused,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    Unavailable,
)
from lora_runtime.text.detokenizer import Detokenizer
from lora_runtime.text.output_text import OutputText
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.text_workers import OwnText
from lora_runtime.text.token_reader import TokenReader
from lora_runtime.text.tokenizer import Tokenizer, check_messages
from server.access.audit import audited, log_missing
from server.access.caller import Caller
from server.access.quotas import Quotas, Spend
from server.calls import (
    AdapterRecord,
    AdapterState,
    ChatPrompt,
    Delta,
    Event,
    Finished,
    GenerateCall,
    Prompt,
    PromptLimits,
    PromptLogprobs,
    ServerInfo,
    Started,
    StoredAdapter,
    TextPrompt,
    TokenPrompt,
    UploadCall,
)
from server.composition import depth, text_side
from server.merging import merged
from server.observability.records import RequestWatcher, watched
from server.on_demand import OnDemand
from server.output import RequestMeter, RequestObserver, delta_of
from server.registry import Registry, Settle
from server.remote_loads import RemoteLoads
from server.sources import Sources
from server.sources.location import Location, is_remote, parse, pinned
from server.sources.remote import Fetched, RemoteSources
from server.uploads import AdapterStore, Upload, to_the_end
from server.versions import installed_versions

__all__ = ["RequestObserver", "Service"]

T = TypeVar("T")
logger = structlog.get_logger(__name__)

NUM_TOKENISERS = 4
STUCK_S = 10.0
"""Far longer than any one prompt takes."""
HUGE_TEXT = 1 << 18
"""Characters from which texts are tokenised one at a time: what is made of one takes fifty times
its size."""
MAX_WAITING_HUGE = 64
MIN_BYTES_PER_TOKEN = 128
"""A prompt may have so many bytes for each token that fits, if the base's longest has no more: an
adapter may add tokens."""
NUM_DISK_THREADS = 2
MAX_WAITING_DISK = 256

MAX_LOGGED = 200
"""Characters of a refused source in the log."""
LONG_TEXT = 2_000
"""Characters from which tokenising leaves the event loop; below, a thread costs more."""


class Service:
    """The use cases of one server."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        tokenizer: Tokenizer,
        own_text: OwnText,
        registry: Registry,
        sources: Sources,
        store: AdapterStore,
        observer: RequestObserver,
        base_name: str,
        watchers: Sequence[RequestWatcher] = (),
        remote: RemoteSources | None = None,
        on_demand: Mapping[str, str] | None = None,
    ) -> None:
        """Without `remote` every source elsewhere is refused; `on_demand` as in `OnDemand`."""
        self._quotas = Quotas()
        self._engine = engine
        self._tokenizer = tokenizer
        self._own_text = own_text
        self._registry = registry
        self._sources = sources
        self._store = store
        self._remote = remote or RemoteSources(store)
        self._remote_loads = RemoteLoads(self._remote, registry)
        self._on_demand = OnDemand(on_demand or {}, registry, self._load_on_demand)
        self._observer = observer
        self._watchers = watchers
        self._base_name = base_name
        self._versions = installed_versions()
        self._tokenisers = WorkerPool(
            "tokenising", num_threads=NUM_TOKENISERS, max_waiting=engine.info.max_queued_requests
        )
        self._disk = WorkerPool(
            "the disk", num_threads=NUM_DISK_THREADS, max_waiting=MAX_WAITING_DISK
        )
        self._huge_texts = WorkerPool(
            "tokenising long texts", num_threads=1, max_waiting=MAX_WAITING_HUGE
        )
        num_tokens = engine.info.token_limit() - 1
        longest = max(tokenizer.longest_token, MIN_BYTES_PER_TOKEN)
        self.prompt_limits = PromptLimits(num_tokens, num_tokens * longest)
        self._preparing: Counter[str] = Counter()
        """Outputs whose prompts are being made, by client."""

    def generate(self, call: GenerateCall) -> AsyncGenerator[Event, None]:
        """Stream a request's events; closing the generator frees its row within one step.

        Raises InvalidRequest, AdapterNotFound, Overloaded or Unavailable before `Started`; later
        failures are raised in place of `Finished`.
        """
        events = self._within_quotas(call)
        if not self._watchers:
            return events
        return watched(call, self._base_name, events, self._watchers)

    async def _within_quotas(self, call: GenerateCall) -> AsyncGenerator[Event, None]:
        check_num_outputs(call.num_outputs)
        with self._quotas.request(call.caller, call.num_outputs) as spend:
            async with aclosing(self._generate(call, spend)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        spend(len(event.token_ids))
                    yield event

    async def _generate(self, call: GenerateCall, spend: Spend) -> AsyncGenerator[Event, None]:
        """`spend` is told of the prompt when it goes to the engine, which reads it whether or not
        the caller stays for the answer.
        """
        deadline = None if call.timeout_s is None else time.monotonic() + call.timeout_s
        names = [choice.name for choice in call.adapters]
        place = self._place(call.client, call.num_outputs)
        with place, self._registry.wanted(names):
            await self._on_demand.ensure(names, call.caller.sees, deadline)
            prompt, records, side = await self._prepare(call)
        # Nothing may be awaited from here to the engine: a name could be unloaded meanwhile.
        sampling = self._sampling(call, len(prompt), depth(records), side)
        first = Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            adapters=uses([record.digest for record in records], call.adapters),
            cache_salt=call.caller.cache_salt(call.cache_salt),
            client=call.client,
            weight=call.caller.limits.weight,
            priority=call.priority,
            deadline=deadline,
        )
        facts = {record.name: record.loaded.facts for record in records if record.loaded}
        started = Started(
            request_id=call.request_id or first.request_id,
            num_prompt_tokens=len(prompt),
            prompt_token_ids=first.prompt_token_ids,
            side=side,
            notes=tuple(request_notes(facts, prompt)),
        )
        outputs = [
            self._run(request, index, call, started, side)
            for index, request in enumerate(_requests(first, call.num_outputs))
        ]
        has_prompt = sampling.num_prompt_logprobs is not None
        spend(len(prompt) * call.num_outputs)  # each output is a request of its own
        with self._registry.in_flight(records):
            events = merged(outputs, has_prompt) if len(outputs) > 1 else outputs[0]
            async with aclosing(events):
                async for event in events:
                    yield event

    async def tokenize(self, prompt: Prompt, side: TextSide | None = None) -> list[int]:
        """Return a prompt's token ids, as an adapter's own text side makes them or as the base.

        Raises InvalidRequest naming the prompt's field.
        """
        if prompt.is_empty:
            raise InvalidRequest(f"{prompt.field} is empty", field=prompt.field)
        match prompt:
            case TextPrompt(text=text) if side is not None and side.tokenizer is not None:
                return await self._own_text.encode(side, text)
            case TextPrompt(text=text) if len(text) < LONG_TEXT:
                return self._tokenizer.encode(text)
            case TextPrompt(text=text):
                return await self._tokenised(len(text), self._tokenizer.encode, text)
            case ChatPrompt(messages=messages) if side is not None and side.renders_chats:
                check_messages(messages)
                rendered = await self._own_text.render(side, messages)
                if isinstance(rendered, list):
                    return rendered
                encode = self._tokenizer.encode_rendered
                return await self._tokenised(len(rendered), encode, rendered)
            case ChatPrompt(messages=messages):
                size = sum(len(message["content"]) for message in messages)
                apply = self._tokenizer.apply_chat_template
                return await self._tokenised(size, apply, messages)
            case TokenPrompt(token_ids=token_ids):
                return self._checked(token_ids)

    async def _tokenised(
        self, num_characters: int, function: Callable[[T], list[int]], prompt: T
    ) -> list[int]:
        pool = self._tokenisers if num_characters < HUGE_TEXT else self._huge_texts
        return await pool.run(function, prompt)

    async def load_adapter(
        self,
        caller: Caller,
        name: str,
        source: str,
        *,
        replace: bool = False,
        pin: bool = False,
    ) -> tuple[AdapterRecord, bool]:
        """Load a client-given source under a name; see `Sources.resolve`, `RemoteSources.fetch` and
        `Registry.load`. What lies elsewhere is fetched anew if it has changed there.

        Raises PermissionDenied, as all that changes something does.
        """
        with audited(caller, "load", adapter=name, source=source), _refusals_logged(name, source):
            caller.check_manages(name)
            caller.check_source(source)
            self._on_demand.forget(name)
            location = self._remote.check(source) if is_remote(source) else None
            with self._counted(caller, name):
                if location is not None:
                    return await self._load_remote(name, location, replace=replace, pin=pin)
                return await self._load_folder(name, source, replace=replace, pin=pin)

    async def upload_adapter(
        self, caller: Caller, call: UploadCall, data: AsyncIterator[bytes]
    ) -> AdapterRecord:
        """Receive an adapter's files, load them like a folder, and keep them in the store.

        Its source is then the store's name of the content, which `load_adapter` takes again. What
        fails or is cancelled leaves nothing in the store; see `AdapterStore.receive` and
        `Registry.load` for what is raised.
        """
        logged = _refusals_logged(call.name, "an upload")
        with audited(caller, "upload", adapter=call.name), logged:
            caller.check_manages(call.name, field="start.name")
            self._registry.check_name(call.name)
            with self._counted(caller, call.name):
                async with self._store.receive(call, data) as upload:
                    num_bytes = sum(file.num_bytes for file in call.files)
                    logger.info(
                        "adapter uploaded", adapter=call.name, source=upload.digest, bytes=num_bytes
                    )
                    return await to_the_end(self._load_upload(call, upload))

    async def preload(self, name: str, source: Path | str) -> None:
        """Load a source that the operator named, wherever it lies, in place of what the name held.

        What is elsewhere and cannot be fetched now is no error where the name holds what was
        fetched from there before. Raises as `load_adapter`.
        """
        if isinstance(source, Path):
            await self._load(name, source, str(source.absolute()), True, ANY_FOLDER, pin=None)
            return
        location = parse(source)
        try:
            await self._load_remote(name, location, replace=True, pin=None)
        except Unavailable as error:
            if not self._registry.holds_source(name, location.text):
                raise
            logger.warning("adapter not fetched again", adapter=name, error=error.message)

    async def restore_adapters(self, preloaded: Mapping[str, Path | str]) -> None:
        """Load again what the names held before a restart; see `Registry.restore`. `preloaded`:
        what the operator names for `preload`, so that it is read wherever it lies.
        """

        async def resolve(name: str, source: str) -> tuple[Path, FolderRules]:
            named = preloaded.get(name)
            if isinstance(named, Path) and source == str(named.absolute()):
                return named, ANY_FOLDER
            if is_remote(source):
                return await self._resolve_fetched(source, is_allowed=named is not None)
            try:
                return await self._resolve(source)
            except AdapterSourceRefused as error:
                raise _with_advice(error, name, source) from None

        await self._registry.restore(resolve, self._review, coming=preloaded.keys())

    async def rollback_adapter(self, caller: Caller, name: str) -> AdapterRecord:
        """Give a name its former content back; see `Registry.rollback`."""
        with audited(caller, "rollback", adapter=name):
            caller.check_manages(name)
            return await self._registry.rollback(name)

    async def unload_adapter(
        self, caller: Caller, name: str, *, cancel: bool = False, wait: bool = False
    ) -> AdapterRecord:
        """Take a name away, and end the fetch of what it was to hold; see `Registry.unload`."""
        with audited(caller, "unload", adapter=name):
            caller.check_manages(name)
            if self._remote_loads.end(name) and not self._registry.is_known(name):
                return self._registry.get(name)
            return await self._registry.unload(name, cancel=cancel, wait=wait)

    def detokenize(self, token_ids: tuple[int, ...], side: TextSide | None = None) -> str:
        """Return the text of token ids, as an adapter's own text side has them or as the base.

        Raises InvalidRequest (field `token_ids`).
        """
        decoder = self._tokenizer.with_added(side.added if side else None)
        return decoder.decode(self._checked(token_ids))

    def token_reader(self, side: TextSide | None) -> TokenReader:
        """Return what gives each token's bytes, as an adapter's own text side has them."""
        return self._tokenizer.token_reader(side.added if side else None)

    def side_of(self, caller: Caller, name: str) -> TextSide | None:
        """Return an adapter's own text side; None is the base's. Raises AdapterNotFound (field
        `model`), or Unavailable while it is loaded again after a restart.
        """
        with _missing_logged(caller, name):
            return self._registry.resolve(name, field="model", sees=caller.sees).text

    @property
    def base_name(self) -> str:
        """The base's name, which no adapter may have."""
        return self._base_name

    @property
    def max_store_bytes(self) -> int:
        """The most bytes that the store of uploaded adapters may hold."""
        return self._store.max_bytes

    async def list_stored_adapters(self, caller: Caller) -> list[StoredAdapter]:
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

    async def delete_stored_adapter(self, caller: Caller, source: str) -> StoredAdapter:
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

    async def close(self) -> None:
        """End the loads that nobody waits for."""
        await self._on_demand.close()

    def list_adapters(self, caller: Caller) -> list[AdapterRecord]:
        """Return every adapter that the caller may see, by name."""
        return [record for record in self._registry.records() if caller.sees(record.name)]

    def get_adapter(self, caller: Caller, name: str) -> AdapterRecord:
        """Return one adapter. Raises AdapterNotFound, also for one that the caller may not see."""
        with _missing_logged(caller, name):
            return self._registry.get(name, sees=caller.sees)

    def server_info(self, caller: Caller) -> ServerInfo:
        """Return facts about this server, of adapters as far as the caller may see them."""
        records = self.list_adapters(caller)
        return ServerInfo(
            versions=self._versions,
            base_name=self._base_name,
            engine=self._engine.info,
            has_chat_template=self._tokenizer.has_chat_template,
            num_loaded_adapters=sum(r.state is AdapterState.LOADED for r in records),
        )

    def is_alive(self) -> bool:
        """Tell whether the engine works; health follows it."""
        return self._engine.stats().is_alive

    def is_stuck(self) -> bool:
        """Tell whether conversations wait that nobody renders: none is answered then."""
        return self._tokenisers.is_stuck(STUCK_S)

    async def _load_upload(self, call: UploadCall, upload: Upload) -> AdapterRecord:
        with self._store.in_use(upload.digest):
            record, _ = await self._load(
                call.name,
                upload.folder,
                upload.digest,
                call.replace,
                FolderRules(sha256=upload.digest),
                settle=lambda: self._store.keep(upload),
            )
        return record

    async def _load_folder(
        self, name: str, source: str, *, replace: bool, pin: bool, is_on_demand: bool = False
    ) -> tuple[AdapterRecord, bool]:
        folder, rules = await self._resolve(source)
        with self._store.in_use(rules.sha256):
            return await self._load(
                name, folder, source, replace, rules, pin=pin, is_on_demand=is_on_demand
            )

    async def _load_remote(
        self,
        name: str,
        location: Location,
        *,
        replace: bool,
        pin: bool | None,
        is_on_demand: bool = False,
    ) -> tuple[AdapterRecord, bool]:
        """Fetch an adapter and load it; once it is there, the load is finished in any case."""
        self._registry.check_name(name)
        fetch = self._remote_loads.fetched(name, location, shows_failure=not is_on_demand)
        async with fetch as fetched:
            source = pinned(location.text, fetched.digest)
            folder, rules, settle = await self._fetched_folder(fetched)
            work = self._load(
                name, folder, source, replace, rules, settle, pin=pin, is_on_demand=is_on_demand
            )
            return await to_the_end(work)

    async def _fetched_folder(self, fetched: Fetched) -> tuple[Path, FolderRules, Settle | None]:
        upload = fetched.upload
        if upload is None:
            return *await self._resolve(fetched.digest), None
        rules = FolderRules(sha256=fetched.digest)
        return upload.folder, rules, lambda: self._store.keep(upload)

    async def _load_on_demand(self, name: str, source: str) -> None:
        """Load what a request asked for, from where the operator says that it may be."""
        with _refusals_logged(name, source):
            if is_remote(source):
                await self._load_remote(
                    name, parse(source), replace=False, pin=False, is_on_demand=True
                )
            else:
                await self._load_folder(name, source, replace=False, pin=False, is_on_demand=True)

    async def _resolve_fetched(self, source: str, *, is_allowed: bool) -> tuple[Path, FolderRules]:
        """The store's folder of what was fetched once; it is fetched again if it is not there."""
        location = parse(source)
        if not await self._store.has(location.pin):
            if not is_allowed:
                self._remote.check(source)
            async with self._remote.fetch(location) as fetched:
                if fetched.upload is not None:
                    await self._store.keep(fetched.upload)
        return await self._resolve(location.pin)

    async def _resolve(self, source: str) -> tuple[Path, FolderRules]:
        """From a client-given source to its folder and what must hold of it."""
        folder = await self._disk.run(self._sources.resolve, source)
        return folder, FolderRules(roots=self._sources.roots, sha256=self._store.digest_of(folder))

    async def _load(
        self,
        name: str,
        folder: Path,
        source: str,
        replace: bool,
        rules: FolderRules,
        settle: Settle | None = None,
        *,
        pin: bool | None = None,
        is_on_demand: bool = False,
    ) -> tuple[AdapterRecord, bool]:
        """See `Registry.load`; adapters loaded on demand make room in host memory."""
        while True:
            try:
                return await self._registry.load(
                    name,
                    folder,
                    source=source,
                    replace=replace,
                    review=self._review,
                    rules=rules,
                    settle=settle,
                    pin=pin,
                    is_on_demand=is_on_demand,
                )
            except Overloaded as error:
                is_full = error.field == HOST_BYTES
                if not (is_full and await self._registry.unload_unused()):
                    raise

    def _counted(self, caller: Caller, name: str) -> AbstractContextManager[None]:
        """Count a name that is about to be loaded among its tenant's adapters."""
        held = [r.name for r in self.list_adapters(caller) if r.state is not AdapterState.FAILED]
        return self._quotas.adapter(caller, name, held)

    @contextmanager
    def _place(self, client: str, num_outputs: int) -> Iterator[None]:
        """Count the outputs of a call that wait, or will, for the engine. Raises Overloaded where
        the engine's queue, or the client's part of it, is taken: before anything is done for the
        call.
        """
        stats, preparing = self._engine.stats(), self._preparing
        num_own = stats.waiting_by_client.get(client, 0) + preparing[client]
        num_waiting = stats.num_waiting + preparing.total()
        check_place(self._engine.info.max_queued_requests, num_waiting, num_own, num_outputs)
        preparing[client] += num_outputs
        try:
            yield
        finally:
            self._preparing -= Counter({client: num_outputs})  # and forget who has none

    async def _prepare(
        self, call: GenerateCall
    ) -> tuple[list[int], list[AdapterRecord], TextSide | None]:
        """Return a call's tokens, the adapters that are to answer, and their own text side.

        The tokens are made by that text side: a name may be swapped while they are made, and then
        they are made again.
        """
        side = text_side(self._records(call), call.uses_base_text)
        while True:
            prompt = await self.tokenize(call.prompt, side)
            records, used = self._records(call), side
            side = text_side(records, call.uses_base_text)
            if side == used:
                return prompt, records, side

    def _records(self, call: GenerateCall) -> list[AdapterRecord]:
        found = []
        for index, choice in enumerate(call.adapters):
            with _missing_logged(call.caller, choice.name):
                field, sees = f"adapters[{index}].name", call.caller.sees
                found.append(self._registry.resolve(choice.name, field=field, sees=sees))
        return found

    async def _review(self, loaded: LoadedAdapter) -> tuple[TextSide | None, tuple[str, ...]]:
        """Read an adapter's own text files. Raises AdapterRefused."""
        if not loaded.text_files:
            return None, ()
        return await self._own_text.read(loaded.text_files, loaded.facts.text_sha256)

    def _checked(self, token_ids: tuple[int, ...]) -> list[int]:
        vocab_size = self._engine.info.base.vocab_size
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"token_ids[{index}] is {token_id}; the base has {vocab_size} tokens",
                    field="token_ids",
                )
        return list(token_ids)

    def _sampling(
        self,
        call: GenerateCall,
        num_prompt_tokens: int,
        num_layers: int,
        side: TextSide | None,
    ) -> SamplingParams:
        """The request's parameters with the defaults that depend on prompt and base filled in."""
        limit = self._engine.info.token_limit(num_layers)
        room = limit - num_prompt_tokens
        if room < 1:
            raise InvalidRequest(
                f"{call.prompt.field} has {num_prompt_tokens} tokens; at most {limit - 1} fit",
                field=call.prompt.field,
            )
        wanted = call.sampling.max_tokens
        if call.has_max_tokens and wanted > room:
            raise InvalidRequest(
                f"sampling.max_tokens is {wanted}; after a prompt of {num_prompt_tokens} tokens "
                f"at most {room} fit",
                field="sampling.max_tokens",
            )
        ends = () if call.ignore_eos else (side or self._tokenizer).eos_token_ids
        params = replace(call.sampling, max_tokens=min(wanted, room))
        return with_ends(params, ends, self._engine.info.base.vocab_size)

    async def _run(
        self,
        request: Request,
        index: int,
        call: GenerateCall,
        started: Started,
        side: TextSide | None,
    ) -> AsyncGenerator[Event, None]:
        """Stream the engine's outputs as events; the row is free before Finished is given out."""
        decoder = self._tokenizer.with_added(side.added if side else None)
        detokenizer = Detokenizer(decoder, request.prompt_token_ids, call.stop)
        text = OutputText(detokenizer, request.sampling.stop_token_ids)
        names = tuple(choice.name for choice in call.adapters)
        with RequestMeter(self._observer, names, started.num_prompt_tokens) as meter:
            reason, timing, is_started = None, None, False
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    if not is_started:
                        is_started = True
                        yield started
                    if output.prompt_logprobs is not None:
                        yield PromptLogprobs(logprobs=output.prompt_logprobs)
                    meter.tokens(len(output.token_ids))
                    if delta := delta_of(text, output, index):
                        yield delta
                    if output.error is not None:
                        raise output.error
                    reason, timing = text.finish_reason(output), output.timing
                    if reason is not None:
                        break
            if reason is None:
                raise Unavailable("the engine ended the request without a result")
            meter.finish(reason, timing)
            yield Finished(
                index=index,
                finish_reason=reason,
                num_prompt_tokens=started.num_prompt_tokens,
                num_output_tokens=meter.num_output_tokens,
                timing=timing,
            )


def _requests(first: Request, num_outputs: int) -> list[Request]:
    """The requests of a call: one for each output."""
    return [
        first if index == 0 else replace(first, request_id=uuid.uuid4().hex, sampling=sampling)
        for index, sampling in enumerate(params_of_outputs(first.sampling, num_outputs))
    ]


@contextmanager
def _missing_logged(caller: Caller, name: str) -> Iterator[None]:
    try:
        yield
    except AdapterNotFound as error:
        log_missing(caller, name, error)
        raise


@contextmanager
def _refusals_logged(name: str, source: str) -> Iterator[None]:
    """Log why an adapter is not loaded; what is loaded the registry logs."""
    source = source[:MAX_LOGGED]  # what a client wrote, of any length
    try:
        yield
    except LoramuxError as error:
        logger.warning("adapter refused", adapter=name, source=source, error=error.message)
        raise
    except asyncio.CancelledError:
        logger.info("adapter load left by its caller", adapter=name, source=source)
        raise


def _with_advice(error: AdapterSourceRefused, name: str, source: str) -> AdapterSourceRefused:
    """Add advice to an error after a restart, which does not find a folder of --adapter."""
    if not Path(source).is_absolute():
        return error
    advice = f"start with --adapter {name}=PATH or its folder below --adapter-roots, or unload it"
    return AdapterSourceRefused(f"{error.message}: {advice}", field=error.field)
