"""Stand-ins for the parts around the server: a scripted engine and a tokenizer of bytes."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.adapters.host_cache import HostMemoryFull
from lora_runtime.core import (
    ANY_FOLDER,
    BaseSpec,
    FinishReason,
    FolderRules,
    Request,
    RequestTiming,
    StepOutput,
    TokenLogprob,
)
from lora_runtime.engine.client import EngineInfo, EngineStats, LoadedAdapter, StateStats
from lora_runtime.errors import (
    AdapterNotFound,
    AdapterRefused,
    AdapterSourceRefused,
    AdapterTooLarge,
    BaseMismatch,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    Unavailable,
)
from lora_runtime.text.structured_output import Vocabulary
from lora_runtime.text.text_files import GENERATION_FILE, TEMPLATE_FILE
from lora_runtime.text.text_side import TextSide

EOS_ID = 256
VOCAB_SIZE = 257


class ByteTokenizer:
    """Token ids are the bytes of the text; 256 ends an output."""

    eos_token_ids = frozenset({EOS_ID})
    vocab_size = VOCAB_SIZE
    has_chat_template = True
    longest_token = 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(i for i in token_ids if i < EOS_ID).decode(errors="replace")

    def with_added(self, added: object) -> ByteTokenizer:
        return self

    def token_reader(self, added: object = None) -> Callable[[int], bytes]:
        return lambda i: b"<end>" if i == EOS_ID else bytes([i])

    def encode_rendered(self, text: str) -> list[int]:
        return self.encode(text)

    added_tokens = ()

    def vocabulary(self, vocab_size: int) -> Vocabulary:
        return Vocabulary([*(bytes([i]) for i in range(EOS_ID)), b"<end of output>"], [EOS_ID])

    def chat_template(self, *, has_tools: bool = False) -> str:
        return "{% for tool in tools %}<tool_call>{% endfor %}"

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, tools: Sequence = (), variables: object = ()
    ) -> list[int]:
        if any(message["role"] not in ("system", "user", "assistant") for message in messages):
            raise InvalidRequest("unknown role", field="messages")
        return self.encode("".join(map("<{role}>{content}".format_map, messages)))


class FormatText:
    """An OwnText without processes: a template is a format string of one message.

    An end token is the one of a generation config; `error` is raised in place of a reading.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def read(
        self, files: Mapping[str, bytes], sha256: str = ""
    ) -> tuple[TextSide, tuple[str, ...]]:
        if self.error is not None:
            raise self.error
        template = files[TEMPLATE_FILE].decode() if TEMPLATE_FILE in files else None
        ends = json.loads(files.get(GENERATION_FILE, b"{}")).get("eos_token_id", EOS_ID)
        side = TextSide(
            template=template,
            variables={},
            is_own_template=template is not None,
            tokenizer=None,
            added=None,
            eos_token_ids=(ends,),
            key=f"{template}{ends}",
        )
        try:
            await self.render(side, ({"role": "user", "content": "Hello"},))
        except InvalidRequest as error:
            return side, (error.message,)
        return side, ()

    async def render(
        self,
        side: TextSide,
        messages: Sequence[Mapping[str, str]],
        tools: Sequence = (),
        variables: object = (),
    ) -> str:
        try:
            return "".join(map((side.template or "").format_map, messages))
        except (KeyError, ValueError) as error:
            raise InvalidRequest(f"bad template: {error!r}", field="messages") from error

    async def encode(self, side: TextSide, text: str) -> list[int]:
        raise AssertionError("no side of these has a tokenizer")

    def close(self) -> None:
        pass


