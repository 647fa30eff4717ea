"""The adapters of one request: what follows from their records for its text and its depth.

What any request may say of adapters is checked by `lora_runtime/engine/request_rules.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_runtime.engine.request_rules import shared_side
from lora_runtime.text.text_side import TextSide
from loramux.server.calls import AdapterRecord


def text_side(records: Sequence[AdapterRecord], uses_base_text: bool) -> TextSide | None:
    """Return the text side that a request's adapters share; None is the base's.

    Raises InvalidRequest (field `adapters`) where they bring different ones.
    """
    if uses_base_text:
        return None
    return shared_side(
        {record.name: record.text for record in records},
        field="adapters",
        advice="set base_text to use the base's, or ",
    )


def depth(records: Sequence[AdapterRecord]) -> int:
    """Return how many layers a request runs: the adapters' own, 0 for the base's."""
    return max((record.loaded.facts.num_layers for record in records if record.loaded), default=0)
