"""Generation: one call for text becomes requests to the engine, and their outputs its events."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from lora_runtime.core import Request, SamplingParams, StructuredOutput
from lora_runtime.engine.client import EngineClient
from lora_runtime.engine.queue_places import check_place
from lora_runtime.engine.request_rules import (
    check_num_outputs,
    params_of_outputs,
    request_notes,
    uses,
    with_ends,
)
from lora_runtime.errors import InvalidRequest, PromptTooLong, Unavailable
from lora_runtime.text.chat_output import PLAIN, ChatAnswer, Parsers, chat_answer
from lora_runtime.text.chat_prompt import ChatPrompt
from lora_runtime.text.detokenizer import Detokenizer
from lora_runtime.text.output_text import OutputText
from lora_runtime.text.structure_compiler import StructureCompiler
from lora_runtime.text.structured_output import Structure
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.tokenizer import Tokenizer
from loramux.server.access.audit import missing_logged
from loramux.server.access.places import TenantPlaces
from loramux.server.access.quotas import Quotas, Spend
from loramux.server.adapters.on_demand import OnDemand
from loramux.server.adapters.registry import Registry
from loramux.server.calls import (
    AdapterRecord,
    Delta,
    Event,
    Finished,
    GenerateCall,
    Prompt,
    PromptLogprobs,
    Started,
)
from loramux.server.generation.composition import depth, text_side
from loramux.server.generation.merging import merged
from loramux.server.generation.output import RequestMeter, delta_of
from loramux.server.generation.prompts import Prompts
from loramux.server.observability.observers import RequestObserver
from loramux.server.observability.records import RequestWatcher, watched

MAX_COMPILING = 4
"""Forms that are compiled or about to be; two processes try them."""
MAX_WAITING_FORMS = 256


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a call's texts mean to the adapters that are to answer it."""

    token_ids: tuple[int, ...]
    records: list[AdapterRecord]
    side: TextSide | None
    """Their own text side; None: the base's."""
    answer: ChatAnswer
    form: StructuredOutput | None
    """What outputs must look like, as it was asked for or as the tools want it."""
    structure: Structure | None
    """The form, compiled."""


