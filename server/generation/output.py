"""One request on its way out: engine outputs become text, and the observer hears of its course."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import TYPE_CHECKING

from lora_runtime.core import FinishReason, RequestTiming, StepOutput
from loramux.server.calls import Delta
from loramux.server.observability.observers import RequestObserver

if TYPE_CHECKING:
    from lora_runtime.text.output_text import OutputText


class RequestMeter:
    """Reports one request to an observer, from entering the context to leaving it."""

    def __init__(
        self, observer: RequestObserver, adapters: tuple[str, ...], num_prompt_tokens: int
    ) -> None:
        self.num_output_tokens = 0
        self._observer = observer
        self._adapters = adapters
        self._num_prompt_tokens = num_prompt_tokens
        self._reason: FinishReason | None = None
        self._timing: RequestTiming | None = None

    def __enter__(self) -> RequestMeter:
        self._begun = time.monotonic()
        self._last: float | None = None
        self._request = self._observer.on_started(self._adapters)
        return self

    def tokens(self, num_tokens: int) -> None:
        """Report new tokens."""
        if num_tokens == 0:
            return
        now = time.monotonic()
        if self._last is None:
            self._observer.on_first_token(self._request, now - self._begun)
        since_last = None if self._last is None else now - self._last
        self._observer.on_tokens(self._request, num_tokens, since_last)
        self.num_output_tokens += num_tokens
        self._last = now

    def finish(self, reason: FinishReason, timing: RequestTiming | None) -> None:
        """Keep why the request ended, to be reported on leaving."""
        self._reason = reason
        self._timing = timing

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._observer.on_finished(
            self._request,
            self._reason or _reason_of(error),
            self._num_prompt_tokens,
            self.num_output_tokens,
            time.monotonic() - self._begun,
            self._timing,
        )


def delta_of(text: OutputText, output: StepOutput, index: int) -> Delta | None:
    """Return what an output adds for the caller, or None when it adds nothing."""
    parts = text.push(output)
    if not any(parts) and not output.token_ids:
        return None
    return Delta(
        text=parts.text,
        reasoning=parts.reasoning,
        token_ids=output.token_ids,
        logprobs=output.logprobs,
        tool_calls=parts.tool_calls,
        index=index,
    )


def _reason_of(error: BaseException | None) -> FinishReason:
    if isinstance(error, GeneratorExit | asyncio.CancelledError):
        return FinishReason.CANCELLED
    return FinishReason.ERROR
