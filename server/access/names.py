"""What keeps the pages of others, in a browser on this machine, from a server without keys.

Such a server trusts whoever reaches its address, and a browser there reaches it for every page that
it shows. A page may send requests from its own site, which browsers say in Origin; or let its own
name resolve to 127.0.0.1, so that the browser takes the server for the page's site, and then the
name is in Host (DNS rebinding). An address or `localhost` in Host cannot be such a name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from ipaddress import ip_address

from lora_runtime.errors import PermissionDenied

LOCAL = "localhost"
_SITE = re.compile(r"(https?:)?//(\[[0-9a-f:.%]+\]|[^\s/@:\[\]]+)(?::([0-9]{1,5}))?")
NOWHERE = ("", None)
SHOWN = 100
"""Characters of a wrong name in the message about it."""


class Names:
    """The names by which an HTTP port without keys may be called."""

    def __init__(self, names: Collection[str] | None = None, host: str = LOCAL) -> None:
        """`names` are the operator's, for Host and Origin; None: every Host is taken. `host` is
        that of the address that is listened on.
        """
        self._names = None if names is None else frozenset(map(str.lower, names))
        self._hosts = {LOCAL, host.lower()}

    def check(self, hosts: Sequence[str], origins: Sequence[str]) -> None:
        """Raise PermissionDenied for a request with these headers Host and Origin if a page of
        another site may have sent it. What is no browser may leave out both.
        """
        for host in hosts:
            if not self._is_own(_name(f"//{host}")):
                raise PermissionDenied(
                    f"the header Host is {host[:SHOWN]!r}; without keys this server answers to "
                    "addresses, localhost and the names that its operator gives by --http-names"
                )
        own = {_place(f"//{host}") for host in hosts} - {NOWHERE}
        for origin in origins:
            if _place(origin) not in own and _name(origin) not in (self._names or ()):
                raise PermissionDenied(
                    f"the header Origin is {origin[:SHOWN]!r}, which is another site; without keys "
                    "this server answers to its own page and the names of --http-names only"
                )

    def _is_own(self, name: str) -> bool:
        if self._names is None or name in self._names or name in self._hosts:
            return True
        try:
            ip_address(name)
        except ValueError:
            return name.endswith(f".{LOCAL}")
        return True


def _name(url: str) -> str:
    """The host, without a port; "" for what has none."""
    return _place(url)[0]


def _place(url: str) -> tuple[str, int | None]:
    """Host and port; a scheme's usual port is None, as in a Host that leaves it out."""
    found = _SITE.fullmatch(url.lower())
    if found is None:
        return NOWHERE
    scheme, name, port = found.groups()
    is_usual = port is None or (scheme, port) in (("http:", "80"), ("https:", "443"))
    return name.strip("[]").removesuffix("."), None if is_usual else int(port)
