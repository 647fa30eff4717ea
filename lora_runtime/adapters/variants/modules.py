"""One adapted module: scale → what was taken out of the base → gain → bias.

Source: rsLoRA arXiv:2312.03732; peft 0.21.2, `lora/layer.py`, `lora/dora.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_runtime.adapters.config.expert_sites import is_mixture
from lora_runtime.adapters.config.layer_sites import Site
from lora_runtime.adapters.config.peft_config import AdapterSpec, TargetSpec
from lora_runtime.adapters.config.values import shown
from lora_runtime.adapters.files.tensor_names import Part
from lora_runtime.adapters.files.tensors import AdapterTensors
from lora_runtime.adapters.serving_form import ModuleForm
from lora_runtime.adapters.variants.dora import dora_gain
from lora_runtime.adapters.variants.experts import site_shape, take_of_all_experts
from lora_runtime.adapters.variants.mutated_base import (
    Factors,
    difference,
    rebalanced,
    recovered_initial,
)
from lora_runtime.base.model.finite import is_finite
from lora_runtime.base.weights import BaseWeights
from lora_runtime.core import BaseSpec, LinearShape
from lora_runtime.errors import AdapterRefused, BaseMismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RawModule:
    """The tensors of one adapted module as the file has them, of checked shape."""

    site: Site
    target: TargetSpec
    factors: Factors
    """Unscaled, float32."""
    magnitude: Tensor | None
    lora_bias: Tensor | None


def collect(spec: AdapterSpec, base: BaseSpec, tensors: AdapterTensors) -> list[RawModule]:
    """Take what the config asks for of every target. Raises AdapterRefused."""
    modules = []
    for site, target in spec.targets.items():
        _check_rank(site, target, base, tensors)
        size = (site_shape(site, base).out_features,)
        modules.append(
            RawModule(
                site=site,
                target=target,
                factors=_take_factors(site, target, spec, base, tensors),
                magnitude=tensors.take(site.module, Part.MAGNITUDE, size)
                if spec.use_dora
                else None,
                lora_bias=tensors.take(site.module, Part.B_BIAS, size) if spec.lora_bias else None,
            )
        )
    return modules


def take_factors(
    site: Site, rank: int, shape: LinearShape, base: BaseSpec, tensors: AdapterTensors
) -> Factors:
    """A (r, in) and B (out, r) of one module, in float32."""
    is_embedding = site.path == base.embedding
    a_part, b_part = (Part.EMBEDDING_A, Part.EMBEDDING_B) if is_embedding else (Part.A, Part.B)
    a = tensors.take(site.module, a_part, (rank, shape.in_features))
    b = tensors.take(site.module, b_part, (shape.out_features, rank))
    return Factors(a.float(), b.float())


def _check_rank(site: Site, target: TargetSpec, base: BaseSpec, tensors: AdapterTensors) -> None:
    """Refuse, by the config's entry, a rank that is not the one on which A and B agree, and experts
    of another number. Where A and B do not agree, the tensors are at fault.
    """
    is_embedding = site.path == base.embedding
    a_part, b_part = (Part.EMBEDDING_A, Part.EMBEDDING_B) if is_embedding else (Part.A, Part.B)
    a, b = tensors.shape(site.module, a_part), tensors.shape(site.module, b_part)
    if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        return
    num_experts = base.shapes[site.path].num_experts if is_mixture(site, base) else 1
    rank, rest = divmod(a[0], num_experts)
    if rank == target.rank and not rest:
        return
    field, entry = "r", f"r is {target.rank}"
    change = f"set it to {rank}, or name the module in rank_pattern with {rank}"
    if target.rank_pattern is not None:
        field, change = "rank_pattern", f"set it to {rank}"
        entry = f"rank_pattern gives {shown(target.rank_pattern)} the rank {target.rank}"
    if num_experts > 1 and a[0] % target.rank == 0:
        # Layers are checked before: if there are any of this rank, they have it.
        raise BaseMismatch(
            f"{entry}, and {a_part} of {site.name} has {a[0]} rows: {a[0] // target.rank} experts "
            f"of that rank, and this base, {base.name}, has {num_experts}. Serve the adapter on "
            f"the base that it was trained on; if that has {num_experts} experts, {field} was "
            "changed since",
            field="target_parameters",
        )
    if rest:
        return
    of_experts = f" ({num_experts} experts of {rank} rows each)" if num_experts > 1 else ""
    raise AdapterRefused(
        f"{entry}, and the tensors of {site.name} have rank {rank}: {a_part} is {a}{of_experts}; "
        f"{change}",
        field=field,
    )


def _take_factors(
    site: Site, target: TargetSpec, spec: AdapterSpec, base: BaseSpec, tensors: AdapterTensors
) -> Factors:
    """A and B of a target; a tied output layer has those of the embedding, transposed."""
    shape = site_shape(site, base)
    if is_mixture(site, base):
        return take_of_all_experts(site, target.rank, shape, tensors, spec.peft_version)
    if not (spec.ties_head and site.path == base.head):
        return take_factors(site, target.rank, shape, base, tensors)
    embedding = next(s for s in spec.targets if s.path == base.embedding)
    own = take_factors(
        embedding, spec.targets[embedding].rank, base.shapes[base.embedding], base, tensors
    )
    tied = Factors(own.b.T.contiguous(), own.a.T.contiguous())
    for part, tensor in ((Part.A, tied.a), (Part.B, tied.b)):
        copy = tensors.take_if_there(site.module, part, tuple(tensor.shape))
        if copy is not None and not torch.equal(copy.float(), tensor):
            raise AdapterRefused(
                f"tensor base_model.model.{site.module}.{part} differs from the embedding's, to "
                "which ensure_weight_tying ties it",
                field=f"base_model.model.{site.module}.{part}",
            )
    return tied


@dataclass(frozen=True, slots=True)
class Reduced:
    """A module's form, and the relative error of a recomputed start (0 where there was none)."""

    form: ModuleForm
    error: float


