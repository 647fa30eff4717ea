"""Runs adapters' own text in processes that are killed and replaced when they take too much.

Callers are on an asyncio event loop, which never waits for a process: threads of this module do.
A text side that used up its limits on a short prompt is refused for a while without being run; a
long prompt that does so is refused alone. No side is run more than once at a time, and only so many
wait for it, so that one adapter never keeps the processes, or the server, from the others.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from lora_runtime.errors import AdapterRefused, InvalidRequest, Overloaded
from lora_runtime.temporary_folder import remove_abandoned, temporary_folder
from lora_runtime.text.messages import Message, as_templates_want, check_variables
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.tokenizer import NO_VARIABLES
from lora_runtime.text.worker_processes import LimitExceeded, ProcessPool, WorkerProcess

NUM_LOADING = 2
NUM_RENDERING = 4
"""Processes at most, of about 70 and 60 MB; one starts when all that run are at work."""
RENDERING_S = 5.0
"""Wall-clock time of one piece of work; its processor time is limited in the process."""
LOADING_S = 60.0
PENALTY_S = 60.0
"""How long a text side that used up its limits is refused."""
LONG_PROMPT = 1 << 16
"""Characters from which it is the prompt, and not the text side, that takes too much."""
CHARACTERS_PER_MESSAGE = 64
"""Characters that a message costs beside its own, because templates go over all messages."""
MAX_WAITING_PER_SIDE = 128
MAX_REMEMBERED = 1024
MAX_MESSAGE = 300
"""Characters of a template's own complaint that are passed on."""
FOLDER_PREFIX = "loramux-text-"
"""Beginning of the names of temporary folders that hold text files while they are read."""
TRIAL_CHAT = ({"role": "user", "content": "Hello"},)
"""The conversation that an adapter's own chat template must render when it is loaded."""


Reading: TypeAlias = tuple[TextSide | None, tuple[str, ...]]
"""An adapter's text side, None for the base's, and notes on it."""


