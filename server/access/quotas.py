"""What tenants take of a server now, held against what each may take."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from lora_runtime.errors import InvalidRequest, QuotaUsed
from loramux.server.access.caller import Caller, Limits

BURST_S = 10.0
"""Seconds of a tenant's rate that it may save up and take at once."""

Spend: TypeAlias = Callable[[int], None]
"""Told of every token of a request, prompt and output."""


@dataclass(slots=True)
class _Taken:
    num_requests: int = 0
    tokens: float | None = None
    """What is left of the tokens; below 0 it is owed. None: nothing was taken yet."""
    counted_at: float = 0.0
    loading: Counter[str] = field(default_factory=Counter)
    """Names of adapters that are being loaded."""


class Quotas:
    """Counts for each tenant. One event loop owns them.

    Tokens are a bucket: it fills at the tenant's rate, up to its burst, and a request is let in
    while it is not empty. The length of an answer is not known then, so that running requests may
    overdraw it, by at most what they ask for; whoever comes next waits until that is paid.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._taken: defaultdict[str, _Taken] = defaultdict(_Taken)

    @contextmanager
    def request(self, caller: Caller, num_outputs: int = 1) -> Iterator[Spend]:
        """Count a request while it waits and runs, once for each of its outputs.

        Raises QuotaUsed, and InvalidRequest (field `sampling.n`) for more outputs than the tenant
        may ever have.
        """
        limits, taken = caller.limits, self._taken[caller.tenant]
        _check_outputs(caller, limits, taken.num_requests, num_outputs)
        self._check_tokens(caller, limits, taken)
        taken.num_requests += num_outputs

        def spend(num_tokens: int) -> None:
            if limits.tokens_per_s is not None:
                taken.tokens = self._left(limits.tokens_per_s, limits, taken) - num_tokens

        try:
            yield spend
        finally:
            taken.num_requests -= num_outputs

    @contextmanager
    def adapter(self, caller: Caller, name: str, held: Iterable[str]) -> Iterator[None]:
        """Count a name while something is loaded under it; `held` are those that the caller's
        tenant holds already. Raises QuotaUsed for one too many.
        """
        loading = self._taken[caller.tenant].loading
        self.check_adapters(caller, {*held, name})
        loading[name] += 1
        try:
            yield
        finally:
            loading[name] -= 1
            if not loading[name]:
                del loading[name]

    def check_adapters(self, caller: Caller, held: Iterable[str]) -> None:
        """Raise QuotaUsed if these names and those that are being loaded are more than the
        caller's tenant may hold.
        """
        names, most = {*held, *self._taken[caller.tenant].loading}, caller.limits.max_adapters
        if most is not None and len(names) > most:
            raise QuotaUsed(
                f"tenant {caller.tenant!r} holds {len(names) - 1} adapters and may hold {most} "
                "(max_adapters), and none of them is on demand and unused; unload one first, or "
                "try again later",
                field="name",
            )

    def _check_tokens(self, caller: Caller, limits: Limits, taken: _Taken) -> None:
        rate = limits.tokens_per_s
        if rate is None:
            return
        left = self._left(rate, limits, taken)
        if left < 0:
            wait_s = -left / rate
            raise QuotaUsed(
                f"tenant {caller.tenant!r} has used its {rate:g} tokens per second; try again in "
                f"{wait_s:.1f} s",
                retry_after_s=wait_s,
            )

    def _left(self, rate: float, limits: Limits, taken: _Taken) -> float:
        """Fill the bucket for the time that has passed."""
        now, most = self._now(), limits.burst_tokens or BURST_S * rate
        before = most if taken.tokens is None else taken.tokens
        taken.tokens = min(most, before + rate * (now - taken.counted_at))
        taken.counted_at = now
        return taken.tokens


def _check_outputs(caller: Caller, limits: Limits, num_running: int, num_outputs: int) -> None:
    most = limits.max_requests
    if most is None or num_running + num_outputs <= most:
        return
    if num_outputs > max(1, most):
        raise InvalidRequest(
            f"sampling.n is {num_outputs}; each output counts as a request, and tenant "
            f"{caller.tenant!r} may have {most}",
            field="sampling.n",
        )
    raise QuotaUsed(
        f"{num_running} requests of tenant {caller.tenant!r} wait or run already, and it may have "
        f"{most}; try again later"
    )
