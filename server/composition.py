"""The adapters of one request: what follows from their records for its text and its depth.

What any request may say of adapters is checked by `lora_runtime/engine/request_rules.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_runtime.errors import InvalidRequest
from lora_runtime.text.text_side import TextSide
from server.calls import AdapterRecord


def text_side(records: Sequence[AdapterRecord], uses_base_text: bool) -> TextSide | None:
    """Return the text side that a request's adapters share; None is the base's.

    Raises InvalidRequest (field `adapters`) where they bring different ones: a prompt has one
    tokenizer, one template and one set of end tokens, and which is the caller's to say.
    """
    if uses_base_text or not records:
        return None
    sides = {record.text.key if record.text else "": record.name for record in records}
    if len(sides) > 1:
        raise InvalidRequest(
            f"{', '.join(map(repr, sorted(sides.values())))} bring different text: tokens, chat "
            "templates or end tokens; set base_text to use the base's, or compose adapters of one "
            "text",
            field="adapters",
        )
    return records[0].text


def depth(records: Sequence[AdapterRecord]) -> int:
    """Return how many layers a request runs: the adapters' own, 0 for the base's."""
    return max((record.loaded.facts.num_layers for record in records if record.loaded), default=0)
