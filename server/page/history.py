"""The last five minutes of a server, one sample a second: what a page opened later can show."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from lora_runtime.core import RequestTiming
from lora_runtime.engine.client import EngineClient, EngineStats

INTERVAL_S = 1.0
NUM_SAMPLES = 300
PER_LOG = 20.0
"""Buckets for each factor e of a duration: neighbours lie 5 % apart."""
UNIT_S = 1e-6
NUM_BUCKETS = 500
"""The last begins at 20 hours."""


class Durations:
    """Counts durations in buckets: d seconds in number ⌊PER_LOG · ln(1 + d / UNIT_S)⌋, so that a
    percentile is right within 2.6 % of d + UNIT_S. Bounded memory, whatever comes.
    """

    def __init__(self) -> None:
        self._counts = [0] * NUM_BUCKETS

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a duration; called for every token."""
        bucket = int(PER_LOG * math.log1p(seconds / UNIT_S))
        self._counts[bucket if bucket < NUM_BUCKETS else -1] += count

    def percentile(self, share: float) -> float | None:
        """Return the duration in seconds that `share` (0 to 1) of all do not exceed.

        It is the middle of its bucket; None where nothing was counted.
        """
        wanted = share * sum(self._counts)
        for bucket, count in enumerate(self._counts):
            wanted -= count
            if count and wanted <= 0:
                return UNIT_S * math.expm1((bucket + 0.5) / PER_LOG)
        return None


@dataclass(slots=True)
class Traffic:
    """What requests of one adapter, or of the base, have done since it was loaded."""

    num_requests: int = 0
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One interval, and the engine at its end. Latencies are None where no token came."""

    at_s: float
    """Seconds since 1970."""
    num_running: int
    num_waiting: int
    output_tokens_per_s: float
    ttft_p50_s: float | None
    """Time to first token."""
    ttft_p95_s: float | None
    inter_token_p50_s: float | None
    inter_token_p95_s: float | None
    kv_share: float
    """Of the KV blocks, in use; 0 to 1."""
    pool_share: float
    """Of the adapter pool's bytes, in use; 0 to 1."""


COLUMNS = tuple(field.name for field in fields(Sample))


class History:
    """Hears how requests fare (`RequestObserver`) and keeps what a page draws."""

    def __init__(
        self, engine: EngineClient, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._clock = clock
        self.started_at_s = time.time()
        """Seconds since 1970; tells one server's history from that of the next."""
        self._samples: deque[Sample] = deque(maxlen=NUM_SAMPLES)
        self._num_taken = 0
        self._base = Traffic()
        self._adapters: dict[str, Traffic] = {}
        self._begin_interval()

    async def run(self) -> None:
        """Take a sample every second until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            self.sample()

    def sample(self) -> None:
        """End the interval: keep what it brought, forget the oldest."""
        stats, elapsed_s = self._engine.stats(), max(self._clock() - self._begun, 1e-3)
        self._samples.append(
            Sample(
                at_s=round(time.time(), 3),
                num_running=stats.num_running,
                num_waiting=stats.num_waiting,
                output_tokens_per_s=round(self._num_tokens / elapsed_s, 1),
                ttft_p50_s=_rounded(self._first_tokens.percentile(0.5)),
                ttft_p95_s=_rounded(self._first_tokens.percentile(0.95)),
                inter_token_p50_s=_rounded(self._inter_token.percentile(0.5)),
                inter_token_p95_s=_rounded(self._inter_token.percentile(0.95)),
                kv_share=round(stats.kv_blocks_used / max(stats.kv_blocks_total, 1), 4),
                pool_share=round(stats.pool_bytes_used / max(stats.pool_bytes_total, 1), 4),
            )
        )
        self._num_taken += 1
        self._begin_interval()

    def stats(self) -> EngineStats:
        """Return what the engine does now."""
        return self._engine.stats()

    def resident(self) -> frozenset[str]:
        """Return the digests of the adapters on the device."""
        return frozenset(self._engine.stats().resident_adapters)

    def since(self, number: int) -> tuple[int, Sequence[Sample]]:
        """Return the number of samples ever taken, and those after the first `number`, as far as
        they are kept. A number that was never reached is another server's: then all that are kept.
        """
        num_new = self._num_taken - number if 0 <= number <= self._num_taken else self._num_taken
        kept = list(self._samples)
        return self._num_taken, kept[max(0, len(kept) - num_new) :]

    def traffic(self, name: str = "") -> Traffic:
        """Return what an adapter's requests, or with "" the base's, have done."""
        return self._adapters.get(name, Traffic()) if name else self._base

    def on_started(self, adapters: tuple[str, ...]) -> tuple[Traffic, ...]:
        """Count a request under each of its adapters; without any, under the base."""
        used = tuple(self._adapters.setdefault(name, Traffic()) for name in adapters)
        for traffic in (counted := used or (self._base,)):
            traffic.num_requests += 1
        return counted

    def on_first_token(self, request: tuple[Traffic, ...], seconds: float) -> None:
        """Count the time to a request's first token."""
        self._first_tokens.add(seconds)

    def on_tokens(
        self, request: tuple[Traffic, ...], num_tokens: int, seconds_since_last: float | None
    ) -> None:
        """Count new tokens, and the time between them."""
        self._num_tokens += num_tokens
        for traffic in request:
            traffic.num_output_tokens += num_tokens
        if seconds_since_last is not None:
            self._inter_token.add(seconds_since_last / num_tokens, num_tokens)

    def on_finished(
        self,
        request: tuple[Traffic, ...],
        reason: str,
        num_prompt_tokens: int,
        num_output_tokens: int,
        e2e_s: float,
        timing: RequestTiming | None,
    ) -> None:
        """Nothing is left to count."""

    def on_adapter_loaded(self, name: str, digest: str, nbytes: int, seconds: float) -> None:
        """Other content under a name goes on with the name's traffic."""

    def on_adapter_unloaded(self, name: str) -> None:
        """Forget an adapter's traffic; what its running requests still do counts nowhere."""
        self._adapters.pop(name, None)

    def _begin_interval(self) -> None:
        self._begun = self._clock()
        self._num_tokens = 0
        self._first_tokens, self._inter_token = Durations(), Durations()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
