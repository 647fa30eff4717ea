"""Calls of tools in the text of an output, read as it comes.

What is no call stays text. A call's name is given once its arguments begin; from then on the
arguments are given as they come. How an output is cut into pieces makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lora_runtime.text.tool_formats.tool_format import Call, CutShort, NoCall, Schemas, ToolFormat


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
        """Text that is not given yet."""
        self._space = ""
        """White space before the calls that are held; it goes with them."""
        self._is_call = False
        """What is held begins with calls, so far as it goes."""
        self._may_open = bool(format.opening)
        self._given: list[Call] = []
        """What has been given of the calls that are held."""

    def push(self, text: str) -> Parsed:
        """Take more text, give what is certain by now."""
        self._held += text
        texts: list[str] = []
        parts: list[ToolCallDelta] = []
        while not self.is_over and (self._is_call or self._find(texts)):
            calls: list[Call] = []
            is_cut = False
            try:
                end = self._format.read(self._held, calls, self._schemas)
            except CutShort:
                end, is_cut = 0, True
            except NoCall:
                end = 0 if not _begun(calls) else len(self._held)
            parts += self._news(calls)
            if is_cut:
                break
            if end == 0:  # the marker was only text
                end = len(self._format.marker) if self._held.startswith(self._format.marker) else 1
                texts.append(self._space + self._held[:end])
            self._leave(end)
        return Parsed("".join(texts), tuple(parts))

    def flush(self) -> Parsed:
        """Give the rest at the end of the output; a call that is cut short stays as it is."""
        rest, self._held = self._space + self._held, ""
        is_given = self.is_over or self._given or (self.num_calls and rest.isspace())
        return Parsed("" if is_given else rest, ())

    def _find(self, texts: list[str]) -> bool:
        """Give text up to where calls begin, or up to what may be their beginning."""
        held, marker = self._held, self._format.marker
        if self._may_open and held.strip():
            self._may_open = False
            if held.lstrip().startswith(self._format.opening):
                self._hold(held, len(held) - len(held.lstrip()))
                return True
        found = held.find(marker)
        if found < 0:
            kept = num_kept(held, marker)
            texts.append(held[: len(held) - kept])
            self._held = held[len(held) - kept :]
            return False
        texts.append(held[:found].rstrip())
        self._hold(held, found)
        return True

    def _hold(self, text: str, start: int) -> None:
        before = text[:start]
        self._space, self._held = before[len(before.rstrip()) :], text[start:]
        self._is_call, self._may_open = True, False

    def _news(self, calls: Sequence[Call]) -> list[ToolCallDelta]:
        """What of the calls that are held has not been given."""
        parts, num_before = [], self.num_calls - len(self._given)
        room = None if self._max_calls is None else self._max_calls - num_before
        for place, call in enumerate(_begun(calls)[:room]):
            assert call.arguments is not None
            is_new = place == len(self._given)
            if is_new:
                self._given.append(Call(arguments=""))
                self.num_calls += 1
            given = self._given[place].arguments or ""
            if is_new or len(call.arguments) > len(given):
                new_id, name = (self._format.new_id(), call.name) if is_new else ("", "")
                more = call.arguments[len(given) :]
                parts.append(ToolCallDelta(num_before + place, new_id, name, more))
                self._given[place].arguments = call.arguments
            self.is_over = call.is_whole and num_before + place + 1 == self._max_calls
        return parts

    def _leave(self, end: int) -> None:
        self._held, self._is_call, self._space = self._held[end:], False, ""
        self._given.clear()


def _begun(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call.arguments is not None]


def num_kept(held: str, marker: str) -> int:
    """Length of a text's end that may go with a marker: white space and the marker's beginning."""
    longest = min(len(marker) - 1, len(held))
    size = next((n for n in range(longest, 0, -1) if held.endswith(marker[:n])), 0)
    before = held[: len(held) - size]
    return len(held) - len(before.rstrip())
