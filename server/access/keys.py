"""The file of keys: whose they are and what they are for. It is read again when it changes.

It holds SHA-256 of the keys, not the keys. A key is 256 random bits, which nobody can guess from
their hash, so a slow hash and a salt, which passwords need, would add nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import AfterValidator, BeforeValidator

from lora_runtime.errors import ConfigError, Unauthenticated
from lora_runtime.plain_file import read_plain_file
from lora_runtime.settings import checked, parse_yaml, setting, settings
from loramux.server.access.caller import ALL, Caller, Limits, Role

KEY_PREFIX = "lmx_"
"""So that a key in a log or a repository is seen to be one."""
MAX_KEY_LENGTH = 256
PREFIX_LENGTH = 8

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PATTERN = re.compile(r"[!-~]{1,256}", re.ASCII)

logger = structlog.get_logger(__name__)


def _id(value: str) -> str:
    if not _ID.fullmatch(value):
        raise ValueError("up to 64 letters, digits, '.', '_' and '-', a letter or digit first")
    return value


def _sha256(value: str) -> str:
    if not _SHA256.fullmatch(value):
        raise ValueError("the SHA-256 of a key, 64 hexadecimal digits in lower case")
    return value


def _pattern(value: str) -> str:
    if not _PATTERN.fullmatch(value):
        raise ValueError("a pattern such as 'acme-*', or '*' for all")
    return value


def _time(value: object) -> object:
    """A date is its first moment; what has no zone is UTC."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        raise ValueError("a date such as 2027-01-31, or a time such as 2027-01-31T12:00:00Z")
    return value if value.tzinfo else value.replace(tzinfo=UTC)


