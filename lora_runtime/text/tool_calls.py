"""Calls of tools in the text of an output, read as it comes.

What is no call stays text. A call's name is given once its arguments begin; from then on the
arguments are given as they come. How an output is cut into pieces makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lora_runtime.text.tool_formats.incoming_text import IncomingText
from lora_runtime.text.tool_formats.tool_format import Call, NoCall, Schemas, ToolFormat


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of one call of a tool: its first part has the id and the name."""

    index: int
    """Which call of the output, from 0."""
    id: str = ""
    name: str = ""
    arguments: str = ""
    """More of the text of a JSON object."""


class Parsed(NamedTuple):
    """What more of an output's text gives."""

    text: str
    calls: tuple[ToolCallDelta, ...]


class CallReader:
    """Reads the text of one output. `is_over` turns True when the last call that may be made is
    whole: what follows is not read.
    """

    def __init__(self, format: ToolFormat, schemas: Schemas, max_calls: int | None = None) -> None:
        """`max_calls`: None, as many as there are."""
        self.num_calls = 0
        self.is_over = False
        self._format, self._schemas, self._max_calls = format, schemas, max_calls
        self._held = ""
        """Text before calls that is not given yet."""
        self._space = ""
        """White space before the calls that are being read; it goes with them."""
        self._num_whole = 0
        self._may_open = bool(format.opening)
        self._text = IncomingText("")
        """What is being read as calls."""
        self._reading: Iterator[None] | None = None
        """None: no calls are being read."""
        self._calls: list[Call] = []
        """Of the calls that are being read those that are not given as a whole."""
        self._num_given = -1
        """Characters of the first one's arguments that are given; -1: it has not begun."""
        self._is_begun = False
        """One of the calls that are being read has begun."""

    @property
    def are_whole(self) -> bool:
        """False: a call ends within its arguments, so far as it has come."""
        return self._num_whole == self.num_calls

    def push(self, text: str) -> Parsed:
        """Take more text, give what is certain by now."""
        texts: list[str] = []
        parts: list[ToolCallDelta] = []
        if self._reading is None:
            self._held += text
        else:
            self._text.push(text, is_trimmed=self._is_begun)
        while not self.is_over:
            reading = self._reading or self._find(texts)
            if reading is None:
                break
            is_call = True
            try:
                next(reading)
            except StopIteration:
                self._reading = None
            except NoCall:
                self._reading, is_call = None, False
            parts += self._news()
            if self._reading is not None:
                break
            self._leave(texts, is_call=is_call)
        return Parsed("".join(texts), tuple(parts))

    def flush(self) -> Parsed:
        """Give the rest at the end of the output; a call that is cut short stays as it is."""
        rest = self._held if self._reading is None else self._space + self._text.held
        is_given = self.is_over or self._is_begun or (self.num_calls and rest.isspace())
        self._held, self._reading = "", None
        return Parsed("" if is_given else rest, ())

    def _find(self, texts: list[str]) -> Iterator[None] | None:
        """Give text up to where calls begin, or up to what may be their beginning; begin to read
        them.
        """
        held, marker = self._held, self._format.marker
        if self._may_open and held.strip():
            self._may_open = False
            if held.lstrip().startswith(self._format.opening):
                return self._begin(held, len(held) - len(held.lstrip()))
        found = held.find(marker)
        if found < 0:
            kept = num_kept(held, marker)
            texts.append(held[: len(held) - kept])
            self._held = held[len(held) - kept :]
            return None
        texts.append(held[:found].rstrip())
        return self._begin(held, found)

    def _begin(self, held: str, start: int) -> Iterator[None]:
        before = held[:start]
        self._space, self._held = before[len(before.rstrip()) :], ""
        self._text, self._calls = IncomingText(held[start:]), []
        self._reading = self._format.read(self._text, self._calls, self._schemas)
        self._may_open = self._is_begun = False
        self._num_given = -1
        return self._reading

    def _leave(self, texts: list[str], *, is_call: bool) -> None:
        """Go on behind calls, or behind what turned out to be none: it is text."""
        text = self._text
        if not is_call and not self._is_begun:
            texts.append(self._space + text.held[: text.at])
        self._held, self._is_begun = text.held[text.at :], False

    def _news(self) -> Iterator[ToolCallDelta]:
        """What of the calls that are being read has not been given."""
        while self._calls and not self.is_over:
            call = self._calls[0]
            if call.arguments is None:
                return
            is_new, num_given = self._num_given < 0, max(self._num_given, 0)
            self.num_calls += is_new
            self._is_begun = True
            self._num_given = len(call.arguments)
            if is_new or self._num_given > num_given:
                new_id, name = (self._format.new_id(), call.name) if is_new else ("", "")
                more = call.arguments[num_given:]
                yield ToolCallDelta(self.num_calls - 1, new_id, name, more)
            if not call.is_whole:
                return
            del self._calls[0]
            self._num_whole += 1
            self._num_given = -1
            self.is_over = self.num_calls == self._max_calls


def num_kept(held: str, marker: str) -> int:
    """Length of a text's end that may go with a marker: white space and the marker's beginning."""
    longest = min(len(marker) - 1, len(held))
    size = next((n for n in range(longest, 0, -1) if held.endswith(marker[:n])), 0)
    before = held[: len(held) - size]
    return len(held) - len(before.rstrip())
