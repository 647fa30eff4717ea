"""Whose adapters make room in host memory: it is shared out by tenant.

An adapter that a request brought is charged, whole, to every tenant whose requests have used it;
one that a tenant's operator loaded, to that tenant. What the operators of the whole server loaded
is charged to nobody. What that leaves is shared out among the tenants that something is charged to,
by their weights:

    share(t) = (max_bytes - bytes charged to nobody) * weight(t) / sum of the tenants' weights

A tenant may have more while nobody else wants it. For who loads within its share those make room
that are over theirs, most first, and then it itself; who would be over its share makes room itself,
and then those that are over theirs. So nobody who is within its share loses anything to others, but
to the operators of the whole server. Of a tenant's adapters on demand that nobody is using the one
goes that it has not used for the longest time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lora_runtime.adapters.host_cache import HostMemoryFull
from loramux.server.calls import AdapterRecord


def givers(
    records: Iterable[AdapterRecord],
    full: HostMemoryFull,
    loader: str | None,
    weights: Mapping[str, float],
) -> Sequence[str]:
    """The tenants that make room for an adapter, in their order.

    What is on its way in or out takes memory too, but of nobody's share: a tenant that loads much
    at once would else make all shares small, and everybody be over theirs.

    `records`: all names of the server; `loader`: the tenant that the new adapter is charged to,
    None for the operators of the whole server, for whom everybody makes room; `weights`: of the
    tenants, 1 where none is given.
    """
    charged: defaultdict[str, dict[str, int]] = defaultdict(dict)
    nobodys: dict[str, int] = {}
    for record in _contents(records):
        if not record.tenants and not record.is_on_demand:
            nobodys[record.digest] = record.num_bytes
        for tenant in record.tenants:
            charged[tenant][record.digest] = record.num_bytes
    if loader is not None:
        charged.setdefault(loader, {})
    of_tenants = {digest for contents in charged.values() for digest in contents}
    room = full.max_bytes - sum(nobodys[digest] for digest in nobodys.keys() - of_tenants)
    num_parts = sum(weights.get(tenant, 1.0) for tenant in charged)
    over = {
        tenant: sum(contents.values()) - room * weights.get(tenant, 1.0) / num_parts
        for tenant, contents in charged.items()
    }
    ordered = sorted(over, key=lambda tenant: -over[tenant])
    if loader is None:
        return ordered
    others = [tenant for tenant in ordered if tenant != loader and over[tenant] > 0]
    if over[loader] + full.num_bytes > 0:
        return [loader, *others]
    return [*others, loader]


def _contents(records: Iterable[AdapterRecord]) -> Iterator[AdapterRecord]:
    """What takes host memory: contents of names, and those kept for a rollback."""
    for record in records:
        yield record
        if record.former is not None:
            yield record.former
