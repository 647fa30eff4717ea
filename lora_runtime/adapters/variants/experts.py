"""Adapters of a mixture's experts, as files have them → E blocks of one size, expert after expert.

Source: peft 0.21.2, `ParamWrapper`; 0.18, where A and B of weights (E, out, in) were swapped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_runtime.adapters.config.layer_sites import Site
from lora_runtime.adapters.files.file_names import MAX_TENSORS_BYTES
from lora_runtime.adapters.files.tensor_names import Part
from lora_runtime.adapters.files.tensors import AdapterTensors
from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey
from lora_runtime.adapters.variants.mutated_base import Factors
from lora_runtime.core import BaseSpec, LinearShape
from lora_runtime.errors import AdapterRefused

FIRST_UNSWAPPED, LAST_SWAPPED = (0, 19, 1), (0, 18, 9)
"""Versions of PEFT: from the first on A takes the inputs of every weight; up to the last it took
the second size of the parameter, which of weights (E, out, in) are the outputs."""

MAX_FILLING = 4
"""Times its own size that an adapter of each expert's own layers may grow, where it is large."""


def site_shape(site: Site, base: BaseSpec) -> LinearShape:
    """Sizes of the layer that the training had at a site."""
    shape = base.shapes[site.path]
    if site.expert is None:
        return shape
    return LinearShape(shape.in_features, len(site.expert.rows))


def take_of_all_experts(
    site: Site, rank: int, shape: LinearShape, tensors: AdapterTensors, peft_version: str
) -> Factors:
    """A (E · r, in) and B (out, E · r) of a mixture, both expert after expert, in float32.

    PEFT's A (E · r, in) is so too; of its B (out, r · E) the columns are those of all experts for
    the first of their r, then for the next. Raises AdapterRefused where sizes do not say which of
    the two is which, and the version of the writer does not either.
    """
    num_rows, sizes = shape.num_experts * rank, (shape.in_features, shape.out_features)
    is_swapped = _is_swapped(site, rank, shape, tensors, peft_version)
    inputs, outputs = sizes[::-1] if is_swapped else sizes
    first = tensors.take(site.module, Part.A, (num_rows, inputs)).float()
    second = tensors.take(site.module, Part.B, (outputs, num_rows)).float()
    second = second.view(outputs, rank, shape.num_experts).transpose(1, 2).flatten(1)
    if is_swapped:
        return Factors(second.T.contiguous(), first.T.contiguous())
    return Factors(first, second)


def _is_swapped(
    site: Site, rank: int, shape: LinearShape, tensors: AdapterTensors, peft_version: str
) -> bool:
    if shape.experts is None or shape.experts.is_transposed:
        return False
    if shape.in_features != shape.out_features:
        found = tensors.shape(site.module, Part.A)
        return found == (shape.num_experts * rank, shape.out_features)
    version = tuple(map(int, re.findall(r"\d+", peft_version)[:3]))
    if version >= FIRST_UNSWAPPED:
        return False
    if version and version <= LAST_SWAPPED:
        return True
    raise AdapterRefused(
        f"peft_version is {peft_version[:20]!r}: inputs and outputs of {site.name} have one size, "
        "so nothing else says which of the two factors takes the inputs, which changed in PEFT "
        "0.19.1; save the adapter again with that or a later version",
        field="peft_version",
    )


def joined_experts(
    layers: Mapping[Site, ModuleForm], base: BaseSpec
) -> dict[ModuleKey, ModuleForm]:
    """Each expert's own layers as the blocks of their mixtures.

    Layers that share an expert's outputs, gate and up, stand one below the other in its A and side
    by side in its B, which is zero for the outputs of the other; experts of less than the largest
    rank are filled up with zeros. Raises AdapterRefused for biases, and for more than any file has.
    """
    by_key: dict[ModuleKey, dict[Site, ModuleForm]] = {}
    for site, form in layers.items():
        if form.bias is not None:
            raise AdapterRefused(
                f"lora_bias: {site.name} is an expert's layer, and their biases are not served",
                field="lora_bias",
            )
        by_key.setdefault(ModuleKey(site.path, site.replica), {})[site] = form
    _check_size(by_key, base)
    return {key: _joined(forms, base.shapes[key.path]) for key, forms in by_key.items()}


def _check_size(by_key: Mapping[ModuleKey, Mapping[Site, ModuleForm]], base: BaseSpec) -> None:
    """Raise AdapterRefused where experts of the largest rank each would take more than any file,
    and far more than this one: one expert of a huge rank makes hundreds of such.
    """
    num_values = num_filled = 0
    for key, forms in by_key.items():
        shape = base.shapes[key.path]
        sizes = shape.in_features + shape.out_features
        num_filled += shape.num_experts * max(_ranks(forms, shape)) * sizes
        for form in forms.values():
            num_values += sum(part.numel() for part in (form.a, form.b) if part is not None)
    # Gate and up, one below the other, take less than twice their own values.
    if 4 * num_filled > max(MAX_TENSORS_BYTES, 4 * MAX_FILLING * num_values):
        ranks = {form.rank for forms in by_key.values() for form in forms.values()}
        field = "rank_pattern" if len(ranks) > 1 else "target_modules"
        raise AdapterRefused(
            f"{field}: all experts of a mixture are held with the largest rank among them, those "
            f"without an adapter too: {4 * num_filled} bytes here in float32, which is more than "
            f"{MAX_FILLING} times the adapter's own; adapt all of them, with ranks that are alike",
            field=field,
        )


def _ranks(forms: Mapping[Site, ModuleForm], shape: LinearShape) -> list[int]:
    """Of each expert: the sum over its layers, which stand one below the other."""
    ranks = [0] * shape.num_experts
    for site, form in forms.items():
        assert site.expert is not None
        ranks[site.expert.expert] += form.rank
    return ranks


def _joined(forms: Mapping[Site, ModuleForm], shape: LinearShape) -> ModuleForm:
    rank = max(_ranks(forms, shape))
    a = torch.zeros(shape.num_experts, rank, shape.in_features)
    b = torch.zeros(shape.out_features, shape.num_experts, rank)
    gain: Tensor | None = None
    used = [0] * shape.num_experts
    for site, form in forms.items():
        assert site.expert is not None and form.a is not None and form.b is not None
        expert, rows = site.expert.expert, site.expert.rows
        place = slice(used[expert], used[expert] + form.rank)
        used[expert] += form.rank
        a[expert, place] = form.a
        b[slice(rows.start, rows.stop, rows.step), expert, place] = form.b
        if form.gain is not None:
            gain = torch.ones(shape.num_experts, shape.out_features) if gain is None else gain
            gain[expert, slice(rows.start, rows.stop, rows.step)] = form.gain
    return ModuleForm(
        a=a.flatten(0, 1),
        b=b.flatten(1),
        gain=None if gain is None else gain.flatten(),
        num_experts=shape.num_experts,
    )
