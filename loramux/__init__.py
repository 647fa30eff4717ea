"""loramux for Python: `from loramux import LLM, Client, AsyncClient, train, errors`.

Each name is imported when it is first used: a client needs no torch, and `train` no gRPC. `errors`
are all that they raise on purpose, `errors.LoramuxError` among them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_runtime import errors
    from lora_runtime.engine.llm import LLM, Completion, ToolCall
    from lora_runtime.training.call import train
    from loramux.server.client import AsyncClient, Client, tls_credentials

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "Completion",
    "ToolCall",
    "errors",
    "tls_credentials",
    "train",
]

_MODULES = {
    "LLM": "lora_runtime.engine.llm",
    "Completion": "lora_runtime.engine.llm",
    "ToolCall": "lora_runtime.engine.llm",
    "Client": "loramux.server.client",
    "AsyncClient": "loramux.server.client",
    "tls_credentials": "loramux.server.client",
    "train": "lora_runtime.training.call",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("loramux")
    if name == "errors":
        return import_module("lora_runtime.errors")
    if name not in _MODULES:
        raise AttributeError(f"module 'loramux' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
