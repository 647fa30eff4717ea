"""Keys of two tenants and an operator, in a file as people write it."""

from __future__ import annotations

from pathlib import Path

from loramux.server.access.gate import Gate
from loramux.server.access.keys import Keys, hashed

ACME, RIVAL, OPERATOR, RIVAL_OPERATOR = "key-acme", "key-rival", "key-operator", "key-rival-op"
EXPIRED, WRONG = "key-expired", "key-nobody-has"

TEXT = f"""
tenants:
  acme: {{}}
  rival: {{}}
  house: {{}}
keys:
  - {{id: acme, tenant: acme, role: user, adapters: ["acme-*"], sha256: {hashed(ACME)}}}
  - {{id: rival, tenant: rival, role: user, adapters: ["rival-*"], sha256: {hashed(RIVAL)}}}
  - {{id: rival-op, tenant: rival, role: operator, adapters: ["rival-*"],
     sha256: {hashed(RIVAL_OPERATOR)}}}
  - {{id: operator, tenant: house, role: operator, adapters: ["*"], sha256: {hashed(OPERATOR)}}}
  - {{id: old, tenant: acme, role: operator, adapters: ["*"], expires: 2020-01-31,
     sha256: {hashed(EXPIRED)}}}
"""


def write_keys(folder: Path, text: str = TEXT) -> Path:
    file = folder / "keys.yaml"
    file.write_text(text)
    return file


def gate_of(folder: Path, text: str = TEXT) -> Gate:
    return Gate(Keys(write_keys(folder, text)))


def limited(limits: str) -> str:
    """The file in which acme has limits, as `max_requests: 2`, and an operator of its own."""
    own = f"{{id: acme-op, tenant: acme, role: operator, adapters: ['acme-*'], sources: ['*'], \
sha256: {hashed('key-acme-op')}}}"
    return TEXT.replace("acme: {}", f"acme: {{{limits}}}") + f"  - {own}\n"
