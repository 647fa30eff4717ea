"""The one form every adapter is reduced to before the engine sees it.

Per target module y = g ∘ (W x) + B'(A x) + b, with every scaling folded into B'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class ModuleKey(NamedTuple):
    """A base linear, and which visit to it by the adapter's layer map (0 without a map)."""

    path: str
    replica: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleForm:
    """a (r, in) and b (out, r), or both None; gain (out,) float32 or None; bias (out,) or None."""

    a: Tensor | None = None
    b: Tensor | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        parts = (self.a, self.b, self.gain, self.bias)
        return tuple(part for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingForm:
    """A whole adapter, on the host. `digest` is the SHA-256 of its honoured fields and tensors."""

    digest: str
    variant: str
    """`lora`, `rslora`, …: shown to people, never branched on."""
    modules: Mapping[ModuleKey, ModuleForm]
    honoured: Mapping[str, object]
    """Fields of adapter_config.json that changed the result, and their values."""
    inert: Mapping[str, str]
    """Fields present that do not matter at serving, each with its reason."""
    layer_map: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for module in self.modules.values() for t in module.tensors)

    @property
    def num_parameters(self) -> int:
        return sum(t.numel() for module in self.modules.values() for t in module.tensors)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({module.rank for module in self.modules.values()}))
