"""Between protobuf messages and the service's words: pure functions, no I/O.

A field that is defined but not served is refused by name here unless it holds its default, so
that nothing is ever dropped silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lora_runtime.adapters.files.file_names import OPTIONAL_FILES, REQUIRED_FILES
from lora_runtime.core import (
    MAX_BIASES,
    MAX_STOP_TOKEN_IDS,
    AdapterChoice,
    FinishReason,
    RequestTiming,
    SamplingParams,
    StructuredOutput,
    StructureKind,
    TokenLogprob,
)
from lora_runtime.engine.request_rules import (
    check_choices,
    check_count,
    check_stops,
    logit_bias,
)
from lora_runtime.errors import InvalidRequest
from lora_runtime.text.chat_prompt import ChatPrompt, Tool, ToolMode
from loramux.server.access.caller import Caller
from loramux.server.calls import (
    AdapterRecord,
    AdapterState,
    Delta,
    Event,
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
    UploadFile,
)
from loramux.server.fields import adapter_name, check_bytes, check_tokens, printable
from loramux.server.peers import client_address
from loramux.v1 import adapters_pb2, generation_pb2, server_pb2, types_pb2

SAMPLING_SCALARS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "prompt_logprobs",
)
SAMPLING_NAMES = {"logprobs": "num_logprobs", "prompt_logprobs": "num_prompt_logprobs"}
"""Where the engine's name for a scalar differs."""
REFUSED_FEATURES: tuple[str, ...] = ()
FEATURES = (
    "text",
    "messages",
    *(
        f"messages.{name}"
        for name in ("tools", "tool_choice", "parallel_tool_calls", "template_variables")
    ),
    *(f"messages[].{name}" for name in ("tool_calls", "tool_call_id", "name", "reasoning")),
    "token_ids",
    "adapters[].name",
    "adapters[].weight",
    "request_id",
    "cache_salt",
    "priority",
    "tenant",
    "base_text",
    "LoadAdapter.pin",
    "UploadAdapter",
    "RollbackAdapter",
    "ListStoredAdapters",
    "DeleteStoredAdapter",
    *(
        name
        for field in types_pb2.SamplingParams.DESCRIPTOR.fields
        if (name := f"sampling.{field.name}") not in REFUSED_FEATURES
    ),
)
MAX_LIST_BYTES = 4 << 20
"""The largest message that gRPC clients accept by default, in bytes."""
MAX_ABRIDGED_ERROR = 200
MAX_FILES = len(REQUIRED_FILES) + len(OPTIONAL_FILES)
"""Files of an upload: as many as an adapter has at most."""
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)

_FINISH_REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: types_pb2.FINISH_REASON_TOOL_CALLS,
    FinishReason.CANCELLED: types_pb2.FINISH_REASON_CANCELLED,
}
_TOOL_MODES = {
    types_pb2.TOOL_CHOICE_MODE_UNSPECIFIED: ToolMode.AUTO,
    types_pb2.TOOL_CHOICE_MODE_AUTO: ToolMode.AUTO,
    types_pb2.TOOL_CHOICE_MODE_NONE: ToolMode.NONE,
    types_pb2.TOOL_CHOICE_MODE_REQUIRED: ToolMode.REQUIRED,
}
_STATES = {
    state: adapters_pb2.AdapterState.Value(f"ADAPTER_STATE_{state.name}") for state in AdapterState
}


def decode_generate(
    request: generation_pb2.GenerateRequest,
    timeout_s: float | None,
    limits: PromptLimits,
    caller: Caller,
    peer: str = "",
) -> GenerateCall:
    """Translate a request; `timeout_s` is what is left of its deadline, `peer` whence it comes.

    Raises InvalidRequest naming the field, UnsupportedFeature for what is not served yet.
    """
    sampling = request.sampling
    check_stops(sampling.stop)
    return GenerateCall(
        caller=caller,
        prompt=decode_prompt(request, limits),
        adapters=_adapters(request),
        sampling=_sampling(sampling),
        num_outputs=sampling.n if sampling.HasField("n") else 1,
        uses_base_text=request.base_text,
        has_max_tokens=sampling.HasField("max_tokens"),
        stop=tuple(sampling.stop),
        ignore_eos=sampling.ignore_eos,
        request_id=_request_id(request),
        client=caller.client(printable(request.tenant, "tenant"), client_address(peer)),
        priority=request.priority,
        cache_salt=printable(request.cache_salt, "cache_salt"),
        timeout_s=timeout_s,
    )


