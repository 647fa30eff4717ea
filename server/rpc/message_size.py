"""How much a protobuf message holds, counted in its bytes before any of it is made an object.

Two bytes of a message become up to a hundred of memory, and what parses them holds the interpreter
until it is done. Counting does neither. The format: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from lora_runtime.errors import InvalidRequest
from loramux.server.fields import MAX_PARTS, MAX_TEXTS, MAX_VALUES

_LONGEST_VARINT = 10
_CONTINUED = bytes(range(0x80, 0x100))
"""The bytes after which a varint goes on."""
_FIXED_SIZES = {
    **dict.fromkeys(
        (FieldDescriptor.TYPE_FIXED32, FieldDescriptor.TYPE_SFIXED32, FieldDescriptor.TYPE_FLOAT), 4
    ),
    **dict.fromkeys(
        (FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64, FieldDescriptor.TYPE_DOUBLE),
        8,
    ),
}


def check_size(data: bytes, kind: Descriptor) -> None:
    """Raise InvalidRequest for a message of more values, texts or messages within it than a request
    has. What is no message of that kind is left to its parser. The time is proportional to the
    bytes, and other threads run meanwhile.
    """
    try:
        _Counts().add(data, 0, len(data), kind)
    except _NoMessage:
        return


class _NoMessage(Exception):
    """A parser would refuse it."""


@dataclass(slots=True)
class _Counts:
    num_values: int = 0
    num_texts: int = 0
    num_parts: int = 0

    def add(self, data: bytes, begun: int, end: int, kind: Descriptor) -> None:
        """Count the fields of one message, `data` from `begun` to `end`, and those within them."""
        while begun < end:
            tag, begun = _varint(data, begun)
            field = kind.fields_by_number.get(tag >> 3)
            self.num_values += 1
            self._check()
            match tag & 7:
                case 0:
                    _, begun = _varint(data, begun)
                case 1:
                    begun += 8
                case 2:
                    size, begun = _varint(data, begun)
                    stop = min(begun + size, end)
                    self._add_bytes(data, begun, stop, field)
                    begun = stop
                case 5:
                    begun += 4
                case 6 | 7:
                    raise _NoMessage  # there is no such type

    def _add_bytes(self, data: bytes, begun: int, end: int, field: FieldDescriptor | None) -> None:
        if field is None:
            return
        if field.message_type is not None:
            self.num_parts += 1
            self.add(data, begun, end, field.message_type)
        elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            self.num_texts += 1
        elif size := _FIXED_SIZES.get(field.type):
            self.num_values += (end - begun) // size
        else:
            self.num_values += len(data[begun:end].translate(None, _CONTINUED))
        self._check()

    def _check(self) -> None:
        if self.num_values > MAX_VALUES:
            _refuse(MAX_VALUES, "values")
        if self.num_texts > MAX_TEXTS:
            _refuse(MAX_TEXTS, "texts")
        if self.num_parts > MAX_PARTS:
            _refuse(MAX_PARTS, "messages")


def _refuse(most: int, what: str) -> NoReturn:
    raise InvalidRequest(f"the request holds more than {most} {what}; send less at once")


def _varint(data: bytes, begun: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for index, byte in enumerate(data[begun : begun + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, begun + index + 1
    raise _NoMessage
