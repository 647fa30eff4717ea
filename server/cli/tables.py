"""Tables that lose nothing: what is too wide for a terminal is shown a line per value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from lora_runtime.terminal import Terminal, has_room, write

_LONG = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    console: Console | None = None,
) -> None:
    """Print rows under their columns; where that does not fit a terminal's width, each row as a
    list of column and value. A file or pipe has any width.
    """
    console, rows = console or Terminal(markup=False), list(rows)
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    if not has_room(console, table) and len(columns) > 2:
        for row in rows:
            show_facts(zip(columns[1:], row[1:], strict=True), title=row[0], console=console)
        return
    _unbroken(table)
    console.print(table)


def show_facts(
    facts: Iterable[tuple[str, str]], *, title: str, console: Console | None = None
) -> None:
    """Print names and values."""
    console = console or Terminal(markup=False)
    table = Table("field", "value", title=title)
    for name, value in facts:
        table.add_row(name, value)
    _unbroken(table)
    console.print(table)


def show_json(messages: Message | Iterable[Message]) -> None:
    """Print one message as a JSON object, or several as a list, with the fields' own names."""
    if isinstance(messages, Message):
        value: object = _plain(messages)
    else:
        value = [_plain(message) for message in messages]
    write(json.dumps(value, indent=2) + "\n")


def _plain(message: Message) -> object:
    found = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _with_numbers(found, message)


def _with_numbers(found: dict[str, Any], message: Message) -> dict[str, Any]:
    """Protobuf's JSON has 64-bit numbers as texts, for languages without such numbers."""
    for field in message.DESCRIPTOR.fields:
        value = found.get(field.name)
        if isinstance(value, str) and field.cpp_type in _LONG:
            found[field.name] = int(value)
        elif isinstance(value, list) and field.message_type is not None:
            each = zip(value, getattr(message, field.name), strict=True)
            found[field.name] = [_with_numbers(part, of) for part, of in each]
    return found


def _unbroken(table: Table) -> None:
    """A long word goes on in the next line; rich would cut it."""
    for column in table.columns:
        column.overflow = "fold"
