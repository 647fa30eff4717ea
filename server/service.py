"""What the server does, without any wire: gRPC and HTTP both translate to these calls.

Tokenises, applies stop strings and limits, resolves adapter names, and gives every request
exactly one end. Knows no protobuf, no Prometheus and no tensors.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from lora_runtime.core import AdapterUse, Request, SamplingParams
from lora_runtime.engine.client import EngineClient, EngineInfo
from lora_runtime.errors import InvalidRequest, Unavailable
from lora_runtime.text.detokenizer import Detokenizer
from lora_runtime.text.tokenizer import Tokenizer
from server.calls import (
    AdapterRecord,
    AdapterState,
    ChatPrompt,
    Event,
    Finished,
    GenerateCall,
    Prompt,
    ServerInfo,
    Started,
    TextPrompt,
    TokenPrompt,
)
from server.output import OutputText, RequestMeter, RequestObserver
from server.registry import Registry
from server.sources import Sources

__all__ = ["RequestObserver", "Service"]

LONG_TEXT = 2_000
"""Characters from which tokenising leaves the event loop; below, a thread costs more."""

PACKAGES = ("loramux", "torch", "transformers", "bitsandbytes", "grpcio", "protobuf")


class Service:
    """The use cases of one server."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        tokenizer: Tokenizer,
        registry: Registry,
        sources: Sources,
        observer: RequestObserver,
        base_name: str,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._registry = registry
        self._sources = sources
        self._observer = observer
        self._base_name = base_name
        self._versions = installed_versions()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Event, None]:
        """Stream a request's events; closing the generator frees its row within one step.

        Raises InvalidRequest, AdapterNotFound, Overloaded or Unavailable before `Started`; later
        failures are raised in place of `Finished`.
        """
        deadline = None if call.timeout_s is None else time.monotonic() + call.timeout_s
        prompt = await self.tokenize(call.prompt)
        sampling = self._sampling(call, len(prompt))
        # Nothing may be awaited from here to the engine: the name could be unloaded meanwhile.
        record = self._record(call.adapter)
        request = Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            adapters=(AdapterUse(digest=record.digest),) if record else (),
            deadline=deadline,
        )
        meter = RequestMeter(self._observer, call.adapter, len(prompt))
        with self._registry.in_flight(record), meter:
            async with aclosing(self._run(request, call, meter)) as events:
                async for event in events:
                    yield event

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids. Raises InvalidRequest naming the prompt's field."""
        if prompt.is_empty:
            raise InvalidRequest(f"{prompt.field} is empty", field=prompt.field)
        match prompt:
            case TextPrompt(text=text) if len(text) < LONG_TEXT:
                return self._tokenizer.encode(text)
            case TextPrompt(text=text):
                return await asyncio.to_thread(self._tokenizer.encode, text)
            case ChatPrompt(messages=messages):
                return await asyncio.to_thread(self._tokenizer.apply_chat_template, messages)
            case TokenPrompt(token_ids=token_ids):
                return self._checked(token_ids)

    async def load_adapter(
        self, name: str, source: str, *, replace: bool = False
    ) -> tuple[AdapterRecord, bool]:
        """Load a client-given folder under a name; see `Sources.resolve` and `Registry.load`."""
        folder = await asyncio.to_thread(self._sources.resolve, source)
        return await self._registry.load(name, folder, source=source, replace=replace)

    async def unload_adapter(
        self, name: str, *, cancel: bool = False, wait: bool = False
    ) -> AdapterRecord:
        """Take a name away; see `Registry.unload`."""
        return await self._registry.unload(name, cancel=cancel, wait=wait)

    def list_adapters(self) -> list[AdapterRecord]:
        """Return every adapter by name."""
        return self._registry.records()

    def get_adapter(self, name: str) -> AdapterRecord:
        """Return one adapter. Raises AdapterNotFound."""
        return self._registry.get(name)

    def server_info(self) -> ServerInfo:
        """Return facts about this server."""
        records = self._registry.records()
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

    def _record(self, adapter: str | None) -> AdapterRecord | None:
        if adapter is None:
            return None
        return self._registry.resolve(adapter, field="adapters[0].name")

    def _checked(self, token_ids: tuple[int, ...]) -> list[int]:
        vocab_size = self._engine.info.base.vocab_size
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"token_ids[{index}] is {token_id}; the base has {vocab_size} tokens",
                    field="token_ids",
                )
        return list(token_ids)

    def _sampling(self, call: GenerateCall, num_prompt_tokens: int) -> SamplingParams:
        """The request's parameters with the defaults that depend on prompt and base filled in."""
        limit = token_limit(self._engine.info)
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
        end_ids = frozenset() if call.ignore_eos else self._tokenizer.eos_token_ids
        return replace(
            call.sampling,
            max_tokens=min(wanted, room),
            stop_token_ids=call.sampling.stop_token_ids | end_ids,
        )

    async def _run(
        self, request: Request, call: GenerateCall, meter: RequestMeter
    ) -> AsyncGenerator[Event, None]:
        """Stream the engine's outputs as events; the row is free before Finished is given out."""
        num_prompt_tokens = len(request.prompt_token_ids)
        detokenizer = Detokenizer(self._tokenizer, request.prompt_token_ids, call.stop)
        text = OutputText(detokenizer, request.sampling.stop_token_ids)
        reason, timing, is_started = None, None, False
        async with aclosing(self._engine.generate(request)) as outputs:
            async for output in outputs:
                if not is_started:
                    is_started = True
                    yield Started(
                        request_id=call.request_id or request.request_id,
                        num_prompt_tokens=num_prompt_tokens,
                    )
                meter.tokens(len(output.token_ids))
                if delta := text.push(output):
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
            finish_reason=reason,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=meter.num_output_tokens,
            timing=timing,
        )


def token_limit(info: EngineInfo) -> int:
    """Return the most tokens one request may have: the model's limit, or the KV cache's."""
    return min(info.max_model_len, info.num_blocks * info.block_size)


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide how a server behaves."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
