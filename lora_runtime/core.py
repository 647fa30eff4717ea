"""The nouns shared by every part of the runtime. Plain Python: ints and strings, no tensors.

Request (what a client asked) → Row (its state in the engine) → ScheduledBatch (the plan of
one step) → StepOutput (what the step gave one request).
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Protocol

from lora_runtime.errors import InvalidRequest, LoramuxError, written

MAX_STOP_TOKEN_IDS = 1024
"""Stop tokens of one request, the base's own end tokens included."""
MAX_BIASES = 1024
MAX_BIAS = 100.0
"""Enough to ban a token or to make it certain."""
MAX_PROMPT_LOGPROBS = 1 << 18
"""Numbers of one prompt: of each token its own and those most likely. On the wire they take less
than the 4 MiB that clients accept."""
MAX_REPETITION_PENALTY = 100.0
"""The least is one over it. Far beyond any use, and small enough that logits stay finite."""
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    """As STOP, of an output that has called tools; the engine knows no tools."""
    CANCELLED = "cancelled"
    ERROR = "error"


class StructureKind(StrEnum):
    """How the form of an output is written down."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """The form that an output must have; tokens that would break it are never drawn."""

    kind: StructureKind
    definition: str
    """The schema, expression or grammar; of CHOICE a JSON list of texts, of JSON_OBJECT empty."""

    @classmethod
    def of(cls, given: Mapping[str, object]) -> StructuredOutput:
        """From a mapping of one entry, as `{"regex": "[0-9]+"}`: json_schema (its text, or the
        mapping), json_object (True), regex, grammar, or choice (texts). Raises InvalidRequest.
        """
        field = "sampling.structured_output"
        if len(given) != 1 or (kind := next(iter(given))) not in list(StructureKind):
            raise InvalidRequest(
                f"{field} has {', '.join(map(str, given)) or 'nothing'}; it must have one of "
                f"{', '.join(StructureKind)}",
                field=field,
            )
        value = given[kind]
        if kind == StructureKind.JSON_OBJECT:
            if value is not True:
                raise InvalidRequest(
                    f"{field}.{kind} is {written(value)}; it must be True", field=field
                )
            return cls(StructureKind.JSON_OBJECT, "")
        if kind in (StructureKind.JSON_SCHEMA, StructureKind.CHOICE) and not isinstance(value, str):
            try:
                value = json.dumps(value, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise InvalidRequest(f"{field}.{kind} is no JSON: {error}", field=field) from None
        if not isinstance(value, str):
            raise InvalidRequest(
                f"{field}.{kind} is {written(value)}; it must be a text", field=field
            )
        return cls(StructureKind(kind), value)


class OutputMatcher(Protocol):
    """Where one output stands in the form that it must have."""

    @property
    def is_complete(self) -> bool:
        """True once nothing may follow."""
        ...

    @property
    def error(self) -> str:
        """Why no token can be given: what the request's failure says. Empty: nothing is wrong."""
        ...

    def take(self, token_id: int) -> None:
        """Go on by the output's next token."""
        ...