def decode_prompt(
    request: generation_pb2.GenerateRequest | generation_pb2.TokenizeRequest,
    limits: PromptLimits,
) -> Prompt:
    """Translate the input of a request. Raises InvalidRequest: there is none (field `input`), or it
    is so large that it cannot fit.
    """
    match request.WhichOneof("input"):
        case "text":
            check_bytes(len(request.text.encode()), "text", limits)
            return TextPrompt(request.text)
        case "messages":
            turns = request.messages.messages
            check_tokens(len(turns), "messages", limits)
            check_bytes(request.messages.ByteSize(), "messages", limits)
            return _chat(request.messages)
        case "token_ids":
            check_tokens(len(request.token_ids.ids), "token_ids", limits)
            return TokenPrompt(tuple(request.token_ids.ids))
    raise InvalidRequest("the request has no input; send text or messages", field="input")


def decode_upload(start: adapters_pb2.UploadStart) -> UploadCall:
    """Translate what an upload announces. Raises InvalidRequest naming the field."""
    if len(start.files) > MAX_FILES:
        raise InvalidRequest(
            f"start.files has {len(start.files)} files; an adapter has {MAX_FILES} at most",
            field="start.files",
        )
    return UploadCall(
        name=adapter_name(start.name, "start.name"),
        files=tuple(_upload_file(file, f"start.files[{i}]") for i, file in enumerate(start.files)),
        replace=start.replace,
    )


def upload_data(part: adapters_pb2.UploadAdapterRequest) -> bytes:
    """Return the bytes of a part after the first. Raises InvalidRequest for any other part."""
    if part.WhichOneof("part") != "chunk":
        field = part.WhichOneof("part") or "part"
        raise InvalidRequest(f"{field}: after start only chunks may follow", field=field)
    return part.chunk.data


def encode_event(event: Event) -> generation_pb2.GenerateResponse:
    """Translate one event of a generation."""
    if isinstance(event, Started):
        started = generation_pb2.Started(
            request_id=event.request_id, prompt_tokens=event.num_prompt_tokens, notes=event.notes
        )
        return generation_pb2.GenerateResponse(started=started)
    if isinstance(event, PromptLogprobs):
        prompt = generation_pb2.PromptLogprobs(logprobs=map(_logprob, event.logprobs))
        return generation_pb2.GenerateResponse(prompt_logprobs=prompt)
    if isinstance(event, Delta):
        logprobs = [_logprob(logprob) for logprob in event.logprobs]
        delta = generation_pb2.Delta(
            index=event.index,
            text=event.text,
            reasoning=event.reasoning,
            token_ids=event.token_ids,
            logprobs=logprobs,
            tool_calls=[
                types_pb2.ToolCallDelta(
                    index=call.index, id=call.id, name=call.name, arguments=call.arguments
                )
                for call in event.tool_calls
            ],
        )
        return generation_pb2.GenerateResponse(delta=delta)
    usage = types_pb2.Usage(
        prompt_tokens=event.num_prompt_tokens,
        cached_tokens=event.num_cached_tokens,
        output_tokens=event.num_output_tokens,
        reasoning_tokens=event.num_reasoning_tokens,
    )
    finished = generation_pb2.Finished(
        index=event.index,
        finish_reason=_FINISH_REASONS[event.finish_reason],
        usage=usage,
        timing=_timing(event.timing),
    )
    return generation_pb2.GenerateResponse(finished=finished)


def encode_adapters(records: Sequence[AdapterRecord]) -> adapters_pb2.ListAdaptersResponse:
    """Translate what is known of all adapters; where that is more than MAX_LIST_BYTES, without what
    their own files may make as long as they like.
    """
    response = adapters_pb2.ListAdaptersResponse(adapters=map(encode_adapter, records))
    if response.ByteSize() > MAX_LIST_BYTES:
        response.is_abridged = True
        for info in response.adapters:
            for name in ("honoured", "inert", "notes", "invocation_tokens", "target_modules"):
                info.ClearField(name)
            info.error = info.error[:MAX_ABRIDGED_ERROR]
    return response


