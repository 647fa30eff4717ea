"""What callers ask of the service and what it answers, in no wire format.

`rpc/codec.py` translates these classes to and from protobuf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from lora_runtime.core import (
    AdapterChoice,
    FinishReason,
    RequestTiming,
    SamplingParams,
    TokenLogprob,
)
from lora_runtime.engine.client import EngineInfo, LoadedAdapter
from lora_runtime.text.chat_prompt import ChatPrompt
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.tool_calls import ToolCallDelta
from loramux.server.access.caller import Caller


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text, without a template."""

    field: ClassVar[str] = "text"
    text: str

    @property
    def is_empty(self) -> bool:
        return not self.text


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    field: ClassVar[str] = "token_ids"
    token_ids: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return not self.token_ids


Prompt = TextPrompt | ChatPrompt | TokenPrompt
"""`field` is the prompt's name in requests and in errors about it."""


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """The largest prompt that is accepted. It is measured before it is tokenised or rendered."""

    num_tokens: int
    num_bytes: int
    """Bytes of its text in UTF-8. A longer text is refused even if its tokenizer would remove most
    of it and make few tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One request for text."""

    caller: Caller
    prompt: Prompt
    adapters: tuple[AdapterChoice, ...] = ()
    """Their effects add up; none is the base."""
    uses_base_text: bool = False
    """Tokens, template and end tokens are the base's, whatever the adapters bring."""
    sampling: SamplingParams
    num_outputs: int = 1
    """Independent outputs for the one prompt; `index` in the events says which."""
    has_max_tokens: bool = True
    """False: `sampling.max_tokens` is only the default, to be cut to what fits."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    request_id: str | None = None
    """The caller's name for it; None makes one."""
    client: str = ""
    """Who asks; see `Request.client`."""
    priority: int = 0
    """Lower runs earlier among the client's requests."""
    cache_salt: str = ""
    """Prompts share cached work only under equal salts."""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The engine has begun with the request."""

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    """Of the prompt's tokens those that the output that begins first found in the prefix cache."""
    prompt_token_ids: tuple[int, ...] = ()
    side: TextSide | None = None
    """What the tokens mean; None: what the base says."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Log probabilities of the prompt's tokens, one for each after the first."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """More of an output; `text` and `reasoning` may lag behind `token_ids`."""

    text: str
    reasoning: str = ""
    """More of what the model thinks before it answers."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCallDelta, ...] = ()
    """More of its calls of tools; they are no part of `text`."""
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """An output is complete. `timing` is None where the service cut it: at a stop string, or after
    the last call of a tool that it might make.
    """

    index: int = 0
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    """Of the prompt's tokens those that this output found in the prefix cache."""
    num_output_tokens: int
    num_reasoning_tokens: int = 0
    """Of the output's tokens those by which the model thought."""
    timing: RequestTiming | None


Event = Started | PromptLogprobs | Delta | Finished
"""An accepted request is one Started, one PromptLogprobs if asked for, some Deltas and one Finished
for each output, or one error in the place of what is missing."""


@dataclass(frozen=True, slots=True)
class UploadFile:
    """A file that a client announces: its size, and its SHA-256 in hexadecimal or ""."""

    name: str
    num_bytes: int
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadCall:
    """An adapter that a client is about to send, its files in their order."""

    name: str
    files: tuple[UploadFile, ...]
    replace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """The content of an upload, in the store."""

    source: str
    """SHA-256 over its files, in hexadecimal."""
    num_bytes: int
    stored_at_s: float
    """Seconds since 1970."""
    adapters: tuple[str, ...] = ()
    """Names that hold it, or would go back to it."""


class AdapterState(StrEnum):
    """An adapter's state on this server."""

    REGISTERED = "registered"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    LOADED = "loaded"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(slots=True, eq=False, kw_only=True)
class AdapterRecord:
    """What the server knows of one adapter. Changed by the registry only."""

    name: str
    source: str
    """The source as the caller wrote it; once it was fetched from elsewhere, with the digest of its
    files, by which the store has them."""
    state: AdapterState
    loaded: LoadedAdapter | None = None
    """What the engine read from its files; None until then."""
    text: TextSide | None = None
    """Its own text side; None: the base's."""
    loaded_at_s: float = 0.0
    """Seconds since 1970; 0 before."""
    num_in_flight: int = 0
    """Calls that use it now, under this name."""
    request_ids: set[str] = dataclasses.field(default_factory=set)
    """Their requests to the engine, one for each output."""
    error: str = ""
    """Why it failed; empty unless FAILED."""
    notes: tuple[str, ...] = ()
    """Notes for the adapter's users."""
    former: AdapterRecord | None = None
    """The record of what the name held before, kept in host memory for a rollback."""
    is_pinned: bool = False
    """It keeps its place in the device pool whether or not requests use it."""
    is_resident: bool = False
    """It was in the device pool when the registry was asked."""
    is_on_demand: bool = False
    """A request asked for it, not an operator: it makes room for others, and is not kept over a
    restart."""
    tenants: dict[str, float] = dataclasses.field(default_factory=dict)
    """Tenants that it is charged to, and when a request of each last began to use it, or its load
    began, by time.monotonic. Without keys there is one, of an empty name; none: it is the whole
    server's. See `shares.py`."""
    num_downloaded_bytes: int = 0
    """Fetched so far, while DOWNLOADING."""
    num_bytes_to_download: int = 0
    """To fetch in all, while DOWNLOADING; 0 until it is known."""

    @property
    def digest(self) -> str:
        return self.loaded.digest if self.loaded else ""

    @property
    def num_bytes(self) -> int:
        """Bytes in host memory."""
        return self.loaded.nbytes if self.loaded else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server is and what it can do."""

    versions: Mapping[str, str]
    base_name: str
    engine: EngineInfo
    has_chat_template: bool
    num_loaded_adapters: int
