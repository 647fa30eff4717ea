"""Whether anything is still answered: how many requests in a row something unforeseen ended."""

from __future__ import annotations

from collections.abc import Iterable

from lora_runtime.core import FinishReason, StepOutput
from lora_runtime.errors import RequestFailed


class FailureStreak:
    """Counts unforeseen ends; starts again where a request is answered in spite of them.

    Answered is one that ends as it should, or that was getting tokens when another failed and gets
    more after. A first token alone says little: where every second step fails, all get one.
    """

    def __init__(self) -> None:
        self.length = 0
        self._answering: set[str] = set()
        """Requests that have got a token."""
        self._bystanders: frozenset[str] = frozenset()
        """Those of them that went on when the last one failed."""

    def note(self, outputs: Iterable[StepOutput]) -> None:
        """Take in what one step gave."""
        num_failed, is_answered = 0, False
        for output in outputs:
            request_id, reason = output.request_id, output.finish_reason
            num_failed += isinstance(output.error, RequestFailed)
            is_answered |= reason in (FinishReason.STOP, FinishReason.LENGTH)
            if output.token_ids:
                is_answered |= request_id in self._bystanders
                self._answering.add(request_id)
            if reason is not None:
                self._answering.discard(request_id)
        if is_answered:
            self.length, self._bystanders = 0, frozenset()
        if num_failed:
            self.length += num_failed
            self._bystanders = frozenset(self._answering)
