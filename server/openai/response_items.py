"""The output of a response: items of what is thought, said and called, one after the other, and the
events of a stream by which each of them comes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_runtime.text.tool_calls import ToolCallDelta
from loramux.server.calls import Delta

Told = tuple[str, dict[str, Any]]
"""An event: what follows `response.` in its type, and its values."""


@dataclass(slots=True)
class Item(ABC):
    """One item. `text` is what it consists of, so far as it has come."""

    prefix: ClassVar[str]
    """What its id begins with."""
    id: str
    index: int
    status: str = "in_progress"
    text: str = ""

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The item as it is now."""

    @abstractmethod
    def begun(self) -> Iterator[Told]:
        """Events before the first text."""

    @abstractmethod
    def more(self, text: str) -> Told:
        """The event of more text."""

    @abstractmethod
    def ended(self) -> Iterator[Told]:
        """Events after the last text."""

    @property
    def place(self) -> dict[str, Any]:
        """Where its events say that they belong."""
        return {"item_id": self.id, "output_index": self.index}


class _Parted(Item):
    """An item whose text is its one part."""

    item_type: ClassVar[str]
    besides: ClassVar[dict[str, Any]]
    """What the item has beside its part."""
    part_type: ClassVar[str]
    none_of: ClassVar[dict[str, Any]]
    """What a part has besides, empty."""

    def body(self) -> dict[str, Any]:
        content = [] if self.status == "in_progress" else [self.part()]
        return {
            "type": self.item_type,
            "id": self.id,
            "status": self.status,
            **self.besides,
            "content": content,
        }

    def part(self) -> dict[str, Any]:
        return {"type": self.part_type, "text": self.text, **self.none_of}

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}

    def begun(self) -> Iterator[Told]:
        yield "content_part.added", {**self.place, "part": self.part()}

    def more(self, text: str) -> Told:
        return f"{self.part_type}.delta", {**self.place, "delta": text, **self._logprobs}

    def ended(self) -> Iterator[Told]:
        yield f"{self.part_type}.done", {**self.place, "text": self.text, **self._logprobs}
        yield "content_part.done", {**self.place, "part": self.part()}

    @property
    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if "logprobs" in self.none_of else {}


class MessageItem(_Parted):
    """What is said."""

    prefix = "msg"
    item_type = "message"
    besides: ClassVar[dict[str, Any]] = {"role": "assistant"}
    part_type = "output_text"
    none_of: ClassVar[dict[str, Any]] = {"annotations": [], "logprobs": []}


class ReasoningItem(_Parted):
    """What is thought before."""

    prefix = "rs"
    item_type = "reasoning"
    besides: ClassVar[dict[str, Any]] = {"summary": []}
    part_type = "reasoning_text"
    none_of: ClassVar[dict[str, Any]] = {}


@dataclass(slots=True)
class CallItem(Item):
    """A call of a function; its text is that of the arguments."""

    prefix = "fc"
    call_id: str = ""
    name: str = ""

    def body(self) -> dict[str, Any]:
        return {
            "type": "function_call",
            "id": self.id,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.text,
            "status": self.status,
        }

    def begun(self) -> Iterator[Told]:
        return iter(())

    def more(self, text: str) -> Told:
        return "function_call_arguments.delta", {**self.place, "delta": text}

    def ended(self) -> Iterator[Told]:
        values = {"name": self.name, "arguments": self.text}
        yield "function_call_arguments.done", {**self.place, **values}


class Output:
    """The items of one response. Each method gives the events of what it adds."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._items: list[Item] = []

    def bodies(self) -> list[dict[str, Any]]:
        """Every item as it is now."""
        return [item.body() for item in self._items]

    def take(self, delta: Delta) -> Iterator[Told]:
        """Add more of the output."""
        if delta.reasoning:
            yield from self._text(ReasoningItem, delta.reasoning)
        if delta.text:
            yield from self._text(MessageItem, delta.text)
        for call in delta.tool_calls:
            yield from self._call(call)

    def finish(self, status: str, *, is_called: bool) -> Iterator[Told]:
        """Close the last item; without any, the output is an empty message. `is_called`: its calls
        are whole.
        """
        if not self._items:
            yield from self._open(MessageItem)
        is_broken = isinstance(self._items[-1], CallItem) and not is_called
        yield from self._close("incomplete" if is_broken else status)

    def _text(self, kind: type[MessageItem | ReasoningItem], text: str) -> Iterator[Told]:
        if not self._items or type(self._items[-1]) is not kind:
            yield from self._open(kind)
        yield self._more(text)

    def _call(self, call: ToolCallDelta) -> Iterator[Told]:
        if call.name:
            yield from self._open(CallItem, call_id=call.id, name=call.name)
        if call.arguments:
            yield self._more(call.arguments)

    def _open(self, kind: type[Item], **values: str) -> Iterator[Told]:
        if self._items:
            yield from self._close("completed")
        index = len(self._items)
        item = kind(f"{kind.prefix}_{self._request_id}_{index}", index, **values)
        self._items.append(item)
        yield "output_item.added", {"output_index": index, "item": item.body()}
        yield from item.begun()

    def _more(self, text: str) -> Told:
        self._items[-1].text += text
        return self._items[-1].more(text)

    def _close(self, status: str) -> Iterator[Told]:
        item = self._items[-1]
        item.status = status
        yield from item.ended()
        yield "output_item.done", {"output_index": item.index, "item": item.body()}
