"""Places for work of one kind, shared out by tenant.

Up to its equal part of the places a tenant gets one at once, however many the others hold: work
that is slow is not broken off, so what others hold may not come free for long. Beyond its part it
gets what is free. So more places than `total` may be held while tenants come and go: with n tenants
at most total · (1 + 1/2 + … + 1/n), or one each where that is more.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from lora_runtime.errors import Overloaded


class TenantPlaces:
    """Who holds places and who waits for one. One event loop owns them."""

    def __init__(self, what: str, doing: str, total: int, *, max_waiting: int = 0) -> None:
        """`what` is done in them, for people: as "uploads", which "are running"; `max_waiting`: of
        each tenant.
        """
        self._what, self._doing = what, doing
        self._total, self._max_waiting = total, max_waiting
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        """In the order in which they came."""

    @property
    def num_held(self) -> int:
        """Places that are held now."""
        return self._held.total()

    @contextmanager
    def taken(self, tenant: str, *, field: str | None = None) -> Iterator[None]:
        """Hold a place while the context lasts. Raises Overloaded where none may be had at once;
        `field` is its field.
        """
        if not self._may_take(tenant):
            raise self._refused(tenant, field)
        self._held[tenant] += 1
        try:
            yield
        finally:
            self._give_back(tenant)

    @asynccontextmanager
    async def waited_for(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a place, and hold it while the context lasts. Raises Overloaded where too many
        of the tenant's wait already.
        """
        if self._may_take(tenant):
            self._held[tenant] += 1
        else:
            await self._wait(tenant)
        try:
            yield
        finally:
            self._give_back(tenant)

    async def _wait(self, tenant: str) -> None:
        if sum(other == tenant for other, _ in self._waiting) >= self._max_waiting:
            raise self._refused(tenant, None)
        handed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((tenant, handed))
        try:
            await handed
        except asyncio.CancelledError:
            if handed.cancelled():
                self._waiting.remove((tenant, handed))
                self._hand_out()
            else:  # it was handed over in the same moment
                self._give_back(tenant)
            raise

    def _may_take(self, tenant: str) -> bool:
        tenants = {tenant, *self._held, *(other for other, _ in self._waiting)}
        part = max(1, self._total // len(tenants))
        return self.num_held < self._total or self._held[tenant] < part

    def _give_back(self, tenant: str) -> None:
        self._held[tenant] -= 1
        self._held += Counter()  # forget who has none
        self._hand_out()

    def _hand_out(self) -> None:
        """Give places to those who wait and may have one: who holds least comes first, then who
        waits longest.
        """
        while may_take := [
            (tenant, handed)
            for tenant, handed in self._waiting
            if not handed.done() and self._may_take(tenant)
        ]:
            tenant, handed = min(may_take, key=lambda entry: self._held[entry[0]])
            self._waiting.remove((tenant, handed))
            self._held[tenant] += 1
            handed.set_result(None)

    def _refused(self, tenant: str, field: str | None) -> Overloaded:
        whose = f" of tenant {tenant!r}" if tenant else ""
        num_own = self._held[tenant] + sum(other == tenant for other, _ in self._waiting)
        return Overloaded(
            f"{num_own} {self._what}{whose} {self._doing}; try again later", field=field
        )