class CompiledStructure(Protocol):
    """A form that is ready to be followed; see `text/structured_output.py`."""

    def start(self) -> OutputMatcher:
        """Return a matcher of its own for one output, before the first token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Checked on construction; raises InvalidRequest naming the field."""

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    """Ends the output; the base's own end tokens are added by the caller unless ignored."""
    num_logprobs: int | None = None
    """None: no logprobs; n ≥ 0: the sampled token's and the n most likely."""
    num_prompt_logprobs: int | None = None
    """As `num_logprobs`, of each token of the prompt after the first."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the output holds."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time the output holds the token."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of prompt and output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit), each id once, ascending."""
    structured_output: StructuredOutput | None = None

    def __post_init__(self) -> None:
        self._check_types()
        min_tokens, max_tokens, seed = self.min_tokens, self.max_tokens, self.seed
        top, temperature = self.num_logprobs, self.temperature
        checks: list[tuple[str, object, bool, str]] = [
            ("max_tokens", max_tokens, 1 <= max_tokens < 2**31, "between 1 and 2^31 - 1"),
            ("min_tokens", min_tokens, 0 <= min_tokens <= max_tokens, "between 0 and max_tokens"),
            ("temperature", temperature, 0.0 <= temperature <= 100.0, "between 0 and 100"),
            ("top_k", self.top_k, 0 <= self.top_k < 2**31, "between 0 (off) and 2^31 - 1"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("seed", seed, seed is None or 0 <= seed < 2**63, "between 0 and 2^63 - 1"),
            ("logprobs", top, top is None or 0 <= top <= 20, "between 0 and 20"),
            *self._penalty_checks(),
        ]
        for name, value, is_valid, rule in checks:
            if not is_valid:
                raise InvalidRequest(
                    f"sampling.{name} is {written(value)}; it must be {rule}",
                    field=f"sampling.{name}",
                )
        self._check_biases()
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"sampling.stop_token_ids has {len(self.stop_token_ids)} ids, the end tokens "
                f"included; at most {MAX_STOP_TOKEN_IDS} are allowed",
                field="sampling.stop_token_ids",
            )

    def _penalty_checks(self) -> list[tuple[str, object, bool, str]]:
        """Name, value, whether it is valid, and the rule; so written, NaN is refused too."""
        repetition, top = self.repetition_penalty, self.num_prompt_logprobs
        least, most = 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        checks: list[tuple[str, object, bool, str]] = [
            (
                "repetition_penalty",
                repetition,
                least <= repetition <= most,
                f"between {least:g} and {most:g}",
            ),
            ("prompt_logprobs", top, top is None or 0 <= top <= 20, "between 0 and 20"),
        ]
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            checks.append((name, value, -2.0 <= value <= 2.0, "between -2 and 2"))
        return checks

    def _check_biases(self) -> None:
        """`_check_types` has seen that they are pairs of a whole number and a number."""
        rule = ""
        biases = self.logit_bias
        if len(biases) > MAX_BIASES:
            rule = f"has {len(biases)} tokens; at most {MAX_BIASES} are allowed"
        elif any(low >= high for (low, _), (high, _) in pairwise(biases)):
            rule = "must name each token once, ids ascending"
        for token_id, bias in biases:
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                rule = f"of token {token_id} is {bias!r}; it must be between -100 and 100"
        if rule:
            raise InvalidRequest(f"sampling.logit_bias {rule}", field="sampling.logit_bias")

    def _check_types(self) -> None:
        """Python compares True and 2.5 with whole numbers, so that bounds alone let them pass."""
        for names, kinds, rule in (
            (("max_tokens", "min_tokens", "top_k"), (int,), "a whole number"),
            (
                ("seed", "num_logprobs", "num_prompt_logprobs"),
                (int, NoneType),
                "a whole number or None",
            ),
            (("temperature", "top_p", "min_p", *PENALTIES), (int, float), "a number"),
            (("structured_output",), (StructuredOutput, NoneType), "a StructuredOutput or None"),
        ):
            for name in names:
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, kinds):
                    field = f"sampling.{name.removeprefix('num_')}"
                    raise InvalidRequest(
                        f"{field} is {written(value)}; it must be {rule}", field=field
                    )
        ids = self.stop_token_ids
        if not isinstance(ids, Collection) or not all(map(is_whole, ids)):
            raise InvalidRequest(
                f"sampling.stop_token_ids is {written(ids)}; it must be token ids",
                field="sampling.stop_token_ids",
            )
        biases = self.logit_bias
        if not isinstance(biases, tuple) or not all(map(_is_bias, biases)):
            raise InvalidRequest(
                f"sampling.logit_bias is {biases!r:.200}; it must be pairs of a token id and a "
                "number",
                field="sampling.logit_bias",
            )


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bias(value: object) -> bool:
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    return is_whole(value[0]) and (is_whole(value[1]) or isinstance(value[1], float))


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """A loaded adapter's name, and the factor on its effect."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUse:
    """One adapter applied to one request."""

    digest: str
    weight: float = 1.0
    start_position: int = 0
    """First token position it acts on (aLoRA); positions before it see the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asked, in token ids. `adapters` empty means the base."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapters: tuple[AdapterUse, ...] = ()
    structure: CompiledStructure | None = None
    """What `sampling.structured_output` was compiled to; None if and only if that is None."""
    cache_salt: str = ""
    """Requests share cached prefixes only under equal salts."""
    cache_owner: str = ""
    """Whose prefixes are cached: those of the owner who has most of them make room first."""
    client: str = ""
    """Who asks; clients share the engine fairly."""
    weight: float = 1.0
    """The client's share of a busy engine, against the other clients'."""
    priority: int = 0
    """Of the requests of one client those of the lowest value run first."""
    deadline: float | None = None
    """`time.monotonic()` after which the request is cancelled."""
    arrival: float = field(default_factory=time.monotonic)


