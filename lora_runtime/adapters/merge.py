"""A serving form added to the dense weights of the very base that serves it.

W' = diag(g) · W + B'A, computed in float32 where W is the dequantised serving weight; replaced
vocabulary rows add (row − W_row), a replaced bias takes the base's place. The embedding is a
linear layer of one-hot tokens: its W is the transposed table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_runtime.adapters.config.values import refused
from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey, ServingForm
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused

_refused = partial(refused, verdict=" cannot be merged")


@dataclass(frozen=True, slots=True)
class TensorLoss:
    """What rounding to the written dtype took from one tensor: Frobenius norms of the change that
    was wanted and of the error, both float64.
    """

    name: str
    change: float
    error: float

    @property
    def ratio(self) -> float:
        """‖error‖ / ‖change‖; infinite where a tensor without change was rounded."""
        if self.change:
            return self.error / self.change
        return math.inf if self.error else 0.0


class Merge:
    """One pass over a base's tensors. `losses` is complete when the pass is over."""

    def __init__(self, form: ServingForm, base: BaseSpec, dtype: torch.dtype) -> None:
        """`dtype`: of the result. Raises AdapterRefused naming the field that no weight can say."""
        _refuse_inexpressible(form, base)
        self.losses: list[TensorLoss] = []
        self._modules = {key.path: module for key, module in form.modules.items()}
        self._base = base
        self._dtype = dtype

    def merged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of `dense_tensors` with the adapter in it, in the result's dtype.

        A head that stays tied to the embedding is left out. Raises AdapterRefused (field: the
        tensor's name) for a bias on a module without one, and for values the dtype cannot hold.
        """
        wanted = self._wanted_biases()
        for name, tensor in tensors:
            wanted.discard(name)
            if not (self._is_tied and name == f"{self._base.head}.weight"):
                yield name, self._one(name, tensor)
        if wanted:
            name = min(wanted)
            raise AdapterRefused(
                f"the adapter gives {name.removesuffix('.bias')} a bias, which this architecture "
                "has no place for; serve it unmerged",
                field=name,
            )

    @property
    def overall(self) -> float:
        """‖error‖ / ‖change‖ over all changed tensors together."""
        change = math.hypot(*(loss.change for loss in self.losses))
        error = math.hypot(*(loss.error for loss in self.losses))
        return TensorLoss("", change, error).ratio

    @property
    def worst(self) -> TensorLoss:
        """The changed tensor that lost the largest share."""
        return max(self.losses, key=lambda loss: loss.ratio)

    @property
    def _is_tied(self) -> bool:
        """True where both tables are still one: neither of them is changed."""
        changed = {self._base.embedding, self._base.head} & self._modules.keys()
        return self._base.is_tied and not changed

    def _wanted_biases(self) -> set[str]:
        """Names of the biases that must find their place."""
        return {f"{path}.bias" for path, m in self._modules.items() if m.bias is not None}

    def _one(self, name: str, tensor: Tensor) -> Tensor:
        path, _, part = name.rpartition(".")
        module = self._modules.get(path)
        if module is None:
            return _rounded(name, tensor, self._dtype)
        if part == "bias":
            exact = tensor if module.bias is None else module.bias
        else:
            exact = merged_weight(tensor, module, is_table=path == self._base.embedding)
        rounded = _rounded(name, exact, self._dtype)
        self.losses.append(_loss(name, tensor, exact, rounded))
        return rounded


def merged_weight(weight: Tensor, module: ModuleForm, *, is_table: bool = False) -> Tensor:
    """W' (out, in) float32 of one module; `is_table`: W is the embedding's table (vocab, hidden).

    Sums in float64, and rounds once.
    """
    w = weight.cpu()
    exact = w.double()
    if module.gain is not None:
        gain = module.gain.double()
        exact = exact * (gain if is_table else gain[:, None])
    if module.a is not None and module.b is not None:
        change = module.b.double() @ module.a.double()
        exact += change.T if is_table else change
    if module.patch is not None:
        ids = slice(None) if module.patch.ids is None else module.patch.ids.long()
        # Added, not assigned: on these rows the low-rank change acts beside the replaced row.
        exact[ids] += module.patch.values.double() - w[ids].double()
    return exact.float()


def _refuse_inexpressible(form: ServingForm, base: BaseSpec) -> None:
    if form.facts.layer_map is not None:
        raise _refused(
            "layer_replication", "the visits of one layer have a change each, and one weight"
        )
    if form.adapts_experts(base):
        raise _refused("target_parameters", "experts are served unmerged")
    if form.facts.invocation_tokens:
        raise _refused(
            "alora_invocation_tokens", "it acts from those tokens on, a weight on every token"
        )
    if any(key != ModuleKey(key.path) for key in form.modules):
        raise _refused("layer_replication", "a change of one visit only is no change of a weight")


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    if not torch.isfinite(rounded).all():
        raise AdapterRefused(
            f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold; choose "
            "bfloat16 or float32",
            field=name,
        )
    return rounded


def _loss(name: str, before: Tensor, exact: Tensor, rounded: Tensor) -> TensorLoss:
    change = torch.linalg.vector_norm(exact.cpu() - before.cpu(), dtype=torch.float64)
    error = torch.linalg.vector_norm(rounded.cpu().float() - exact.cpu(), dtype=torch.float64)
    return TensorLoss(name, float(change), float(error))