def reduce_module(
    raw: RawModule,
    initialisation: str,
    base: BaseSpec,
    weights: BaseWeights,
    initial: AdapterTensors | None,
    trained_bias: Tensor | None,
    *,
    cancels: bool,
) -> Reduced:
    """Fold everything into the serving form, in float32. Raises AdapterRefused.

    `initialisation` names what was taken out of this module's base weight, or is empty;
    `initial` has it where the files do. `cancels`: see `cancelling`, of its factors.
    """
    path, scaling = raw.site.path, raw.target.scaling
    delta = Factors(raw.factors.a, raw.factors.b * scaling)
    error = 0.0
    if initialisation:
        _check_finite(raw.site, delta.b)
        delta, error = _subtract_initial(delta, raw, initialisation, base, weights, initial)
    elif cancels:
        delta = rebalanced(delta)
    gain = None
    if raw.magnitude is not None:
        gain = dora_gain(weights, path, delta, raw.magnitude, raw.site.expert)
        delta = Factors(delta.a, gain[:, None] * delta.b)
    bias = trained_bias
    if raw.lora_bias is not None:
        own = None if raw.site.expert else weights.bias(path)
        bias = _with_lora_bias(trained_bias, raw.lora_bias.float() * scaling, own)
    _check_finite(raw.site, delta.b, gain, bias)
    num_experts = base.shapes[path].num_experts if is_mixture(raw.site, base) else 1
    form = ModuleForm(a=delta.a, b=delta.b, gain=gain, bias=bias, num_experts=num_experts)
    return Reduced(form, error)


def _subtract_initial(
    trained: Factors,
    raw: RawModule,
    initialisation: str,
    base: BaseSpec,
    weights: BaseWeights,
    initial: AdapterTensors | None,
) -> tuple[Factors, float]:
    """The change less what the init took out of the base, and the relative error of the result."""
    site, target = raw.site, raw.target
    if initial is not None:
        start = take_factors(site, target.rank, base.shapes[site.path], base, initial)
        return difference(trained, Factors(start.a, start.b * target.scaling)), 0.0
    weight = weights.original(site.path)
    found = recovered_initial(initialisation, weight, target.rank, target.scaling)
    delta = difference(trained, found.factors)
    # The error is relative to ‖W‖ and becomes one to ‖ΔW‖: ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ).
    squared_norm = float((delta.b.T @ delta.b * (delta.a @ delta.a.T)).sum())
    return delta, found.error * float(weight.float().norm()) / max(squared_norm, 1e-30) ** 0.5


def _with_lora_bias(trained: Tensor | None, extra: Tensor, own: Tensor | None) -> Tensor:
    bias = own if trained is None else trained
    return extra if bias is None else bias + extra


def _check_finite(site: Site, *tensors: Tensor | None) -> None:
    """A is finite in the file, and stays so; what was scaled or divided may not be."""
    for tensor in tensors:
        if tensor is not None and not is_finite(tensor):
            raise AdapterRefused(
                f"the adapter of {site.name} overflows float32 when it is scaled and combined with "
                "the base",
                field=f"base_model.model.{site.module}.{Part.B}",
            )
