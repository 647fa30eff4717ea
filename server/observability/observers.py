"""Several listeners where the service tells one."""

from __future__ import annotations

from typing import Any

from lora_runtime.core import RequestTiming
from server.generation.output import RequestObserver


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