class ScriptedEngine:
    """Repeats the prompt's tokens for ever; under adapters, the first letters of their digests.

    Nothing goes on while `gate` is clear. A folder's weights file scripts its load: its bytes are
    the content, except that `!Class` makes the load fail with that error. Its configuration gives
    fields of LoadedAdapter.
    """

    def __init__(self, *, max_model_len: int = 512, max_queued: int = 1000) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.load_gate = asyncio.Event()
        self.load_gate.set()
        self.failure: LoramuxError | Exception | None = None
        """Ends every stream after its second token, as an error of the request."""
        self.vanishes = False
        """Streams end after the second token without a result, as if the engine had died."""
        self.is_alive = True
        self.num_waiting = 0
        self.is_busy, self.num_beats, self.num_failed_in_a_row = False, 0, 0
        self.references: Counter[str] = Counter()
        self.num_loads: Counter[str] = Counter()
        """Times that each content was loaded."""
        self.loaded: dict[str, LoadedAdapter] = {}
        self.running: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.seen: list[Request] = []
        self.rules: dict[Path, FolderRules] = {}
        """Under which every folder was last loaded."""
        self.pinned: set[str] = set()
        self.max_pinned = 2
        self.max_loaded: int | None = None
        """Contents that host memory has room for."""
        self.states: StateStats | None = None
        """As if the base had recurrent layers."""
        self._cancelled: set[str] = set()
        self._max_queued = max_queued
        self._info = _info(max_model_len, max_queued)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def stats(self) -> EngineStats:
        return EngineStats(
            is_alive=self.is_alive,
            num_running=len(self.running),
            num_waiting=self.num_waiting,
            kv_blocks_used=0,
            kv_blocks_total=self._info.num_blocks,
            pool_bytes_used=0,
            pool_bytes_total=self._info.pool_bytes,
            num_preemptions=0,
            num_prefix_queries=0,
            num_prefix_hits=0,
            num_steps=0,
            running_adapters=(),
            waiting_adapters=(),
            resident_adapters=tuple(self.references),
            is_busy=self.is_busy,
            num_beats=self.num_beats,
            num_failed_in_a_row=self.num_failed_in_a_row,
            states=self.states,
        )

    async def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        self._admit(request)
        self.running[request.request_id] = request
        is_over = False
        try:
            for index in range(request.sampling.max_tokens):
                await asyncio.sleep(0)
                await self.gate.wait()
                if not self.is_alive:
                    raise self.failure or Unavailable("the engine has died")
                output = self._step(request, index)
                is_over = output.finish_reason is not None
                yield output
                if is_over or (self.vanishes and index == 1):
                    return
        finally:
            del self.running[request.request_id]
            if not is_over:
                self.aborted.append(request.request_id)

    async def load_adapter(self, folder: Path, rules: FolderRules = ANY_FOLDER) -> LoadedAdapter:
        await self.load_gate.wait()
        self.rules[folder] = rules
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise AdapterSourceRefused(f"{path.name} is missing from the folder", field=path.name)
        content = path.read_bytes()
        if content.startswith(b"!"):
            raise _load_error(content[1:].decode(), folder)
        digest = content.decode()[:1] + hashlib.sha256(content).hexdigest()
        if self.max_loaded is not None and len({*self.references, digest}) > self.max_loaded:
            size, num_held = PLAIN.nbytes, len(self.references)
            raise HostMemoryFull(size, num_held * size, self.max_loaded * size)
        self.references[digest] += 1
        self.num_loads[digest] += 1
        facts = _facts(folder)
        text_files = facts.pop("text_files", {})
        facts = replace(PLAIN.facts, digest=digest, **facts)
        self.loaded[digest] = replace(PLAIN, facts=facts, text_files=text_files)
        return self.loaded[digest]

    async def unload_adapter(self, digest: str, *, ending: Collection[str] = ()) -> None:
        assert self.references[digest] > 0, "more unloads than loads"
        self.references[digest] -= 1
        self._cancelled |= set(ending)
        if self.references[digest]:
            return
        del self.references[digest]
        self.pinned.discard(digest)
        while self._using(digest):
            await asyncio.sleep(0.001)

    async def pin_adapter(self, digest: str, *, is_pinned: bool = True) -> None:
        if digest not in self.references:
            raise AdapterNotFound(f"no adapter with digest {digest}")
        if is_pinned and len(self.pinned | {digest}) > self.max_pinned:
            raise AdapterTooLarge("pin: others would find no place any more", field="pin")
        self.pinned = self.pinned | {digest} if is_pinned else self.pinned - {digest}

    def abandon(self, error: Unavailable) -> None:
        self.is_alive = False
        self.failure = error
        self.gate.set()

    async def close(self, *, drain_s: float) -> None:
        self.is_alive = False

    def _using(self, digest: str) -> list[Request]:
        return [r for r in self.running.values() if any(a.digest == digest for a in r.adapters)]

    def _admit(self, request: Request) -> None:
        self.seen.append(request)
        if not self.is_alive:
            raise Unavailable("the engine has died")
        if len(self.running) >= self._max_queued:
            raise Overloaded("the queue is full")
        for use in request.adapters:
            if use.digest not in self.references:
                raise AdapterNotFound(f"no adapter with digest {use.digest}")
        if len({self.loaded[use.digest].facts.num_layers for use in request.adapters}) > 1:
            raise InvalidRequest("the adapters' layer maps differ", field="adapters")

    def _step(self, request: Request, index: int) -> StepOutput:
        if request.request_id in self._cancelled:
            return StepOutput(request_id=request.request_id, finish_reason=FinishReason.CANCELLED)
        letters = [ord(use.digest[0]) for use in request.adapters]
        cycle = letters or request.prompt_token_ids
        token = cycle[index % len(cycle)]
        reason = None
        if token in request.sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif index + 1 == request.sampling.max_tokens:
            reason = FinishReason.LENGTH
        error = self.failure if index == 1 else None
        if error is not None and not isinstance(error, LoramuxError):
            raise error
        if error is not None:
            reason = FinishReason.ERROR
        num_logprobs = request.sampling.num_logprobs
        top = () if not num_logprobs else ((token, -0.5),) * num_logprobs
        num_prompt = request.sampling.num_prompt_logprobs
        prompt_logprobs = None
        if index == 0 and num_prompt is not None:
            prompt_logprobs = tuple(
                TokenLogprob(-float(token_id), ((token_id, -0.25),) * num_prompt)
                for token_id in request.prompt_token_ids[1:]
            )
        return StepOutput(
            request_id=request.request_id,
            token_ids=(token,),
            logprobs=() if num_logprobs is None else (TokenLogprob(-0.5, top),),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            error=error,
            timing=RequestTiming(queue_s=0.1, prefill_s=0.2, decode_s=0.3) if reason else None,
        )


