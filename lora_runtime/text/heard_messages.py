"""Whether a chat template writes out every message it is given: some pass over roles they do not
know, in silence, and the answer heeds nothing of what such a message says. Plain Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_runtime.errors import InvalidRequest

MARK = re.compile(r"qzx([0-9]+)xzq", re.IGNORECASE)
"""Letters and digits alone, which no template escapes or trims."""


def check_heard(
    messages: Sequence[Mapping[str, Any]], render: Callable[[list[dict[str, Any]]], str]
) -> None:
    """Render the messages once more, with a mark before and behind each one's text, and look for
    the marks. Two of them, because templates may cut a text at one end, as they do with reasoning.

    Raises InvalidRequest (field `messages`) for the first message of which neither is written, and
    whatever `render` raises. A message without text has nothing to be heard.
    """
    marks = {
        index: f"qzx{index}xzq"
        for index, message in enumerate(messages)
        if isinstance(message.get("content"), str) and message["content"].strip()
    }
    marked = [
        {**message, "content": f"{marks[index]} {message['content']} {marks[index]}"}
        if index in marks
        else dict(message)
        for index, message in enumerate(messages)
    ]
    heard = set(map(int, MARK.findall(render(marked))))
    for index in marks:
        if index not in heard:
            raise InvalidRequest(
                f"messages[{index}] has the role {messages[index]['role']!r}, and the chat "
                "template leaves it out: the answer would heed nothing of it; give its text to a "
                "message that the template writes",
                field="messages",
            )
