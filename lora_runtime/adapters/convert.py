"""A serving form → the files of a plain PEFT LoRA for the unmodified base, where that is exact.

Every scaling is 1: lora_alpha is the rank, per module where ranks differ. A bias change
b − b₀ becomes lora_bias, replaced vocabulary rows trainable_token_indices, a replaced embedding or
output layer modules_to_save. What a low-rank change cannot be is refused by name.
Source: peft 0.21.2, `LoraConfig`, `set_additional_trainable_modules`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lora_runtime.adapters.config.values import refused
from lora_runtime.adapters.files.file_names import FINGERPRINT_KEY, QUANTIZATION_KEY
from lora_runtime.adapters.files.peft_writer import PeftFiles, peft_files
from lora_runtime.adapters.files.tensor_names import Part
from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey, RowPatch, ServingForm
from lora_runtime.base.weights import BaseWeights
from lora_runtime.core import BaseSpec

_refused = partial(refused, verdict=" cannot be converted exactly")


def plain_files(
    form: ServingForm, base: BaseSpec, weights: BaseWeights, metadata: Mapping[str, str]
) -> PeftFiles:
    """Return the files of the same adapter, tensors in float32.

    `metadata`: the source's; the result is bound to a base's fingerprint only where the source is.

    Raises: AdapterRefused naming the field that no plain LoRA can express.
    """
    _refuse_inexpressible(form, base)
    adapted = _adapted(form, base, weights)
    if not adapted:
        raise _refused("target_modules", "PEFT needs a module with A and B")
    ranks = {path: module.rank for path, module in adapted.items()}
    # The config says the commonest rank; the other modules are patterns.
    rank = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {re.escape(path): own for path, own in ranks.items() if own != rank}
    files = peft_files(
        rank=rank,
        alpha=rank,
        use_rslora=False,
        target_modules=_target_names(adapted, base),
        tensors={},
        base=base,
        rank_pattern=patterns,
        alpha_pattern=patterns,
        metadata={key: value for key, value in metadata.items() if key != "format"},
    )
    for path, module in adapted.items():
        _add_low_rank(files, path, module, base)
    if any(module.bias is not None for module in adapted.values()):
        files.config["lora_bias"] = True
    _add_patches(files, form, base, weights)
    if FINGERPRINT_KEY not in metadata:
        del files.metadata[FINGERPRINT_KEY], files.metadata[QUANTIZATION_KEY]
    return files


def _refuse_inexpressible(form: ServingForm, base: BaseSpec) -> None:
    if any(module.gain is not None for module in form.modules.values()):
        raise _refused("use_dora", "DoRA rescales whole rows of W, which no low-rank change does")
    if form.adapts_experts(base):
        raise _refused("target_parameters", "the file of an adapter of experts stays as it is")
    if form.facts.layer_map is not None:
        raise _refused("layer_replication", "a LoRA changes weights, not the order of the layers")
    if form.facts.invocation_tokens:
        raise _refused("alora_invocation_tokens", "a plain LoRA acts on every token")


def _adapted(form: ServingForm, base: BaseSpec, weights: BaseWeights) -> dict[str, ModuleForm]:
    """Path → A, B and the change of the bias. PEFT wants biases on all modules or on none, and A
    and B wherever there is one: what is missing is zero, of rank 1.
    """
    found = {
        key.path: ModuleForm(a=module.a, b=module.b, bias=_bias_change(key.path, module, weights))
        for key, module in form.modules.items()
        if not _is_whole(module.patch)
    }
    found = {p: m for p, m in found.items() if m.a is not None or m.bias is not None}
    if all(module.bias is None for module in found.values()):
        return found
    if base.embedding in found:
        raise _refused("bias", "PEFT has no lora_bias beside LoRA on the embedding")
    return {path: _with_zeros(path, module, base) for path, module in found.items()}


def _bias_change(path: str, module: ModuleForm, weights: BaseWeights) -> Tensor | None:
    own = weights.bias(path)
    if module.bias is None or own is None:
        return module.bias
    return module.bias.float() - own


def _with_zeros(path: str, module: ModuleForm, base: BaseSpec) -> ModuleForm:
    shape = base.shapes[path]
    a, b, bias = module.a, module.b, module.bias
    if a is None or b is None:
        a, b = torch.zeros(1, shape.in_features), torch.zeros(shape.out_features, 1)
    return ModuleForm(a=a, b=b, bias=torch.zeros(shape.out_features) if bias is None else bias)


def _target_names(adapted: Mapping[str, ModuleForm], base: BaseSpec) -> Sequence[str]:
    """Last names where they mean exactly the adapted modules, else whole paths."""
    names = {_last(path) for path in adapted}
    meant = {path for path in base.shapes if _last(path) in names}
    return sorted(names if meant == adapted.keys() else adapted)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _add_low_rank(files: PeftFiles, path: str, module: ModuleForm, base: BaseSpec) -> None:
    if module.a is not None and module.b is not None:
        files.add_factors(path, _plain(module.a), _plain(module.b), base)
    if module.bias is not None:
        files.add(path, Part.B_BIAS, _plain(module.bias))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _is_whole(patch: RowPatch | None) -> bool:
    return patch is not None and patch.ids is None


def _add_patches(files: PeftFiles, form: ServingForm, base: BaseSpec, weights: BaseWeights) -> None:
    """Add replaced rows: whole tables to modules_to_save, some rows to trainable_token_indices."""
    modules = {path: form.modules.get(ModuleKey(path)) for path in (base.embedding, base.head)}
    patched = {path: module for path, module in modules.items() if module and module.patch}
    for path, module in patched.items():
        if module.a is not None:
            raise _refused("modules_to_save", f"PEFT cannot adapt and replace {path} at once")
    whole = {path: module for path, module in patched.items() if _is_whole(module.patch)}
    for path, module in whole.items():
        files.config["modules_to_save"] = sorted(_last(name) for name in whole)
        _add_whole_module(files, path, module, weights)
    rows = {p: m.patch for p, m in patched.items() if p not in whole and m.patch is not None}
    tokens = _tokens(rows, base)
    if tokens:
        files.config["trainable_token_indices"] = {_last(path): ids for path, ids in tokens.items()}
    for path in tokens:
        files.add(path, Part.TOKENS, _plain(rows[path].values))


def _add_whole_module(
    files: PeftFiles, path: str, module: ModuleForm, weights: BaseWeights
) -> None:
    """Add the module's weight, a copy as it may be shared, and its bias, which PEFT wants too."""
    assert module.patch is not None
    files.add(path, Part.WEIGHT, module.patch.values.float().clone())
    bias = weights.bias(path) if module.bias is None else module.bias
    if bias is not None:
        files.add(path, Part.BIAS, _plain(bias))


def _tokens(rows: Mapping[str, RowPatch], base: BaseSpec) -> dict[str, list[int]]:
    """Module → token ids as PEFT is to be told. On a tied base it gives the output layer the rows
    of the embedding, unless it is told of other tokens.
    """
    ids = {path: patch.ids.tolist() for path, patch in rows.items() if patch.ids is not None}
    if not base.is_tied or base.embedding not in ids:
        return ids
    embedding, head = rows[base.embedding], rows.get(base.head)
    if head is not None and ids[base.head] != ids[base.embedding]:
        return ids
    if head is None or not torch.equal(head.values, embedding.values):
        raise _refused(
            "trainable_token_indices", "PEFT ties the output layer's rows to the embedding's"
        )
    return {base.embedding: ids[base.embedding]}