class RowStatus(StrEnum):
    """Where a row stands in the engine."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Row:
    """A request's state in the engine.

    `token_ids` is the prompt and everything generated. Its last element may be −1 − r, which stands
    for the token that the running step draws for the r-th row that samples: only the device knows
    it yet.
    """

    request: Request
    token_ids: list[int]
    status: RowStatus = RowStatus.WAITING
    num_computed_tokens: int = 0
    """Leading tokens whose keys and values are in the cache, or will be after the running step."""
    layer_map: tuple[int, ...] | None = None
    """Base layers in the order in which this row visits them; None: each once."""
    num_planes: int = 1
    """Cache blocks a token block takes: the layer map's depth over the base's, rounded up."""
    block_table: list[int] = field(default_factory=list)
    """Plane k of token block i is entry i · num_planes + k."""
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of the leading token blocks, as far as they were asked for."""
    num_cached_blocks: int = 0
    """Leading token blocks that were found in the prefix cache or offered to it."""
    slots: tuple[int, ...] = ()
    """Device slot of each of the request's adapters, while running."""
    matcher: OutputMatcher | None = None
    """Where the output stands in the form that was asked for: it has taken every token of the
    output that is known, so that a row that is computed again keeps it."""
    ticket: int = 0
    """The row's number in the order of arrival."""
    num_priced_tokens: int = 0
    """Leading prompt tokens that its client has been charged for."""
    num_steps_passed_over: int = 0
    """Steps in which its adapters found no room in the pool."""
    num_preemptions: int = 0
    state_slot: int = 0
    """Of a base with recurrent layers, while running: the slot that holds the state behind the
    row's computed tokens."""
    resumed: tuple[int, int] | None = None
    """(Position, slot) of the snapshot that the row's first tokens go on from, until they are
    done."""
    snapshots: list[tuple[int, int]] = field(default_factory=list)
    """(Position, slot): where states behind leading tokens are kept, or will be by the steps that
    are planned or run; not yet to be found by others."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Those of the prompt's tokens after the first, as far as they are known; None where none are
    wanted, or they have been given out."""
    num_cached_tokens: int = 0
    """Leading prompt tokens that were found in the prefix cache when the row first began."""
    first_scheduled: float | None = None
    first_token: float | None = None

    @classmethod
    def of(
        cls, request: Request, layer_map: tuple[int, ...] | None = None, num_planes: int = 1
    ) -> Row:
        """A new row for `request`; a base row visits each layer once and has one plane."""
        row = cls(
            request, list(request.prompt_token_ids), layer_map=layer_map, num_planes=num_planes
        )
        if request.structure is not None:
            row.matcher = request.structure.start()
        if request.sampling.num_prompt_logprobs is not None:
            row.prompt_logprobs = []
        return row

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """True while logits of the prompt's own positions are needed."""
        found = self.prompt_logprobs
        return found is not None and len(found) < self.num_prompt_tokens - 1

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """`num_tokens` tokens of `row` from position `start` run in this step."""

    row: Row
    start: int
    num_tokens: int
    samples: bool = True
    """The chunk reaches the row's last token, so the step gives a new one."""

    @property
    def end(self) -> int:
        """Position after the tokens of this step: that of the new token, if the row samples."""
        return self.start + self.num_tokens

    @property
    def num_scored(self) -> int:
        """Leading tokens of this step behind which a token of the prompt is to be scored."""
        if not self.row.lacks_prompt_logprobs:
            return 0
        return max(0, min(self.end, self.row.num_prompt_tokens - 1) - self.start)


