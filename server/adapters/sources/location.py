"""The text of a source that lies elsewhere: its parts, and which the operator allows.

    hf:org/name[/folder][@revision]     s3://bucket/folder     gs://bucket/folder
    https://host[:port]/folder          each with #sha256=<digest of its files> or without

Only plain characters are taken, so that no text has two readings: no escapes, queries, credentials,
`.` or `..`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_address

from lora_runtime.errors import AdapterSourceRefused
from loramux.server.adapters.sources.folders import MAX_SOURCE_LENGTH, refused

_SEGMENT = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._+=~-]+"
_FOLDER = rf"{_SEGMENT}(?:/{_SEGMENT})*"
_DEEP = rf"{_SEGMENT}/{_FOLDER}"
_HOST = r"(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?"
FORMS = {
    "hf": (
        rf"hf:(?P<path>{_DEEP})(?:@(?P<revision>{_FOLDER}))?",
        "hf:org/name@revision",
    ),
    "s3": (rf"s3://(?P<path>{_DEEP})/?", "s3://bucket/folder"),
    "gs": (rf"gs://(?P<path>{_DEEP})/?", "gs://bucket/folder"),
    "https": (rf"https://(?P<host>{_HOST})/(?P<path>{_FOLDER})/?", "https://host/folder"),
}
"""Scheme → the sources it has, and how they are written."""
SHORTEST = {"hf": "hf:", "s3": "s3://", "gs": "gs://", "https": "https://host/"}
"""Scheme → the shortest prefix that an operator may allow."""
REMOTE = rf"^({'|'.join(FORMS)}):"
"""How a source that lies elsewhere begins."""
PLACE = "{name}"
"""Where an adapter's name goes in an operator's source for many of them."""
_PIN = re.compile(r"#sha256=([0-9a-f]{64})$", re.ASCII)


@dataclass(frozen=True, slots=True)
class Location:
    """A source that lies elsewhere."""

    text: str
    """As it was written, without the digest."""
    scheme: str
    path: str
    """`org/name[/folder]`, `bucket/folder` or, of https, the path without its first slash."""
    revision: str = ""
    host: str = ""
    """Of https: host, or host:port."""
    pin: str = ""
    """The digest that its files must have (see `content_digest`); "" for any."""


def is_remote(source: str) -> bool:
    """Tell whether a source is written like one that lies elsewhere."""
    return re.match(REMOTE, source) is not None


def pinned(source: str, digest: str) -> str:
    """The source that stands for this content alone; a pin that it has already is replaced."""
    return f"{_PIN.sub('', source)}#sha256={digest}"


def stored_digest(source: str) -> str:
    """The digest under which the store keeps what a source stands for: of an upload or of what was
    fetched. What is no digest is another folder's name.
    """
    if is_remote(source):
        found = _PIN.search(source)
        return found[1] if found else ""
    return source.rpartition("/")[2]


def parse(source: str) -> Location:
    """Take a source apart. Raises AdapterSourceRefused."""
    if len(source) > MAX_SOURCE_LENGTH:
        raise refused(source, f"is longer than {MAX_SOURCE_LENGTH} characters")
    scheme = source.partition(":")[0]
    pattern, form = FORMS[scheme]
    text, pin = _PIN.sub("", source), _PIN.search(source)
    found = re.fullmatch(pattern, text, re.ASCII)
    if found is None:
        raise refused(
            source,
            f"is not written as {form}, of letters, digits and . _ + = ~ -, with "
            "#sha256=<digest> behind it or without",
        )
    location = Location(text.rstrip("/"), scheme, pin=pin[1] if pin else "", **found.groupdict())
    return replace(location, revision=location.revision or "")


def check_prefix(prefix: str) -> str:
    """Return a prefix that an operator may allow. Raises ValueError saying how it is written."""
    scheme, separator, rest = prefix.partition(":")
    if not separator or scheme not in SHORTEST:
        raise ValueError(f"a prefix that begins with one of {', '.join(SHORTEST.values())}")
    if scheme == "https":
        if not re.fullmatch(rf"//{_HOST}/(?:{_FOLDER}/?)?", rest, re.ASCII):
            raise ValueError("https://host/ or https://host/folder/, without a user or a query")
    elif not prefix.startswith(SHORTEST[scheme]):
        raise ValueError(f"a prefix that begins with {SHORTEST[scheme]}")
    return prefix


def check_allowed(location: Location, prefixes: Iterable[str]) -> None:
    """Raise AdapterSourceRefused for a source that lies under none of the prefixes."""
    if not any(_is_under(location.text, prefix) for prefix in prefixes):
        raise AdapterSourceRefused(
            f"source {location.text[:200]!r} is under none of the prefixes that this server may "
            "fetch adapters from; its operator allows them by --adapter-sources",
            field="source",
        )


def named_addresses(prefixes: Iterable[str]) -> frozenset[str]:
    """Addresses that the prefixes themselves name, as `https://10.1.2.3:8443/` does: an operator
    who writes one means it, private or not.
    """
    found = set()
    for prefix in prefixes:
        host = prefix.removeprefix("https://").partition("/")[0]
        try:
            found.add(str(ip_address(split_host(host)[0])))
        except ValueError:
            continue
    return frozenset(found)


def split_host(host: str, port: int = 443) -> tuple[str, int]:
    """From `host[:port]` to both; an IPv6 address stands in brackets."""
    name, separator, given = host.rpartition(":")
    if not separator or host.endswith("]"):
        name, given = host, str(port)
    return name.removeprefix("[").removesuffix("]"), int(given)


def _is_under(text: str, prefix: str) -> bool:
    """Prefixes end where a name ends: `hf:acme` allows nothing of `hf:acme-evil`."""
    if not f"{text}/".startswith(prefix):
        return False
    rest = text[len(prefix) :]
    return prefix[-1] in "/:" or not rest or rest[0] in "/@"
