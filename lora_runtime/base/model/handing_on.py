"""Layers that take the forward's keyword arguments and do not hand them to their attention.

Such a layer's class becomes a subclass that leaves the step's `Attention` at the modules that
attend, where the attention function finds it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

from torch import nn

HANDED = "handed_attention"
"""Attribute of a module that attends: the `Attention` of the forward that runs."""


class _HandsOn(nn.Module):
    attends_in: tuple[str, ...]
    """Paths, within the layer, of the modules that attend."""

    def forward(self, *args: Any, attention: object, **kwargs: Any) -> Any:
        for path in self.attends_in:
            setattr(self.get_submodule(path), HANDED, attention)
        return super().forward(*args, **kwargs)


def hand_on_attention(layers: nn.ModuleList, attending: Collection[nn.Module]) -> None:
    """Let `layers` give the modules `attending`, which are inside of them, the keyword argument
    `attention` that they themselves are given, in place.
    """
    layer: Any
    for layer in layers:
        paths = [path for path, module in layer.named_modules() if module in attending]
        if paths:
            kind: Any = type(layer)
            layer.__class__ = _handing_on(kind)
            layer.attends_in = tuple(paths)


@cache
def _handing_on(original: type[Any]) -> type[Any]:
    return type(f"HandingOn{original.__name__}", (_HandsOn, original), {})
