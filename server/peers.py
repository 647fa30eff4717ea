"""Who asks, as far as the connection tells: the same rule for every protocol."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import unquote

LOOPBACK = ("ipv4:127.", "ipv6:[::1]", "ipv6:[::ffff:127.")


def client_address(peer: str) -> str:
    """Return the address by which the engine counts a caller that has no tenant.

    gRPC's peers are `ipv4:1.2.3.4:567`, `ipv6:[::1]:567` (percent-encoded) and `unix:path`. The
    port is left out, so that more connections are not more shares, and of IPv6 the half that a host
    chooses for itself, as often as it likes; those from this machine keep theirs, where many
    programs and a proxy's clients have one address.
    """
    host, _, port = unquote(peer).rpartition(":")
    is_remote = host.startswith(("ipv4:", "ipv6:")) and port.isdecimal()
    return _network(host) if is_remote and not host.startswith(LOOPBACK) else peer


def _network(host: str) -> str:
    """From `ipv6:[2001:db8::1]` to `ipv6:2001:db8::/64`; IPv4 in IPv6, and a link's own, stay."""
    try:
        address = ip_address(host.removeprefix("ipv6:").strip("[]"))
    except ValueError:
        return host
    if not isinstance(address, IPv6Address) or address.is_link_local:
        return host
    if address.ipv4_mapped is not None:
        return f"ipv4:{address.ipv4_mapped}"
    return f"ipv6:{ip_network((int(address), 64), strict=False)}"


def peer_of(host: str, port: int) -> str:
    """Return a socket's other end as gRPC writes it."""
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
