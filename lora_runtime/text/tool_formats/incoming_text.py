"""The text of calls while it comes, read from left to right and each part of it once.

What reads it is a generator that yields wherever it needs more text than there is, so that how the
text is cut into pieces makes no difference, and the time is proportional to its length.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from typing import TypeAlias, TypeVar

from lora_runtime.text.tool_formats.tool_format import NoCall

T = TypeVar("T")
Waiting: TypeAlias = Generator[None, None, T]
"""Yields where it needs more text, and returns what it has read."""

_SPACE = re.compile(r"\s*")


class IncomingText:
    """A text from the beginning of its calls, as far as it has come."""

    def __init__(self, held: str) -> None:
        self.held = held
        self.at = 0
        """Up to here it is read."""
        self.seen = 0
        """Up to here it has been looked through for what ends a part of it."""

    def push(self, text: str, *, is_trimmed: bool) -> None:
        """Take more text; if it `is_trimmed`, forget what is read."""
        if is_trimmed:
            self.held, self.seen, self.at = self.held[self.at :], self.seen - self.at, 0
        self.held += text

    @property
    def next(self) -> str:
        """The character that is to be read next; there must be one, as after `skip`."""
        return self.held[self.at]

    def taken(self, end: int) -> str:
        """Read up to a place, and return what was read."""
        text, self.at = self.held[self.at : end], end
        return text

    def skip(self) -> Iterator[None]:
        """Read white space, up to a character that is none."""
        while True:
            found = _SPACE.match(self.held, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.held):
                return
            yield

    def expect(self, *wanted: str) -> Waiting[str]:
        """Read one of some texts, of which none begins with another, and return it. Raises NoCall
        where something else stands.
        """
        while True:
            found = next((text for text in wanted if self.held.startswith(text, self.at)), None)
            if found is not None:
                return self.taken(self.at + len(found))
            longest = max(map(len, wanted))
            rest = self.held[self.at : self.at + longest]
            if not any(text.startswith(rest) for text in wanted):
                raise NoCall
            yield

    def until(self, end: str) -> Waiting[str]:
        """Read up to `end` and past it; return what stands before it."""
        self.seen = self.at
        while (found := self.held.find(end, self.seen)) < 0:
            self.seen = max(self.at, len(self.held) - len(end) + 1)
            yield
        text = self.taken(found)
        self.at += len(end)
        return text
