"""Compiles definitions of structured output, each tried first where it can do no harm.

A definition is tried in a process that is killed when it takes too long or too much memory; only
what passed there is compiled in this one, in a thread. Both answers are remembered, so that what
was refused takes no process again: for each owner apart, who so learns nothing of what others ask
for, and whoever has most remembered is forgotten first.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from math import inf
from typing import Any, TypeAlias

from llguidance import LLMatcher

from lora_runtime.core import StructuredOutput
from lora_runtime.errors import InvalidRequest, UnsupportedFeature
from lora_runtime.text.structured_output import (
    Structure,
    Vocabulary,
    compile_grammar,
    field_of,
    grammar_of,
)
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.thinking import Thinking
from lora_runtime.text.worker_processes import LimitExceeded, ProcessPool, WorkerProcess

NUM_PROCESSES = 2
Key: TypeAlias = tuple[str, str]
"""Owner, and the grammar with what is thought before it: an output that thinks has another."""

NO_PLACE: AbstractAsyncContextManager[None] = nullcontext()
PENALTY_S = 60.0
"""How long a definition that took too much is refused: a busy machine may have been the cause."""
COMPILING_S = 1.5
"""Wall-clock time in the process."""
MAX_REMEMBERED = 256
MAX_SAID = 300
"""Characters of llguidance's own complaint that are passed on."""
MODULE = ("lora_runtime.text.structure_worker",)


class StructureCompiler:
    """Compiled forms over the vocabulary of one base. Processes start when first needed."""

    def __init__(self, make: Callable[[], Vocabulary | None]) -> None:
        """`make` gives the base's vocabulary, or None where its tokens are no bytes."""
        self._make = make
        self._vocabulary: Vocabulary | None = None
        self._is_made = False
        self._processes = ProcessPool("structured output", MODULE, NUM_PROCESSES, self._opening)
        self._known: OrderedDict[Key, LLMatcher | str] = OrderedDict()
        """The first matcher, or why there is none; the least recently used first."""
        self._refused_until: dict[Key, float] = {}
        """Until when what is known of a definition that took too much holds."""
        self._locks: weakref.WeakValueDictionary[Key, asyncio.Lock] = weakref.WeakValueDictionary()

    def prepare(self) -> Vocabulary | None:
        """Make the vocabulary, once. It holds the interpreter's lock for some tenths of a second,
        so a server calls this before it serves.
        """
        if not self._is_made:
            self._vocabulary, self._is_made = self._make(), True
        return self._vocabulary

    async def compile(
        self,
        form: StructuredOutput,
        side: TextSide | None = None,
        thinking: Thinking | None = None,
        *,
        owner: str = "",
        place: AbstractAsyncContextManager[None] = NO_PLACE,
    ) -> Structure:
        """Compile a form for outputs of the base's tokenizer, or of an adapter's text side, which
        may think before it. `owner`: for whom it is remembered; `place`: held while what is not
        remembered is compiled.

        Raises InvalidRequest naming the definition: it cannot be read, asks for what is not
        supported, or takes too much time or memory. Raises Overloaded, and what `place` raises.
        """
        grammar = grammar_of(form)
        if thinking is not None:
            grammar = thinking.before(grammar)
        vocabulary = self.prepare()
        if vocabulary is None:
            raise UnsupportedFeature(
                "sampling.structured_output is set; the base's tokenizer has tokens that are no "
                "bytes of their own, so it is not served here",
                field="sampling.structured_output",
            )
        key = (owner, grammar)
        async with self._locks.setdefault(key, asyncio.Lock()):
            is_due = time.monotonic() > self._refused_until.get(key, inf)
            if key not in self._known or is_due:
                async with place:
                    self._known[key] = await self._compiled(key, vocabulary)
            self._known.move_to_end(key)
            found = self._known[key]
        while len(self._known) > MAX_REMEMBERED:
            self._forget_one()
        if isinstance(found, str):
            field = field_of(form)
            raise InvalidRequest(f"{field} cannot be served: {found}", field=field)
        added = side.added if side is not None else None
        return Structure(found, vocabulary.differing(added or ()))

    def close(self) -> None:
        """End the processes."""
        self._processes.close()

    def _forget_one(self) -> None:
        """Forget what was used longest ago of the owner who has most."""
        ((owner, _),) = Counter(owner for owner, _ in self._known).most_common(1)
        oldest = next(key for key in self._known if key[0] == owner)
        del self._known[oldest]
        self._refused_until.pop(oldest, None)

    async def _compiled(self, key: Key, vocabulary: Vocabulary) -> LLMatcher | str:
        _, grammar = key
        self._refused_until.pop(key, None)
        try:
            reply = await self._processes.run(partial(_tried, grammar))
        except LimitExceeded:
            self._refused_until[key] = time.monotonic() + PENALTY_S
            return f"it takes more time or memory than the {COMPILING_S:g} s and 256 MiB it may"
        if "refused" in reply:
            return str(reply["refused"])[:MAX_SAID]
        try:
            return await asyncio.to_thread(compile_grammar, grammar, vocabulary)
        except ValueError as error:
            return str(error)[:MAX_SAID]

    def _opening(self) -> dict[str, Any]:
        vocabulary = self.prepare()
        assert vocabulary is not None
        return {
            "op": "open",
            "tokens": [token.decode("latin-1") for token in vocabulary.tokens],
            "special_ids": sorted(vocabulary.special_ids),
        }


def _tried(grammar: str, process: WorkerProcess) -> dict[str, Any]:
    return process.exchange({"op": "try", "grammar": grammar}, COMPILING_S)
