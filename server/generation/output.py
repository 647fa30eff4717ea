"""One request on its way out: engine outputs become text, and the observer hears of its course."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from lora_runtime.core import FinishReason, RequestTiming, StepOutput
from server.adapters.changes import AdapterObserver
from server.calls import Delta

if TYPE_CHECKING:
    from lora_runtime.text.output_text import OutputText


class RequestObserver(AdapterObserver, Protocol):
    """Told how requests and adapters fare; for metrics."""

    def on_started(self, adapters: tuple[str, ...]) -> Any:
        """A valid request of these adapters (names; none is the base) goes to the engine; exactly
        one on_finished will follow. What is returned names the request in the other calls: what
        adapter names mean may change while it runs.
        """

    def on_first_token(self, request: Any, seconds: float) -> None:
        """The request's first token came `seconds` after on_started."""

    def on_tokens(self, request: Any, num_tokens: int, seconds_since_last: float | None) -> None:
        """Tokens came; `seconds_since_last` is None for the first ones."""

    def on_finished(
        self,
        request: Any,
        reason: str,
        num_prompt_tokens: int,
        num_output_tokens: int,
        e2e_s: float,
        timing: RequestTiming | None,
    ) -> None:
        """The request ended. `reason` is a FinishReason's value. `timing` is None unless the engine
        ended the request: at a stop string, when the caller went away and on most errors it is
        None."""


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
    added = text.push(output)
    if not added and not output.token_ids:
        return None
    return Delta(text=added, token_ids=output.token_ids, logprobs=output.logprobs, index=index)


def _reason_of(error: BaseException | None) -> FinishReason:
    if isinstance(error, GeneratorExit | asyncio.CancelledError):
        return FinishReason.CANCELLED
    return FinishReason.ERROR