@dataclass(frozen=True, slots=True)
class AdapterPlacement:
    """Where an adapter sits in the device pool."""

    digest: str
    slot: int
    address: int
    """First byte of its extent in the pool."""


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The plan of one step."""

    rows: tuple[ScheduledRow, ...]
    loads: tuple[AdapterPlacement, ...] = ()
    """Adapters to copy into the device pool, before the forward or beside it."""
    failed: tuple[StepOutput, ...] = ()
    """Terminal outputs of rows that could not be planned."""

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_tokens for scheduled in self.rows)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token that was drawn for one row."""

    token_id: int
    is_finite: bool
    """False when the row's logits held NaN or infinity: its request fails, no other does."""
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities of one position of output or prompt."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log probability), most likely first."""


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Log probabilities of `row`'s tokens after position `start`, one for each."""

    row: Row
    start: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """Seconds a finished request spent in each phase."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """A step's result for one request. Exactly one output of a request has a `finish_reason`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """With the first token, where they were asked for: of each token of the prompt but the first"""
    num_cached_tokens: int = 0
    """Leading tokens of the prompt that were found in the prefix cache when the request began: with
    every token, 0 where the request ends without one."""
    finish_reason: FinishReason | None = None
    error: LoramuxError | None = None
    """Set if and only if `finish_reason` is ERROR."""
    timing: RequestTiming | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderRules:
    """What must hold of an adapter's folder beside what its files are."""

    roots: tuple[Path, ...] = ()
    """The folder lies below one of them, and so do the files that links in it lead to. None: it
    may lie anywhere, and links stay in the folder or in its repository of a hub's cache."""
    sha256: str = ""
    """The digest that its files had when they were stored. Empty: they may be any."""


ANY_FOLDER = FolderRules()
"""The caller's own files."""


@dataclass(frozen=True, slots=True)
class ExpertsLayout:
    """How a mixture's experts lie in the checkpoint's parameter of them all."""

    count: int
    is_transposed: bool = False
    """An expert's weight is (in, out)."""
    is_interleaved: bool = False
    """Outputs of gate and up alternate, where others have gate's first."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Sizes of one linear layer that adapters may target, or of each of a mixture's experts."""

    in_features: int
    out_features: int
    experts: ExpertsLayout | None = None
    """None: every token goes through the one layer."""

    @property
    def num_experts(self) -> int:
        return 1 if self.experts is None else self.experts.count


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSpec:
    """What adapters, training and the server need to know of the loaded base; no tensors."""

    name: str
    """To show: of a folder or file its last part."""
    name_or_path: str | None = None
    """What transformers and PEFT load it by, if known: a hub id, or a folder's absolute path."""
    fingerprint: str
    """SHA-256 over every parameter and persistent buffer, the config and the quantiser settings."""
    linears: dict[str, LinearShape]
    """Module path in the transformers model (`model.layers.0.self_attn.q_proj`) → its sizes."""
    embedding: str
    """Path of the input embedding: `model.embed_tokens`."""
    head: str
    """Path of the output layer: `lm_head`."""
    is_tied: bool
    """True when the head's weight is the embedding's."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    quantization: str
    dtype: str
    device: str
    model_type: str
    """`config.model_type` of the checkpoint: llama, qwen3, gemma2 …"""
    routers: tuple[str, ...] = ()
    """Those of `linears` that choose among experts."""
    state_bytes: int = 0
    """Bytes of recurrent state that one row takes, however long it is; 0 where all layers attend"""
    can_reorder_layers: bool = True
    """False when its layers cannot run in another order than its own (layer replication)."""
    left_out: tuple[str, ...] = ()
    """Paths of the checkpoint's parts that are no part of its text: `model.vision_tower` …"""
    exceeds_bfloat16: bool = False
    """True where it holds values that bfloat16 would round: loaded in bfloat16, the base of this
    fingerprint is another function."""

    shapes: dict[str, LinearShape] = field(init=False, repr=False, compare=False)
    """Every module an adapter may act on; the embedding is a linear layer of one-hot tokens."""

    def __post_init__(self) -> None:
        ends = {
            self.embedding: LinearShape(self.vocab_size, self.hidden_size),
            self.head: LinearShape(self.hidden_size, self.vocab_size),
        }
        object.__setattr__(self, "shapes", {**self.linears, **ends})


def activation_start(token_ids: Sequence[int], invocation: Sequence[int]) -> int | None:
    """First position of the last occurrence of `invocation` in a prompt, or None.

    An activated LoRA acts from there on, and not at all without it. Source: arXiv:2504.12397.
    """
    tokens, wanted = list(token_ids), list(invocation)
    starts = range(len(tokens) - len(wanted), -1, -1)
    return next((s for s in starts if tokens[s : s + len(wanted)] == wanted), None)