class Generation:
    """Runs calls for text, each within its tenant's quotas, to exactly one end for each output."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        tokenizer: Tokenizer,
        prompts: Prompts,
        registry: Registry,
        on_demand: OnDemand,
        quotas: Quotas,
        observer: RequestObserver,
        watchers: Sequence[RequestWatcher] = (),
        base_name: str,
        parsers: Parsers,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._registry = registry
        self._on_demand = on_demand
        self._quotas = quotas
        self._observer = observer
        self._watchers = watchers
        self._base_name = base_name
        self._parsers = parsers
        self._structures = StructureCompiler(
            lambda: tokenizer.vocabulary(engine.info.base.vocab_size)
        )
        self._compiling = TenantPlaces(
            "forms", "are being compiled", MAX_COMPILING, max_waiting=MAX_WAITING_FORMS
        )
        self._preparing: Counter[str] = Counter()
        """Outputs whose prompts are being made, by client."""

    def prepare(self) -> None:
        """Do what the first request of its kind would hold all others up for; see
        `StructureCompiler.prepare`.
        """
        self._structures.prepare()

    def close(self) -> None:
        """End the processes that try definitions of forms."""
        self._structures.close()

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
        with place, self._registry.wanted(filter(call.caller.sees, names)):
            await self._on_demand.ensure(names, call.caller, deadline)
            prepared = await self._prepare(call)
        # Nothing may be awaited from here to the engine: a name could be unloaded meanwhile.
        first = self._request(call, prepared, deadline)
        started = _started(call, first.request_id, prepared)
        requests = _requests(first, call.num_outputs)
        outputs = [
            self._run(request, index, call, started, prepared)
            for index, request in enumerate(requests)
        ]
        has_prompt = first.sampling.num_prompt_logprobs is not None
        spend(len(first.prompt_token_ids) * call.num_outputs)  # each output is a request of its own
        request_ids = [request.request_id for request in requests]
        with self._registry.in_flight(prepared.records, request_ids, call.caller.tenant):
            events = merged(outputs, has_prompt) if len(outputs) > 1 else outputs[0]
            async with aclosing(events):
                async for event in events:
                    yield event

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

    async def _prepare(self, call: GenerateCall) -> _Prepared:
        """Make a call's tokens and the form of its outputs by the text side of its adapters: a name
        may be swapped while they are made, and then they are made again.
        """
        side = text_side(self._records(call), call.uses_base_text)
        while True:
            token_ids = await self._prompts.tokenize(call.prompt, side)
            self._room(call, len(token_ids), self._records(call))  # what is too long has no form
            answer = self._answer(call.prompt, token_ids, side)
            answer, form = answer.with_form(call.sampling.structured_output)
            structure = None
            if form is not None:
                tenant = call.caller.tenant
                with answer.naming_tools():
                    structure = await self._structures.compile(
                        form,
                        side,
                        answer.thinking,
                        owner=tenant,
                        place=self._compiling.waited_for(tenant),
                    )
            records, used = self._records(call), side
            side = text_side(records, call.uses_base_text)
            if side == used:
                return _Prepared(tuple(token_ids), records, side, answer, form, structure)

    def _answer(
        self, prompt: Prompt, token_ids: Sequence[int], side: TextSide | None
    ) -> ChatAnswer:
        if not isinstance(prompt, ChatPrompt):
            return PLAIN
        return chat_answer(prompt, token_ids, self._tokenizer, side, self._parsers)

    def _records(self, call: GenerateCall) -> list[AdapterRecord]:
        found = []
        for index, choice in enumerate(call.adapters):
            with missing_logged(call.caller, choice.name):
                field, sees = f"adapters[{index}].name", call.caller.sees
                found.append(self._registry.resolve(choice.name, field=field, sees=sees))
        return found

    def _request(self, call: GenerateCall, prepared: _Prepared, deadline: float | None) -> Request:
        """The request of a call's first output."""
        return Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prepared.token_ids,
            sampling=self._sampling(call, prepared),
            adapters=uses([record.digest for record in prepared.records], call.adapters),
            structure=prepared.structure,
            cache_salt=call.caller.cache_salt(call.cache_salt),
            cache_owner=call.caller.tenant,
            client=call.client,
            weight=call.caller.limits.weight,
            priority=call.priority,
            deadline=deadline,
        )

    def _room(
        self, call: GenerateCall, num_prompt_tokens: int, records: list[AdapterRecord]
    ) -> int:
        """Tokens that fit after a prompt. Raises PromptTooLong where there are none."""
        limit = self._engine.info.token_limit(depth(records))
        if num_prompt_tokens >= limit:
            raise PromptTooLong(
                f"{call.prompt.field} has {num_prompt_tokens} tokens; at most {limit - 1} fit",
                field=call.prompt.field,
            )
        return limit - num_prompt_tokens

    def _sampling(self, call: GenerateCall, prepared: _Prepared) -> SamplingParams:
        """The request's parameters with the defaults that depend on prompt and base filled in."""
        num_prompt_tokens = len(prepared.token_ids)
        room = self._room(call, num_prompt_tokens, prepared.records)
        wanted = call.sampling.max_tokens
        if call.has_max_tokens and wanted > room:
            raise InvalidRequest(
                f"sampling.max_tokens is {wanted}; after a prompt of {num_prompt_tokens} tokens "
                f"at most {room} fit",
                field="sampling.max_tokens",
            )
        ends = () if call.ignore_eos else (prepared.side or self._tokenizer).eos_token_ids
        params = replace(
            call.sampling, max_tokens=min(wanted, room), structured_output=prepared.form
        )
        return with_ends(params, ends, self._engine.info.base.vocab_size)

    async def _run(
        self,
        request: Request,
        index: int,
        call: GenerateCall,
        started: Started,
        prepared: _Prepared,
    ) -> AsyncGenerator[Event, None]:
        """Stream the engine's outputs as events; the row is free before Finished is given out."""
        decoder = prepared.answer.decoder(self._tokenizer, prepared.side)
        detokenizer = Detokenizer(decoder, request.prompt_token_ids, call.stop)
        ends, reader = request.sampling.stop_token_ids, prepared.answer.reader()
        text = OutputText(detokenizer, ends, reader)
        names = tuple(choice.name for choice in call.adapters)
        with RequestMeter(self._observer, names, started.num_prompt_tokens) as meter:
            reason, timing, is_started, num_cached_tokens = None, None, False, 0
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    if not is_started:
                        is_started = True
                        yield replace(started, num_cached_tokens=output.num_cached_tokens)
                    if output.prompt_logprobs is not None:
                        yield PromptLogprobs(logprobs=output.prompt_logprobs)
                    num_cached_tokens = max(num_cached_tokens, output.num_cached_tokens)
                    meter.tokens(len(output.token_ids))
                    delta = delta_of(text, output, index)
                    reason, timing = text.finish_reason, output.timing
                    if delta is not None:
                        yield delta
                    if output.error is not None:
                        raise output.error
                    if reason is not None:
                        break
            if reason is None:
                raise Unavailable("the engine ended the request without a result")
            meter.finish(reason, timing)
            yield Finished(
                index=index,
                finish_reason=reason,
                num_prompt_tokens=started.num_prompt_tokens,
                num_cached_tokens=num_cached_tokens,
                num_output_tokens=meter.num_output_tokens,
                num_reasoning_tokens=text.num_reasoning_tokens,
                timing=timing,
            )


def _started(call: GenerateCall, request_id: str, prepared: _Prepared) -> Started:
    facts = {record.name: record.loaded.facts for record in prepared.records if record.loaded}
    return Started(
        request_id=call.request_id or request_id,
        num_prompt_tokens=len(prepared.token_ids),
        prompt_token_ids=prepared.token_ids,
        side=prepared.side,
        notes=(*request_notes(facts, prepared.token_ids), *prepared.answer.notes),
    )


def _requests(first: Request, num_outputs: int) -> list[Request]:
    """The requests of a call: one for each output."""
    return [
        first if index == 0 else replace(first, request_id=uuid.uuid4().hex, sampling=sampling)
        for index, sampling in enumerate(params_of_outputs(first.sampling, num_outputs))
    ]
