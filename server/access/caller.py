"""Who asks, as every call of the service is told: a tenant, a role and the adapters it may see."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from lora_runtime.errors import InvalidRequest, PermissionDenied
from lora_runtime.settings import Float, Int, setting, settings

ALL = "*"
"""The pattern of all adapters and sources."""
STORED = re.compile(r"[0-9a-f]{64}", re.ASCII)
"""The source of an upload: who knows it has had the content, or was shown it."""


class Role(StrEnum):
    """What a key is for."""

    USER = "user"
    """Generates, and looks at the adapters that it may use."""
    OPERATOR = "operator"
    """Loads, replaces and unloads them too."""


@settings
class Limits:
    """What a tenant may take of a server. None: no bound of its own."""

    max_requests: Int | None = setting(default=None, gt=0, le=1_000_000)
    """Requests that wait or run at once."""
    tokens_per_s: Float | None = setting(default=None, gt=0, le=1e9)
    """Prompt and output tokens, on average."""
    burst_tokens: Float | None = setting(default=None, gt=0, le=1e12)
    """Tokens that may be taken at once after a rest. None: those of ten seconds."""
    max_adapters: Int | None = setting(default=None, ge=0, le=1_000_000)
    """Names that its operators may hold, of those that they may see."""
    weight: Float = setting(default=1.0, ge=0.01, le=100)
    """Its share of a busy server, against the other tenants'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks. Adapters and sources are shell patterns, as `acme-*`; the base is everybody's."""

    key_id: str = ""
    """The entry of the key file. Empty: the server has none, and everybody may do everything."""
    tenant: str = ""
    role: Role = Role.USER
    adapters: tuple[str, ...] = ()
    """Names that exist for this caller."""
    sources: tuple[str, ...] = ()
    """What an operator may load beside uploads, as it writes it."""
    limits: Limits = Limits()
    peer: str = ""
    """Whence it asks; for the log."""

    @property
    def is_over_all(self) -> bool:
        """An operator of the whole server."""
        return self.role is Role.OPERATOR and ALL in self.adapters

    def sees(self, name: str) -> bool:
        """Tell whether an adapter of that name may exist for this caller."""
        return matches(name, self.adapters)

    def check_manages(self, name: str | None = None, field: str = "name") -> None:
        """Raise PermissionDenied unless this is an operator, and of that adapter if one is named;
        whether there is such an adapter is not told.
        """
        if self.role is not Role.OPERATOR:
            raise PermissionDenied(
                f"the key {self.key_id!r} has the role user; this takes an operator's"
            )
        if name is not None and not self.sees(name):
            raise PermissionDenied(
                f"the key {self.key_id!r} is for adapters named {', '.join(self.adapters)[:200]}; "
                "choose such a name",
                field=field,
            )

    def check_over_all(self) -> None:
        """Raise PermissionDenied unless this is an operator of the whole server."""
        if not self.is_over_all:
            raise PermissionDenied(
                f"the key {self.key_id!r} is not an operator's for all adapters; this takes one"
            )

    def check_source(self, source: str) -> None:
        """Raise PermissionDenied for a source that this operator may not load from."""
        if not STORED.fullmatch(source) and not matches(source, self.sources):
            allowed = ", ".join(self.sources)[:200] or "none"
            raise PermissionDenied(
                f"the key {self.key_id!r} may upload, and load these sources: {allowed}; `sources` "
                "in the file of keys allows others",
                field="source",
            )

    def client(self, said: str, address: str) -> str:
        """The name under which the engine counts this caller: its tenant's; without keys the one
        that it says it has, or else its address. Raises InvalidRequest for another tenant's.
        """
        if self.tenant and said not in ("", self.tenant):
            raise InvalidRequest(
                f"tenant is {said!r}; the key {self.key_id!r} is of {self.tenant!r}: leave it out",
                field="tenant",
            )
        tenant = self.tenant or said
        return f"tenant:{tenant}" if tenant else address

    def cache_salt(self, own: str) -> str:
        """The salt of cached prefixes: a tenant's are its own. No tenant has a slash in its name,
        so that no two pairs of tenant and salt give the same text.
        """
        return f"{self.tenant}/{own}" if self.tenant else own


ANONYMOUS = Caller(role=Role.OPERATOR, adapters=(ALL,), sources=(ALL,))
"""Everybody, where a server has no keys."""

CURRENT: ContextVar[Caller] = ContextVar("caller")
"""Whose gRPC call the current task runs; set by the gate, and by nothing else."""


def matches(text: str, patterns: Iterable[str]) -> bool:
    """Tell whether one of the shell patterns is that of `text`, in these very letters."""
    return any(fnmatchcase(text, pattern) for pattern in patterns)