def encode_adapter(record: AdapterRecord) -> adapters_pb2.AdapterInfo:
    """Translate what is known of an adapter."""
    info = adapters_pb2.AdapterInfo(
        name=record.name,
        state=_STATES[record.state],
        source=record.source,
        loaded_at_s=record.loaded_at_s,
        num_in_flight=record.num_in_flight,
        error=record.error,
        notes=record.notes,
        is_pinned=record.is_pinned,
        is_resident=record.is_resident,
    )
    if record.state is AdapterState.DOWNLOADING:
        info.num_downloaded_bytes = record.num_downloaded_bytes
        info.num_bytes_to_download = record.num_bytes_to_download
    if record.loaded is not None:
        facts = record.loaded.facts
        info.digest = facts.digest
        info.variant = facts.variant
        info.ranks.extend(record.loaded.ranks)
        info.target_modules.extend(record.loaded.target_modules)
        info.num_parameters = record.loaded.num_parameters
        info.num_bytes = record.loaded.nbytes
        info.honoured.update({name: str(value) for name, value in facts.honoured.items()})
        info.inert.update(facts.inert)
        info.invocation_tokens.extend(facts.invocation_tokens)
        info.has_chat_template = bool(record.text and record.text.is_own_template)
        info.num_layers = facts.num_layers
    if record.former is not None:
        info.former_digest = record.former.digest
    return info


def encode_stored(stored: StoredAdapter) -> adapters_pb2.StoredAdapter:
    """Translate a content of the store."""
    return adapters_pb2.StoredAdapter(
        source=stored.source,
        num_bytes=stored.num_bytes,
        stored_at_s=stored.stored_at_s,
        adapters=stored.adapters,
    )


def encode_server_info(info: ServerInfo) -> server_pb2.GetServerInfoResponse:
    """Translate the facts about a server."""
    engine, base = info.engine, info.engine.base
    return server_pb2.GetServerInfoResponse(
        versions=info.versions,
        base=server_pb2.BaseInfo(
            name=info.base_name,
            fingerprint=base.fingerprint,
            quantization=base.quantization,
            dtype=base.dtype,
            device=base.device,
            model_type=base.model_type,
            num_layers=base.num_layers,
            hidden_size=base.hidden_size,
            vocab_size=base.vocab_size,
            has_chat_template=info.has_chat_template,
        ),
        limits=server_pb2.Limits(
            max_model_len=engine.max_model_len,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            block_size=engine.block_size,
            num_blocks=engine.num_blocks,
            pool_bytes=engine.pool_bytes,
            max_slots=engine.max_slots,
            max_adapter_layers=engine.max_adapter_layers,
            max_queued_requests=engine.max_queued_requests,
            state_bytes=base.state_bytes,
            num_snapshots=engine.num_snapshots,
        ),
        kernel_backend=engine.kernel_backend,
        num_loaded_adapters=info.num_loaded_adapters,
        features=FEATURES,
        refused_features=REFUSED_FEATURES,
    )


def _chat(chat: types_pb2.ChatMessages) -> ChatPrompt:
    return ChatPrompt(
        messages=tuple(map(_turn, chat.messages)),
        tools=tuple(
            Tool(
                tool.name,
                tool.description,
                _json_object(tool.parameters, f"messages.tools[{index}].parameters"),
            )
            for index, tool in enumerate(chat.tools)
        ),
        tool_choice=_tool_choice(chat.tool_choice),
        parallel_tool_calls=not chat.HasField("parallel_tool_calls") or chat.parallel_tool_calls,
        template_variables=_json_object(chat.template_variables, "messages.template_variables")
        or {},
    )


def _turn(turn: types_pb2.ChatMessage) -> dict[str, Any]:
    found: dict[str, Any] = {"role": turn.role, "content": turn.content}
    for name in ("name", "tool_call_id"):
        if turn.HasField(name):
            found[name] = getattr(turn, name)
    if turn.HasField("reasoning"):
        found["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in turn.tool_calls
        ]
    return found


