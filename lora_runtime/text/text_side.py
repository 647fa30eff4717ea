"""How an adapter's text differs from the base's: read in the text process, used by the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True)
class TextSide:
    """Template, tokenizer and end tokens of an adapter; plain values that JSON can carry."""

    template: str | None
    """The chat template: the adapter's own, or the base's; None where neither has one."""
    variables: Mapping[str, str | list[str]]
    """What the template may name beside the messages: `bos_token`, `eos_token`, …"""
    is_own_template: bool
    """True when the template or its variables are not the base's."""
    tokenizer: str | None
    """The tokenizer that encodes, as JSON of the library `tokenizers`; None: the base's."""
    added: tuple[tuple[int, str, bool], ...] | None
    """(id, text, whether it is special) of each added token, to decode; None: the base's."""
    eos_token_ids: tuple[int, ...]
    """Ids of the tokens that end an output, ascending."""
    key: str = ""
    """SHA-256 of all other fields. Adapters of one request must have equal keys."""

    @property
    def renders_chats(self) -> bool:
        """True when conversations are rendered by this side, not by the base's own tokenizer."""
        return self.is_own_template or self.tokenizer is not None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TextSide:
        """The text side that `to_json` was called on."""
        added = value["added"]
        return cls(
            **{
                **value,
                "added": None if added is None else tuple(map(tuple, added)),
                "eos_token_ids": tuple(value["eos_token_ids"]),
            }
        )
