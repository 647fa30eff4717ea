"""How much a JSON text holds, counted in its bytes before any of it is made an object.

A byte of a body becomes up to 56 of memory (`[]`), and what makes objects of one long list holds
the interpreter until it is done. Counting does neither.
"""

from __future__ import annotations

from lora_runtime.errors import InvalidRequest
from loramux.server.fields import MAX_PARTS, MAX_TEXTS, MAX_VALUES

_QUOTE, _BACKSLASH = b'"', b"\\"


def check_size(content: bytes) -> None:
    """Raise InvalidRequest (field `body`) for a text of more values, texts (keys among them), or
    lists and objects, than a request has. Punctuation within texts does not count; what is no JSON
    is left to its parser. The time is proportional to the bytes, and other threads run meanwhile.
    """
    num_values, num_texts, num_parts = 1, 0, 0
    begun = 0
    while begun < len(content):
        text = content.find(_QUOTE, begun)
        end = len(content) if text < 0 else text
        num_values += content.count(b",", begun, end)
        num_parts += content.count(b"[", begun, end) + content.count(b"{", begun, end)
        num_texts += text >= 0
        _check(num_values, MAX_VALUES, "values")
        _check(num_parts, MAX_PARTS, "lists and objects")
        _check(num_texts, MAX_TEXTS, "texts and keys")
        begun = _end_of_text(content, end + 1)


def _check(number: int, most: int, what: str) -> None:
    if number > most:
        raise InvalidRequest(f"body has more than {most} {what}; send less at once", field="body")


def _end_of_text(content: bytes, begun: int) -> int:
    """The place after the quote that ends a text: the first that no odd number of backslashes
    precedes.
    """
    while (quote := content.find(_QUOTE, begun)) >= 0:
        before = content[begun:quote]
        if (len(before) - len(before.rstrip(_BACKSLASH))) % 2 == 0:
            return quote + 1
        begun = quote + 1
    return len(content)
