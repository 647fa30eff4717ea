"""The formats that are known, and which of them a chat template writes."""

from __future__ import annotations

import re

from lora_runtime.text.tool_formats.hermes import HERMES
from lora_runtime.text.tool_formats.llama3_json import LLAMA3_JSON
from lora_runtime.text.tool_formats.mistral import ARGS, MISTRAL, MISTRAL_NAMED
from lora_runtime.text.tool_formats.qwen3_coder import QWEN3_CODER
from lora_runtime.text.tool_formats.tool_format import ToolFormat

FORMATS = {f.name: f for f in (HERMES, QWEN3_CODER, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED)}

_TAG = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_TOOLS = re.compile(r"\btools\b")


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template writes earlier calls in, or asks for; None: none known."""
    if MISTRAL.marker in template:
        return MISTRAL_NAMED if ARGS in template else MISTRAL
    if HERMES.marker in template:
        return QWEN3_CODER if "<function=" in template else HERMES
    if LLAMA3_JSON.marker in template or '"parameters": dictionary' in template:
        return LLAMA3_JSON
    return None


def shows_tools(template: str) -> bool:
    """Tell whether a chat template reads the variable `tools`."""
    return any(_TOOLS.search(tag) for tag in _TAG.findall(template))
