"""The one form every adapter is reduced to before the engine sees it.

Per target module y = g ∘ (W x) + B'(A x) + b, with every scaling folded into B'; the embedding is
a linear layer of one-hot tokens, and it and the output layer may have whole rows replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.core import BaseSpec


class ModuleKey(NamedTuple):
    """A module of the base, and which visit to it by the adapter's layer map (0 without a map)."""

    path: str
    replica: int = 0


@dataclass(frozen=True, slots=True)
class RowPatch:
    """Vocabulary rows of the embedding's or head's weight, replaced.

    values (n, hidden); ids (n,) int32 ascending, or None when all rows are replaced in order.
    """

    values: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleForm:
    """a (r, in) and b (out, r), or both None; gain (out,) float32 or None; bias (out,) or None.

    `patch`: for the embedding and the head only. Of a mixture of E experts a (E · r, in), the
    columns of b (out, E · r), and gain (E · out,) are E blocks of one size, expert after expert.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None
    patch: RowPatch | None = None
    num_experts: int = 1

    @property
    def rank(self) -> int:
        """Of a mixture the rank at each expert."""
        return 0 if self.a is None else self.a.shape[0] // self.num_experts

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        patch = (self.patch.values, self.patch.ids) if self.patch else ()
        parts = (self.a, self.b, self.gain, self.bias, *patch)
        return tuple(part for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingForm:
    """A whole adapter, on the host."""

    facts: AdapterFacts
    modules: Mapping[ModuleKey, ModuleForm]
    text_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Files of its tokenizer, template and end tokens, where they are not the base's."""

    @property
    def digest(self) -> str:
        return self.facts.digest

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Last path components of the modules it touches, sorted."""
        return tuple(sorted({key.path.rpartition(".")[2] for key in self.modules}))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor once, though modules may share some."""
        every = {id(t): t for module in self.modules.values() for t in module.tensors}
        return tuple(every.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def num_parameters(self) -> int:
        return sum(t.numel() for t in self.tensors if t.is_floating_point())

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({module.rank for module in self.modules.values()} - {0}))

    def adapts_experts(self, base: BaseSpec) -> bool:
        """True when a module of it is a mixture's, be it of one expert."""
        return any(base.shapes[key.path].experts is not None for key in self.modules)

    @property
    def has_whole_patch(self) -> bool:
        """True when it replaces all rows of the embedding or the head."""
        patches = (module.patch for module in self.modules.values())
        return any(patch is not None and patch.ids is None for patch in patches)
