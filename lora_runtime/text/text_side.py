"""What of an adapter's text is not the base's: read in a process of its own, used by a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True)
class TextSide:
    """Plain values, so that JSON carries them between processes."""

    template: str | None
    """The chat template: the adapter's own, or the base's; None where neither has one."""
    variables: Mapping[str, str | list[str]]
    """What the template may name beside the messages: `bos_token`, `eos_token`, …"""
    is_own_template: bool
    """Template or variables are not the base's."""
    tokenizer: str | None
    """The tokenizer that encodes, as `tokenizers` writes it; None: the base's."""
    added: tuple[tuple[int, str, bool], ...] | None
    """(id, text, whether it is special) of its added tokens, for decoding; None: the base's."""
    eos_token_ids: tuple[int, ...]
    """What ends an output, ascending."""
    key: str = ""
    """SHA-256 of all the rest: sides of one key may act together."""

    @property
    def renders_chats(self) -> bool:
        """Conversations are rendered by this side and not by the base's own template."""
        return self.is_own_template or self.tokenizer is not None

    def to_json(self) -> dict[str, Any]:
        """As JSON carries it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TextSide:
        """What `to_json` gave."""
        added = value["added"]
        return cls(
            **{
                **value,
                "added": None if added is None else tuple(map(tuple, added)),
                "eos_token_ids": tuple(value["eos_token_ids"]),
            }
        )
