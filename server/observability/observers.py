"""Who is told how requests and adapters fare."""

from __future__ import annotations

from typing import Any, Protocol

from lora_runtime.core import RequestTiming


class AdapterObserver(Protocol):
    """Told when adapters come and go; for metrics."""

    def on_adapter_loaded(self, name: str, digest: str, nbytes: int, seconds: float) -> None:
        """A name points to new content, read and checked in `seconds`."""

    def on_adapter_unloaded(self, name: str) -> None:
        """A name is gone; its last requests may still run."""


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


class Observers:
    """A RequestObserver that passes everything on to each of several, in their order."""

    def __init__(self, *observers: RequestObserver) -> None:
        self._observers = observers

    def on_started(self, adapters: tuple[str, ...]) -> tuple[Any, ...]:
        """Return what each of them names the request."""
        return tuple(observer.on_started(adapters) for observer in self._observers)

    def on_first_token(self, request: tuple[Any, ...], seconds: float) -> None:
        """Pass it on."""
        for observer, own in zip(self._observers, request, strict=True):
            observer.on_first_token(own, seconds)

    def on_tokens(
        self, request: tuple[Any, ...], num_tokens: int, seconds_since_last: float | None
    ) -> None:
        """Pass it on."""
        for observer, own in zip(self._observers, request, strict=True):
            observer.on_tokens(own, num_tokens, seconds_since_last)

    def on_finished(
        self,
        request: tuple[Any, ...],
        reason: str,
        num_prompt_tokens: int,
        num_output_tokens: int,
        e2e_s: float,
        timing: RequestTiming | None,
    ) -> None:
        """Pass it on."""
        for observer, own in zip(self._observers, request, strict=True):
            observer.on_finished(own, reason, num_prompt_tokens, num_output_tokens, e2e_s, timing)

    def on_adapter_loaded(self, name: str, digest: str, nbytes: int, seconds: float) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.on_adapter_loaded(name, digest, nbytes, seconds)

    def on_adapter_unloaded(self, name: str) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.on_adapter_unloaded(name)
