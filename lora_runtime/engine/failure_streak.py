"""Counts how many requests in a row ended by an unforeseen error: is anything still answered?"""

from __future__ import annotations

from collections.abc import Iterable

from lora_runtime.core import FinishReason, StepOutput
from lora_runtime.errors import RequestFailed


class FailureStreak:
    """Counts requests that ended by an unforeseen error, from 0 again when a request is answered.

    A request counts as answered when it ends as it should, or when it was getting tokens as another
    failed and gets more afterwards. A first token alone is no proof: if every second step fails,
    all requests get one.
    """

    def __init__(self) -> None:
        self.length = 0
        self._answering: set[str] = set()
        """Requests that have got a token."""
        self._bystanders: frozenset[str] = frozenset()
        """Requests that were getting tokens when the last failure happened."""

    def note(self, outputs: Iterable[StepOutput]) -> None:
        """Count the outputs of one step."""
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
