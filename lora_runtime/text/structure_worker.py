"""The process where a definition of structured output is tried before it is compiled for serving.

Started by `structure_compiler.py`. llguidance is native code with limits of its own; what passes
them and still takes long, or takes the process down, does so here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_runtime.text.structured_output import (
    Matcher,
    Vocabulary,
    compile_grammar,
    said_by,
    token_masks,
)
from lora_runtime.text.worker_frames import answer_frames, limit_process

CPU_S = 2
MEMORY_BYTES = 1 << 28
VOCABULARY_BYTES = 1 << 30
MAX_MASK_S = 0.05
"""Processor time of one token's mask: running streams wait for it."""
NUM_STEPS = 32
"""Tokens that are tried, drawn at random."""


class StructureWorker:
    """Tries one definition after the other over one vocabulary."""

    def __init__(self) -> None:
        self._vocabulary: Vocabulary | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Give `refused`, what is wrong with the grammar, or nothing."""
        if request["op"] == "open":
            tokens = [token.encode("latin-1") for token in request["tokens"]]
            self._vocabulary = Vocabulary(tokens, request["special_ids"])
            limit_process(MEMORY_BYTES)
            return {}
        assert self._vocabulary is not None
        try:
            _try(request["grammar"], self._vocabulary)
        except ValueError as error:
            return {"refused": str(error)}
        except MemoryError:
            return {"refused": "it takes too much memory", "is_over": True}
        return {}


def _try(grammar: str, vocabulary: Vocabulary) -> None:
    """Compile a grammar and follow a random text of it. Raises ValueError."""
    matcher = Matcher(compile_grammar(grammar, vocabulary), frozenset())
    random = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        begun = time.thread_time()
        allowed = np.flatnonzero(token_masks([matcher], vocabulary.size)[0])
        if matcher.error:
            raise ValueError(said_by(matcher.inner))
        if not len(allowed):
            return
        matcher.take(int(random.choice(allowed)))
        seconds = time.thread_time() - begun
        if seconds > MAX_MASK_S:
            raise ValueError(
                f"one token takes {seconds * 1e3:.0f} ms; at most {MAX_MASK_S * 1e3:.0f} ms may be "
                "taken from running streams"
            )


if __name__ == "__main__":
    answer_frames(StructureWorker().answer, CPU_S)
