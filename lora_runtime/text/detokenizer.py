"""Turns token ids into text as they arrive: never half a character or the start of a stop string.

Works for byte-level and for byte-fallback vocabularies. The text of a token depends on its
neighbours, so a window of recent tokens is decoded for each token, at a constant cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_runtime.text.tokenizer import TokenDecoder, Tokenizer

_INVALID = "\N{REPLACEMENT CHARACTER}"
_KEEP = 8
"""Earlier tokens that stay in the window, as the context of new ones."""
_TRIM_AT = 16
"""Window length at which all but the last _KEEP tokens are dropped."""
_MAX_INCOMPLETE = 3
"""A UTF-8 character has at most four bytes, so at most three can wait for another."""


class Detokenizer:
    """The text of one output stream. `stopped` turns True when a stop string is met."""

    def __init__(
        self,
        tokenizer: Tokenizer | TokenDecoder,
        prompt_token_ids: Sequence[int],
        stop: tuple[str, ...] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._window = list(prompt_token_ids[-_KEEP:])
        self._released = _without_incomplete(tokenizer.decode(self._window))
        """The beginning of the window's text that was returned already or belongs to the prompt."""
        self._held = ""
        """Text that is not returned yet because it may begin a stop string."""
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens, return the text that is certain by now; "" once stopped."""
        return "".join(self._past_stops(self._release(token_id)) for token_id in token_ids)

    def flush(self) -> str:
        """Return the rest at the end of the stream; an incomplete character becomes U+FFFD."""
        text = self._tokenizer.decode(self._window)
        rest = self._past_stops(text[len(self._released) :])
        self._released = text
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, token_id: int) -> str:
        """The text that a token adds and that later tokens cannot change."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if not text.startswith(self._released) and text.endswith(_INVALID):
            # Byte-fallback decoders call a whole run of bytes invalid until it is complete.
            return ""
        certain = _without_incomplete(text)
        fresh = certain[len(self._released) :]
        self._released = certain
        if len(self._window) >= _TRIM_AT:
            self._trim(text)
        return fresh

    def _trim(self, text: str) -> None:
        """Drop the oldest tokens, unless the others decode to another text without them."""
        tail = self._window[-_KEEP:]
        tail_text = self._tokenizer.decode(tail)
        num_waiting = len(text) - len(self._released)
        if text.endswith(tail_text) and num_waiting <= len(tail_text):
            self._window = tail
            self._released = tail_text[: len(tail_text) - num_waiting]

    def _past_stops(self, text: str) -> str:
        """What may be returned of new text: up to a stop string, or to what may begin one."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [start for start in map(text.find, self._stop) if start >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]


def _without_incomplete(text: str) -> str:
    """A text without the bytes at its end that may be a character's first ones."""
    num_invalid = len(text) - len(text.rstrip(_INVALID))
    return text[: len(text) - min(num_invalid, _MAX_INCOMPLETE)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that ends `text`."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
