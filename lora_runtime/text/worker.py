"""The process that runs foreign text: chat templates and tokenizers that adapters bring.

Started by `text_workers.py`, which sends one JSON object a frame and kills what takes too long.
Its limits are in `worker_frames.py`. Renders as transformers does, in jinja2's sandbox.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # transformers imports torch where it finds it: a second and 180 MB that no tokenizer needs
    sys.modules["torch"] = None  # type: ignore[assignment]

from tokenizers import Tokenizer as Backend
from transformers.utils.chat_template_utils import render_jinja_template

from lora_runtime.errors import AdapterRefused, InvalidRequest
from lora_runtime.text.heard_messages import check_heard
from lora_runtime.text.worker_frames import answer_frames, limit_process

MAX_SIDES = 32
"""Text sides that a process keeps ready; the oldest goes, and is sent again when it is wanted."""
MAX_RENDERED = 8 << 20
"""Characters of a rendered conversation."""
CPU_S = 3
"""Processor time of one piece of work on a request."""
LOADING_CPU_S = 30
"""Processor time of reading one adapter's text files."""
MEMORY_BYTES = 1 << 29
"""Bytes that the process may take beyond those it has when it starts."""
LOADING_MEMORY_BYTES = 3 << 30
MAX_WRITTEN_BYTES = 1 << 28


class Opened(NamedTuple):
    """A text side that is ready."""

    template: str | None
    variables: Mapping[str, Any]
    tokenizer: Backend | None


class Worker:
    """Answers one frame after the other."""

    def __init__(self) -> None:
        self._sides: OrderedDict[str, Opened] = OrderedDict()
        self._handlers: dict[str, Callable[[Any], dict[str, Any]]] = {
            "open": self._open,
            "render": self._render,
            "encode": self._encode,
            "read": _read,
        }

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Give what a request asks for, or `refused`: what it says to its sender."""
        try:
            return self._handlers[request["op"]](request)
        except AdapterRefused as error:
            return {"refused": error.message, "field": error.field}
        except InvalidRequest as error:
            return {"refused": error.message}
        except MemoryError:
            return {"refused": "more memory than a template may take", "is_over": True}
        except UnicodeError:
            return {"refused": "the text that it writes is not valid Unicode"}
        except Exception as error:  # foreign code may raise anything
            return {"refused": str(error).encode(errors="replace").decode()[:2000]}

    def _open(self, request: Any) -> dict[str, Any]:
        text = request["tokenizer"]
        tokenizer = None if text is None else Backend.from_str(text)
        self._sides[request["key"]] = Opened(request["template"], request["variables"], tokenizer)
        while len(self._sides) > MAX_SIDES:
            self._sides.popitem(last=False)
        return {}

    def _render(self, request: Any) -> dict[str, Any]:
        side = self._sides.get(request["key"])
        if side is None:
            return {"is_unknown": True}
        self._sides.move_to_end(request["key"])

        def render(messages: list[dict[str, Any]]) -> str:
            rendered = render_jinja_template(
                conversations=[messages],
                tools=request["tools"] or None,
                chat_template=side.template,
                add_generation_prompt=True,
                **{**request["variables"], **side.variables},
            )
            return str(rendered[0][0])

        text = render(request["messages"])
        if len(text) > MAX_RENDERED:
            return {"refused": f"it writes {len(text)} characters; at most {MAX_RENDERED} are read"}
        text.encode()
        check_heard(request["messages"], render)
        if side.tokenizer is None:
            return {"text": text}
        return {"ids": side.tokenizer.encode(text, add_special_tokens=False).ids}

    def _encode(self, request: Any) -> dict[str, Any]:
        side = self._sides.get(request["key"])
        if side is None or side.tokenizer is None:
            return {"is_unknown": True}
        self._sides.move_to_end(request["key"])
        return {"ids": side.tokenizer.encode(request["text"]).ids}


def _read(request: Any) -> dict[str, Any]:
    from lora_runtime.text.own_text import read_text_side

    folder = Path(request["folder"])
    files = {path.name: path.read_bytes() for path in (folder / "own").iterdir()}
    side, notes = read_text_side(
        files, Path(request["base"]), request["vocab_size"], folder / "work"
    )
    return {"side": None if side is None else side.to_json(), "notes": notes}


def main(kind: str) -> None:
    """Answer until the sender goes away. `kind`: `loading` or `rendering`."""
    is_loading = kind == "loading"
    if is_loading:
        import lora_runtime.text.own_text  # noqa: F401  before the memory is limited
    extra = LOADING_MEMORY_BYTES if is_loading else MEMORY_BYTES
    limit_process(extra, MAX_WRITTEN_BYTES if is_loading else 0)
    answer_frames(Worker().answer, LOADING_CPU_S if is_loading else CPU_S)


if __name__ == "__main__":
    main(sys.argv[1])
