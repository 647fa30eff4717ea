"""What both gates of a server decide alike: who a caller is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_runtime.errors import Unauthenticated
from loramux.server.access.caller import ANONYMOUS, Caller
from loramux.server.access.keys import Keys

SCHEME = "bearer "


class Gate:
    """Knows callers by their keys or certificates. Without keys everybody is ANONYMOUS."""

    def __init__(self, keys: Keys | None = None, *, needs_certificate: bool = False) -> None:
        self.keys = keys
        self.needs_certificate = needs_certificate
        """A call over TLS must show a certificate, whatever key it has."""

    def caller(
        self, authorizations: Sequence[str], certificate: Sequence[str], peer: str
    ) -> Caller:
        """Return who calls: `authorizations` are the values of that header, `certificate` the names
        in the client's, which has been verified. A key goes before a certificate. Raises
        Unauthenticated.
        """
        if self.needs_certificate and not certificate:
            raise Unauthenticated("this server wants a client certificate; connect with one")
        if self.keys is None:
            return replace(ANONYMOUS, peer=peer)
        table = self.keys.table
        if authorizations:
            caller = table.of_key(_key(authorizations))
        elif certificate:
            caller = table.of_certificate(certificate)
        else:
            raise Unauthenticated(
                "this server wants an API key; send it as `authorization: Bearer KEY`, or to the "
                "command line as LORAMUX_API_KEY"
            )
        return replace(caller, peer=peer)


OPEN_GATE = Gate()
"""Lets everybody do everything."""


def _key(authorizations: Sequence[str]) -> str:
    if len(authorizations) > 1:
        raise Unauthenticated("authorization is given more than once; send one")
    scheme, key = authorizations[0][: len(SCHEME)], authorizations[0][len(SCHEME) :]
    if scheme.lower() != SCHEME:
        raise Unauthenticated("authorization must be `Bearer KEY`")
    return key.strip()
