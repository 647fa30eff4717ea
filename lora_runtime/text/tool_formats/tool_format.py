"""What a format of calls is: where it begins, how it is read, and the grammar that forces it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_runtime.core import StructuredOutput, StructureKind

if TYPE_CHECKING:
    from lora_runtime.text.tool_formats.incoming_text import IncomingText

MAX_PARALLEL = 8
"""Calls of one output that has to call tools."""

Schemas = Mapping[str, Mapping[str, Any] | None]
"""Tool → JSON schema of its arguments, None for any object; in the order they were given."""
Literal = Callable[[str], str]
"""A text as a grammar has it: in quotes, or the id of the special token that it is."""


@dataclass(slots=True)
class Call:
    """A call as far as its text goes."""

    name: str = ""
    arguments: str | None = None
    """The text of a JSON object, or its beginning; None: they have not begun."""
    is_whole: bool = False
    """The arguments are complete."""


class NoCall(Exception):
    """The text is no call from here on."""


Reading = Callable[["IncomingText", list[Call], Schemas], Iterator[None]]
"""Reads calls from the beginning of a text, which is that of their marker, into a list, and ends
where they do. Yields where it needs more text. Raises NoCall."""
Grammar = Callable[[Schemas, Literal, int], str]
"""The rule `calls` of a grammar in llguidance's dialect of Lark, and those that it needs: calls of
some tools, at most so many, and nothing else."""


def call_id() -> str:
    """An id as OpenAI's API has them."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls."""

    name: str
    marker: str
    """What calls begin with."""
    hidden: tuple[str, ...]
    """Texts of the format that may be special tokens of a vocabulary, which are no text."""
    read: Reading
    grammar: Grammar
    opening: str = ""
    """What calls at the very beginning of an output may begin with instead."""
    new_id: Callable[[], str] = call_id
    """Makes a call's id. No model writes one; templates are given it again with the next turn."""
    marks_each: bool = True
    """Each call has a marker of its own. False: one stands before all."""

    def form(
        self, schemas: Schemas, special_ids: Mapping[str, int], max_calls: int = MAX_PARALLEL
    ) -> StructuredOutput:
        """The form of an output that makes one to `max_calls` calls of these tools. special_ids: of
        `hidden`, those that are special tokens.
        """
        literal = partial(_literal, special_ids)
        calls = self.grammar(schemas, literal, max_calls)
        return StructuredOutput(StructureKind.GRAMMAR, f"start: calls\n{calls}")

    def free_form(
        self, schemas: Schemas, special_ids: Mapping[str, int], max_calls: int = MAX_PARALLEL
    ) -> StructuredOutput:
        """The form of an output that is any text, and may make calls of these tools within it."""
        marker = _literal(special_ids, self.marker)
        if self.marker in special_ids:  # it is no text, so any text ends before it
            begin, text = f"begin: /(?s:.*)/ {marker}", "/(?s:.+)/"
        else:
            begin = f"begin[lazy]: BEGIN\nBEGIN: /(?s:.*)/ {marker}"
            escaped = re.escape(self.marker).replace("/", r"\/")
            text = f"/(?s:.+)/ & ~/(?s:.*){escaped}(?s:.*)/"

        def literal(wanted: str) -> str:
            return "begin" if wanted == self.marker else _literal(special_ids, wanted)

        calls = self.grammar(schemas, literal, 1 if self.marks_each else max_calls)
        times = max_calls if self.marks_each else 1
        start = f"start: calls{{0,{times}}} TEXT?\nTEXT: {text}\n{begin}"
        return StructuredOutput(StructureKind.GRAMMAR, f"{start}\n{calls}")


def _literal(special_ids: Mapping[str, int], text: str) -> str:
    return f"<[{special_ids[text]}]>" if text in special_ids else json.dumps(text)


def several(one: str, separator: str, most: int) -> str:
    """The right side of a rule: `one`, up to `most` times, with a separator between."""
    return one if most == 1 else f"{one} ({separator} {one}){{0,{most - 1}}}"