class OwnText(Protocol):
    """Reads and runs the text sides that adapters bring."""

    async def read(self, files: Mapping[str, bytes], sha256: str = "") -> Reading:
        """Judge an adapter's text files; give its text side, None for the base's, and notes.

        `sha256`: a digest of the files, under which the answer is remembered.
        Raises AdapterRefused naming the file.
        """
        ...

    async def render(
        self,
        side: TextSide,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str | list[int]:
        """Render a conversation; token ids where the side has a tokenizer of its own, else text.

        tools, variables: as `Tokenizer.apply_chat_template` has them.
        Raises InvalidRequest (field `messages`) for what the template refuses or takes too long
        or too much memory for, and Overloaded.
        """
        ...

    async def encode(self, side: TextSide, text: str) -> list[int]:
        """Token ids of a plain text by the side's own tokenizer. Raises as `render`."""
        ...

    def close(self) -> None:
        """End the processes."""
        ...


class TextWorkers:
    """An `OwnText` of one base. Processes start when they are first needed."""

    def __init__(self, base_folder: Path, vocab_size: int) -> None:
        """Removes what killed processes left of the text files they were reading."""
        remove_abandoned(Path(tempfile.gettempdir()), FOLDER_PREFIX)
        self._base_folder = base_folder
        self._vocab_size = vocab_size
        self._loading = _pool("loading", NUM_LOADING)
        self._rendering = _pool("rendering", NUM_RENDERING)
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._sides: weakref.WeakValueDictionary[str, TextSide] = weakref.WeakValueDictionary()
        """Adapters of one text share it: a tokenizer may have megabytes."""
        self._read_before: dict[str, tuple[weakref.ref[TextSide] | None, tuple[str, ...]]] = {}
        self._refused_until: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        """Callers of a side that wait for their turn."""

    async def read(self, files: Mapping[str, bytes], sha256: str = "") -> Reading:
        if (known := self._remembered(sha256)) is not None:
            return known
        try:
            reply = await self._loading.run(lambda process: self._read(process, files))
        except LimitExceeded:
            raise AdapterRefused(
                f"its text files take more time or memory to read than {LOADING_S:g} s and the "
                "server's limits",
                field=next(iter(files)),
            ) from None
        if "refused" in reply:
            raise AdapterRefused(reply["refused"], field=reply.get("field"))
        notes = list(reply["notes"])
        side = None if reply["side"] is None else TextSide.from_json(reply["side"])
        if side is not None:
            side = self._sides.setdefault(side.key, side)
        if side is not None and side.is_own_template and side.template is not None:
            notes += await self._trial(side)
        held = None if side is None else weakref.ref(side)
        self._read_before[sha256] = (held, tuple(notes))
        while len(self._read_before) > MAX_REMEMBERED:
            del self._read_before[next(iter(self._read_before))]
        return side, tuple(notes)

    def _remembered(self, sha256: str) -> Reading | None:
        """The reading of files with this digest, if an adapter has it or if they are the base's."""
        if not sha256 or sha256 not in self._read_before:
            return None
        held, notes = self._read_before[sha256]
        if held is None:
            return None, notes
        side = held()
        return None if side is None else (side, notes)

    async def render(
        self,
        side: TextSide,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str | list[int]:
        if side.template is None:
            raise InvalidRequest(
                "neither the adapter nor the base has a chat template; send text or token ids "
                "instead",
                field="messages",
            )
        check_variables(variables, side.variables)
        request = {
            "op": "render",
            "key": side.key,
            "messages": as_templates_want(messages),
            "tools": list(tools),
            "variables": dict(variables),
        }
        size = CHARACTERS_PER_MESSAGE * len(messages) + sum(
            len(value) if isinstance(value, str) else len(json.dumps(value))
            for part in (*messages, *tools, variables)
            for value in part.values()
        )
        reply = await self._run(side, request, "messages", "chat template", size)
        return self._checked(reply["ids"], "messages") if "ids" in reply else str(reply["text"])

    async def encode(self, side: TextSide, text: str) -> list[int]:
        request = {"op": "encode", "key": side.key, "text": text}
        reply = await self._run(side, request, "text", "tokenizer", len(text))
        return self._checked(reply["ids"], "text")

    def close(self) -> None:
        self._loading.close()
        self._rendering.close()

    async def _trial(self, side: TextSide) -> list[str]:
        """Note on a template that refuses one plain message; one without bounds is refused."""
        try:
            await self.render(side, TRIAL_CHAT)
        except InvalidRequest as error:
            if side.key in self._refused_until:
                raise AdapterRefused(error.message, field="chat_template") from None
            return [f"its own template failed a trial: {error.message[:MAX_MESSAGE]}"]
        return []

    async def _run(
        self, side: TextSide, request: dict[str, Any], field: str, what: str, size: int
    ) -> dict[str, Any]:
        """Do one piece of work for a side, after the others that wait for it.

        Raises InvalidRequest if the side refuses the request, or used up its limits: then for a
        while at once.
        """
        lock = await self._turn(side)
        if time.monotonic() < self._refused_until.get(side.key, 0.0):
            lock.release()
            raise _spent(field, what, is_long=False)
        self._refused_until.pop(side.key, None)
        is_long = size >= LONG_PROMPT
        work = asyncio.ensure_future(self._once(side, request, lock, is_long))
        work.add_done_callback(_seen)
        try:
            reply = await asyncio.shield(work)  # a caller that goes away does not end the work
        except LimitExceeded:
            raise _spent(field, what, is_long=is_long) from None
        if "refused" in reply:
            raise InvalidRequest(
                f"the adapter's {what} refuses the {field}: {reply['refused'][:MAX_MESSAGE]}",
                field=field,
            )
        return reply

    async def _turn(self, side: TextSide) -> asyncio.Lock:
        """The side's lock, acquired. Raises Overloaded."""
        lock = self._locks.setdefault(side.key, asyncio.Lock())
        if self._waiting[side.key] >= MAX_WAITING_PER_SIDE:
            raise Overloaded("too many texts wait for this adapter's own text; try again later")
        self._waiting[side.key] += 1
        try:
            await lock.acquire()
        finally:
            self._waiting[side.key] -= 1
            if not self._waiting[side.key]:
                del self._waiting[side.key]
        return lock

    async def _once(
        self, side: TextSide, request: dict[str, Any], lock: asyncio.Lock, is_long: bool
    ) -> dict[str, Any]:
        """Run one request of a side and release the side's lock when it is really over."""
        try:
            return await self._rendering.run(lambda process: _ask(process, request, side))
        except LimitExceeded:
            if not is_long:
                self._refuse(side)
            raise
        finally:
            lock.release()

    def _refuse(self, side: TextSide) -> None:
        now = time.monotonic()
        kept = {key: until for key, until in self._refused_until.items() if until > now}
        self._refused_until = {**kept, side.key: now + PENALTY_S}

    def _checked(self, ids: list[int], field: str) -> list[int]:
        beyond = next((index for index in ids if not 0 <= index < self._vocab_size), None)
        if beyond is not None:
            raise InvalidRequest(
                f"{field} holds the token {beyond} of the adapter's tokenizer; the base has "
                f"{self._vocab_size} tokens",
                field=field,
            )
        return ids

    def _read(self, process: WorkerProcess, files: Mapping[str, bytes]) -> dict[str, Any]:
        with temporary_folder(Path(tempfile.gettempdir()), FOLDER_PREFIX) as folder:
            (folder / "own").mkdir()
            (folder / "work").mkdir()
            for file, content in files.items():
                (folder / "own" / file).write_bytes(content)
            request = {
                "op": "read",
                "folder": str(folder),
                "base": str(self._base_folder),
                "vocab_size": self._vocab_size,
            }
            return process.exchange(request, LOADING_S)


def _seen(work: asyncio.Future[Any]) -> None:
    """Look at a failure whose caller has gone, so that asyncio does not report it as lost."""
    if not work.cancelled():
        work.exception()


def _spent(field: str, what: str, *, is_long: bool) -> InvalidRequest:
    end = "Send less" if is_long else f"It is not run for {PENALTY_S:g} s. Send token ids"
    return InvalidRequest(
        f"the adapter's {what} takes more time or memory than the {RENDERING_S:g} s and 512 MiB "
        f"that it may. {end}, or load it without its own text",
        field=field,
    )


NOTHING: dict[str, Any] = {"key": "", "template": None, "variables": {}, "tokenizer": None}
"""A text side of nothing: opening it shows that a process has started."""


def _pool(kind: str, count: int) -> ProcessPool:
    command = ("lora_runtime.text.worker", kind)
    return ProcessPool("adapters' own text", command, count, lambda: {"op": "open", **NOTHING})


def _ask(process: WorkerProcess, request: dict[str, Any], side: TextSide) -> dict[str, Any]:
    """Ask about a text side, sending it first where the process does not have it."""
    reply = process.exchange(request, RENDERING_S)
    if "is_unknown" not in reply:
        return reply
    opened = process.exchange({"op": "open", **side.to_json()}, LOADING_S)
    return opened if "refused" in opened else process.exchange(request, RENDERING_S)