def _tool_choice(choice: types_pb2.ToolChoice) -> ToolMode | str:
    match choice.WhichOneof("choice"):
        case "name":
            return str(choice.name)
        case "mode" if choice.mode in _TOOL_MODES:
            return _TOOL_MODES[choice.mode]
        case "mode":
            raise InvalidRequest(
                f"messages.tool_choice.mode is {choice.mode}, which is unknown",
                field="messages.tool_choice.mode",
            )
    return ToolMode.AUTO


def _json_object(text: str, field: str) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} is no JSON: {error}", field=field) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{field} must be a JSON object", field=field)
    return value


def _adapters(request: generation_pb2.GenerateRequest) -> tuple[AdapterChoice, ...]:
    check_count(len(request.adapters))
    choices = tuple(
        AdapterChoice(
            adapter_name(selection.name, f"adapters[{index}].name"),
            selection.weight if selection.HasField("weight") else 1.0,
        )
        for index, selection in enumerate(request.adapters)
    )
    check_choices(choices)
    return choices


def _sampling(sampling: types_pb2.SamplingParams) -> SamplingParams:
    given = {
        SAMPLING_NAMES.get(field.name, field.name): value
        for field, value in sampling.ListFields()
        if field.name in SAMPLING_SCALARS
    }
    # Before anything is made of them: a message has room for a million.
    _check_length(len(sampling.stop_token_ids), MAX_STOP_TOKEN_IDS, "sampling.stop_token_ids")
    _check_length(len(sampling.logit_bias), MAX_BIASES, "sampling.logit_bias")
    return SamplingParams(
        **given,
        stop_token_ids=frozenset(sampling.stop_token_ids),
        logit_bias=logit_bias(sampling.logit_bias),
        structured_output=_structured_output(sampling),
    )


def _structured_output(sampling: types_pb2.SamplingParams) -> StructuredOutput | None:
    if not sampling.HasField("structured_output"):
        return None
    form, field = sampling.structured_output, "sampling.structured_output"
    match form.WhichOneof("format"):
        case None:
            raise InvalidRequest(f"{field} has no format; set one of its fields", field=field)
        case "json_object":
            if not form.json_object:
                field = f"{field}.json_object"
                raise InvalidRequest(f"{field} is false; set it or leave it out", field=field)
            return StructuredOutput(StructureKind.JSON_OBJECT, "")
        case "choice":
            choices = json.dumps(list(form.choice.texts), ensure_ascii=False)
            return StructuredOutput(StructureKind.CHOICE, choices)
        case kind:
            return StructuredOutput(StructureKind(kind), getattr(form, kind))


def _check_length(length: int, most: int, field: str) -> None:
    if length > most:
        raise InvalidRequest(
            f"{field} has {length} entries; at most {most} are allowed", field=field
        )


def _request_id(request: generation_pb2.GenerateRequest) -> str | None:
    if not request.HasField("request_id"):
        return None
    if not request.request_id:
        raise InvalidRequest("request_id is empty; leave it out", field="request_id")
    return printable(request.request_id, "request_id")


def _logprob(logprob: TokenLogprob) -> types_pb2.TokenLogprob:
    top = [
        types_pb2.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top
    ]
    return types_pb2.TokenLogprob(logprob=logprob.logprob, top=top)


def _timing(timing: RequestTiming | None) -> types_pb2.Timing | None:
    if timing is None:
        return None
    return types_pb2.Timing(
        queue_s=timing.queue_s, prefill_s=timing.prefill_s, decode_s=timing.decode_s
    )


def _upload_file(file: adapters_pb2.UploadFile, field: str) -> UploadFile:
    if not file.HasField("num_bytes"):
        raise InvalidRequest(
            f"{field}.num_bytes is missing; announce the size", field=f"{field}.num_bytes"
        )
    sha256 = file.sha256.lower()
    if file.HasField("sha256") and not _SHA256.fullmatch(sha256):
        raise InvalidRequest(
            f"{field}.sha256 must be 64 hexadecimal digits", field=f"{field}.sha256"
        )
    return UploadFile(file.name, file.num_bytes, sha256)