Id = Annotated[str, AfterValidator(_id)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Time = Annotated[datetime, BeforeValidator(_time)]


@settings
class KeyEntry:
    """One key, or one certificate, of a tenant."""

    id: Id = setting()
    """Its name in the log."""
    tenant: Id = setting()
    role: Role = setting()
    adapters: tuple[Pattern, ...] = setting()
    """Patterns of the adapters that exist for it; none: only the base."""
    sha256: Sha256 | None = setting(default=None)
    certificate: Annotated[str, AfterValidator(_pattern)] | None = setting(default=None)
    """The common name, or a DNS name, of a client's certificate."""
    sources: tuple[Pattern, ...] | None = setting(default=None)
    """Patterns of what an operator may load beside uploads. None: everything that the server
    allows if `adapters` has '*', else nothing."""
    expires: Time | None = setting(default=None)


@settings
class KeyFile:
    """What a file of keys says."""

    tenants: dict[Id, Limits] = setting(default_factory=dict)
    keys: tuple[KeyEntry, ...] = setting(default=())


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A key's hash, its caller, and when it ends."""

    sha256: str
    caller: Caller
    expires: datetime | None

    def checked(self) -> Caller:
        """Return the caller. Raises Unauthenticated for a key that has expired."""
        if self.expires is not None and datetime.now(UTC) >= self.expires:
            raise Unauthenticated(
                f"the key {self.caller.key_id!r} expired at {self.expires.isoformat()}"
            )
        return self.caller


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Who has which key, for look-ups."""

    by_prefix: Mapping[str, list[KnownKey]] = field(default_factory=lambda: defaultdict(list))
    """By the first digits of the hash."""
    by_certificate: Mapping[str, KnownKey] = field(default_factory=dict)

    def of_key(self, key: str) -> Caller:
        """Return who has a key. Raises Unauthenticated.

        Where the look-up ends early, that tells something of the hash of what was sent. Whoever
        guesses cannot choose a hash, so it brings nobody nearer to a key.
        """
        sha256 = hashed(key[: MAX_KEY_LENGTH + 1])
        for known in self.by_prefix.get(sha256[:PREFIX_LENGTH], ()):
            if hmac.compare_digest(known.sha256, sha256):
                return known.checked()
        raise Unauthenticated("the API key is not one that this server knows")

    def of_certificate(self, names: Iterable[str]) -> Caller:
        """Return whose certificate has one of these names. Raises Unauthenticated."""
        for name in names:
            if name in self.by_certificate:
                return self.by_certificate[name].checked()
        raise Unauthenticated("the client's certificate has no entry in the server's file of keys")


class Keys:
    """The keys of a file, as it was when it could be read last."""

    def __init__(self, file: Path) -> None:
        """Raises ConfigError naming the entry that cannot be used."""
        self._file = file
        self._content = _read(file)
        self._problem = ""
        self.table = table_of(self._content, file)

    def reload(self) -> None:
        """Read the file if it has changed; what cannot be used changes nothing, and the log says
        why. Calls that run go on.
        """
        try:
            content = _read(self._file)
            if content != self._content:
                self.table, self._content = table_of(content, self._file), content
                logger.info("keys read again", file=str(self._file))
            self._problem = ""
        except ConfigError as error:
            if error.message != self._problem:
                logger.error("the keys are as before", error=error.message)
            self._problem = error.message


def hashed(key: str) -> str:
    """Return what a file of keys holds of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """Make a key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def table_of(content: bytes, file: Path) -> KeyTable:
    """Return the keys of a file's content. Raises ConfigError naming the entry."""
    found, table = parsed(content, file), KeyTable(defaultdict(list), by_certificate := {})
    seen: dict[tuple[str, str], int] = {}
    for index, entry in enumerate(found.keys):
        where = f"{file}: keys[{index}]"
        _check(entry, where, found.tenants)
        for name in ("id", "sha256", "certificate"):
            value = getattr(entry, name)
            first = seen.setdefault((name, value), index)
            if value is not None and first != index:
                raise _bad(f"{where}.{name} is that of keys[{first}]; give each its own")
        known = KnownKey(entry.sha256 or "", _caller(entry, found.tenants), entry.expires)
        if entry.certificate is not None:
            by_certificate[entry.certificate] = known
        else:
            table.by_prefix[known.sha256[:PREFIX_LENGTH]].append(known)
    return table


def parsed(content: bytes, file: Path) -> KeyFile:
    """Return what a file's content says. Raises ConfigError naming the entry."""
    try:
        values = parse_yaml(content.decode())
    except (ValueError, RecursionError) as error:
        raise _bad(f"{file} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise _bad(f"{file} must hold `tenants:` and `keys:`")
    try:
        return checked(values, KeyFile)
    except ConfigError as error:
        raise _bad(f"{file}: {error.message}") from None


def _check(entry: KeyEntry, where: str, tenants: Mapping[str, Limits]) -> None:
    if (entry.sha256 is None) == (entry.certificate is None):
        raise _bad(f"{where} ({entry.id}) must have either sha256 or certificate")
    if entry.tenant not in tenants:
        raise _bad(
            f"{where}.tenant is {entry.tenant!r}, which is not among the tenants; add a line "
            f"`{entry.tenant}: {{}}` to them"
        )
    if entry.sources is not None and entry.role is not Role.OPERATOR:
        raise _bad(f"{where}.sources are an operator's; {entry.id!r} is a user: leave them out")


def _caller(entry: KeyEntry, tenants: Mapping[str, Limits]) -> Caller:
    sources = entry.sources
    if sources is None:
        sources = (ALL,) if ALL in entry.adapters else ()
    return Caller(
        key_id=entry.id,
        tenant=entry.tenant,
        role=entry.role,
        adapters=entry.adapters,
        sources=sources,
        limits=tenants[entry.tenant],
    )


def _read(file: Path) -> bytes:
    try:
        return read_plain_file(file)
    except OSError as error:
        raise _bad(f"{file} cannot be read: {error.strerror or error}") from None


def _bad(message: str) -> ConfigError:
    return ConfigError(f"keys: {message}", field="keys")