PLAIN = LoadedAdapter(
    facts=AdapterFacts(
        variant="lora", honoured={"r": "8"}, inert={"lora_dropout": "only acts in training"}
    ),
    ranks=(4, 8),
    target_modules=("q_proj",),
    num_parameters=100,
    nbytes=200,
)


def _facts(folder: Path) -> dict:
    path = folder / "adapter_config.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    names = {"chat_template": TEMPLATE_FILE, "generation": GENERATION_FILE}
    text = {name: facts.pop(fact).encode() for fact, name in names.items() if fact in facts}
    if text:
        facts |= {"text_files": text, "text_sha256": str(sorted(text.items()))}
    if "num_layers" in facts:
        facts["layer_map"] = tuple(range(facts.pop("num_layers")))
    return {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}


def _load_error(kind: str, folder: Path) -> Exception:
    weights = folder / "adapter_model.safetensors"
    errors = {
        "AdapterRefused": AdapterRefused(f"{weights}: header is cut short", field="lora_A"),
        "BaseMismatch": BaseMismatch(f"{folder} was made for another base", field="base"),
        "AdapterTooLarge": AdapterTooLarge(f"{folder} needs more than the pool", field="r"),
        "OSError": OSError(5, "I/O error", str(weights)),
    }
    return errors[kind]


def _info(max_model_len: int, max_queued: int) -> EngineInfo:
    base = BaseSpec(
        name="tiny",
        fingerprint="f" * 64,
        linears={},
        embedding="model.embed_tokens",
        head="lm_head",
        is_tied=True,
        num_layers=2,
        hidden_size=8,
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        quantization="nf4",
        dtype="float32",
        device="cpu",
        model_type="llama",
    )
    return EngineInfo(
        base=base,
        kernel_backend="scripted",
        max_model_len=max_model_len,
        max_num_seqs=64,
        max_num_batched_tokens=128,
        block_size=16,
        num_blocks=1000,
        pool_bytes=1 << 20,
        max_slots=16,
        max_adapter_layers=8,
        max_queued_requests=max_queued,
    )
