"""Replaced rows of the embedding and the output layer.

Rows are rounded to the base's compute dtype, as PEFT does when it copies them into the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_runtime.adapters.config.peft_config import AdapterSpec
from lora_runtime.adapters.files.tensor_names import Part, TensorName
from lora_runtime.adapters.files.tensors import AdapterTensors
from lora_runtime.adapters.serving_form import RowPatch
from lora_runtime.base.weights import BaseWeights
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused

ROWS_COMPARED = 4096
"""Vocabulary rows compared with the base's at once."""


def row_patches(
    spec: AdapterSpec, base: BaseSpec, weights: BaseWeights, tensors: AdapterTensors
) -> dict[str, RowPatch]:
    """Module path → its replaced rows; tied modules share one patch.

    Raises AdapterRefused where the vocabulary has another size, a tensor is missing, or two
    tensors of one tied weight disagree.
    """
    names = {site.path: site.name for site in spec.sites}
    for path in (base.embedding, base.head):
        _check_size(TensorName(names[path], Part.WEIGHT), base, tensors)
    patches = _changed_base(spec, base, weights, tensors, names)
    for path in spec.vocabulary.replaced:
        rows = tensors.take(names[path], Part.WEIGHT, (base.vocab_size, base.hidden_size))
        patches[path] = RowPatch(rows.to(weights.dtype))
    for path, ids in spec.vocabulary.tokens.items():
        rows = tensors.take(names[path], Part.TOKENS, (len(ids), base.hidden_size))
        patches[path] = _sorted_patch(rows.to(weights.dtype), ids)
    for path, source in spec.vocabulary.tied_to.items():
        _take_tied(tensors, names[path], patches[source], base)
        patches[path] = patches[source]
    return patches


def _check_size(name: TensorName, base: BaseSpec, tensors: AdapterTensors) -> None:
    size = tensors.num_rows(name)
    if size is not None and size != base.vocab_size:
        raise AdapterRefused(
            f"the adapter's {name.module} has {size} rows and this base's vocabulary has "
            f"{base.vocab_size}: adapters that resize the vocabulary are not served",
            field=f"base_model.model.{name.module}.{name.part}",
        )


def _sorted_patch(rows: Tensor, ids: tuple[int, ...]) -> RowPatch:
    order = torch.tensor(ids, dtype=torch.int32)
    ascending = order.argsort()
    return RowPatch(rows[ascending].contiguous(), order[ascending])


def _take_tied(tensors: AdapterTensors, name: str, patch: RowPatch, base: BaseSpec) -> None:
    """Take a tied module's own copy of the rows, if the file has one; it must equal the patch."""
    copy = tensors.take_if_there(name, Part.WEIGHT, (base.vocab_size, base.hidden_size))
    if copy is not None and not torch.equal(copy.to(patch.values.dtype), patch.values):
        raise _disagreement(name)


def _changed_base(
    spec: AdapterSpec,
    base: BaseSpec,
    weights: BaseWeights,
    tensors: AdapterTensors,
    names: dict[str, str],
) -> dict[str, RowPatch]:
    """The rows in which a weight that the file holds beside the adapter differs from the base's.

    With a targeted embedding PEFT also saves the whole weight below it, and copies that into the
    base when it loads the adapter.
    """
    kept = {*spec.vocabulary.replaced, *spec.vocabulary.tied_to}
    found: dict[str, RowPatch | None] = {}
    for path in {base.embedding, base.head} - kept:
        rows = tensors.take_if_there(names[path], Part.WEIGHT, (base.vocab_size, base.hidden_size))
        if rows is not None:
            found[path] = _differing(rows, path, weights)
    if base.is_tied and found:
        found = _shared(found, {base.embedding, base.head} - kept, names)
    patches = {path: patch for path, patch in found.items() if patch is not None}
    if patches and (spec.vocabulary.tokens or spec.use_dora):
        raise AdapterRefused(
            f"tensor {names[min(patches)]}.weight changes the base below DoRA or trained tokens; "
            "remove it from the file if it was not meant",
            field=f"base_model.model.{names[min(patches)]}.weight",
        )
    return patches


def _differing(rows: Tensor, path: str, weights: BaseWeights) -> RowPatch | None:
    ids = []
    for start in range(0, len(rows), ROWS_COMPARED):
        part = slice(start, start + ROWS_COMPARED)
        ours = weights.vocabulary_rows(path, part)
        differs = (rows[part].to(weights.dtype) != ours).any(dim=1)
        ids.append(differs.nonzero().flatten() + start)
    found = torch.cat(ids)
    if not len(found):
        return None
    return RowPatch(rows[found].to(weights.dtype), found.int())


def _shared(
    found: dict[str, RowPatch | None], paths: set[str], names: dict[str, str]
) -> dict[str, RowPatch | None]:
    """Give both tied modules one patch; all copies in the file must agree on it."""
    first, *others = found.values()
    for other in others:
        if not _are_equal(first, other):
            raise _disagreement(names[min(found)])
    return dict.fromkeys(paths, first)


def _are_equal(one: RowPatch | None, other: RowPatch | None) -> bool:
    if one is None or other is None:
        return one is other
    assert one.ids is not None and other.ids is not None
    return torch.equal(one.ids, other.ids) and torch.equal(one.values, other.values)


def _disagreement(name: str) -> AdapterRefused:
    return AdapterRefused(
        f"the file holds two different weights for {name} and the module it is tied to",
        field=f"base_model.model.{name}.weight",
    )
