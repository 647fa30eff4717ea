"""Reduces an adapter's files to its serving form.

Knows PEFT's tensor names and the order of the steps; knows neither the device nor the pool.
Source: peft 0.21.2, `save_and_load.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_runtime.adapters.config.expert_sites import is_mixture, per_expert_names
from lora_runtime.adapters.config.fields import FIELDS
from lora_runtime.adapters.config.layer_sites import Site
from lora_runtime.adapters.config.matching import tails
from lora_runtime.adapters.config.peft_config import AdapterSpec, parse_config, passed_over
from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.adapters.files.companions import own_text_files, text_digest
from lora_runtime.adapters.files.file_names import (
    FINGERPRINT_KEY,
    MAX_TENSORS_BYTES,
    QUANTIZATION_KEY,
)
from lora_runtime.adapters.files.folder import AdapterFiles, FolderContent, read_folder
from lora_runtime.adapters.files.tensor_names import (
    Part,
    TensorName,
    left_out_part,
    trained_names,
)
from lora_runtime.adapters.files.tensors import AdapterTensors
from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey, ServingForm
from lora_runtime.adapters.variants.experts import joined_experts
from lora_runtime.adapters.variants.modules import RawModule, Reduced, collect, reduce_module
from lora_runtime.adapters.variants.mutated_base import cancelling
from lora_runtime.adapters.variants.vocabulary import row_patches
from lora_runtime.base.weights import BaseWeights
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused, BaseMismatch


def load_adapter(
    folder: Path, base: BaseSpec, weights: BaseWeights, *, max_bytes: int = MAX_TENSORS_BYTES
) -> ServingForm:
    """Read a folder written by PEFT or by our trainer and reduce it for one base.

    Raises: AdapterRefused and its kinds, naming the file, field or tensor.
    """
    return reduce_folder(read_folder(folder, max_bytes=max_bytes), base, weights)


def reduce_folder(content: FolderContent, base: BaseSpec, weights: BaseWeights) -> ServingForm:
    """Reduce what was read of a folder. Raises as `load_adapter`."""
    files = content.adapter
    _check_fingerprint(files.metadata, base)  # first: every other mismatch follows from it
    tensors = AdapterTensors(files.tensors)
    names = trained_names(tensors.names, base)
    try:
        experts = per_expert_names(name.module for name in tensors.names)
        left_out = _left_out(tensors, base)
        spec = parse_config(files.config, base, trained_names=names, experts=experts)
        spec = _without(spec, left_out)
        initial = _initial_adapter(content, spec)
        start = None if initial is None else AdapterTensors(initial.tensors)
        form = reduce_adapter(spec, tensors, base, weights, start)
    except AdapterRefused as error:
        raise _with_bases(error, files, base) from None
    hashes = [file.tensors_sha256 for file in (files, initial) if file is not None]
    text_files = own_text_files(content.text, weights.folder)
    facts = replace(
        form.facts,
        digest=_digest(spec.honoured, hashes),
        notes=(
            *_unverified_base(files, base),
            *_assumed_experts(spec, files, base),
            *_passed_parts(left_out),
            *form.facts.notes,
        ),
        tensors_sha256=files.tensors_sha256,
        text_sha256=text_digest(text_files),
    )
    return replace(form, facts=facts, text_files=text_files)


def reduce_adapter(
    spec: AdapterSpec,
    tensors: AdapterTensors,
    base: BaseSpec,
    weights: BaseWeights,
    initial: AdapterTensors | None = None,
) -> ServingForm:
    """Reduce each module on its own, then add replaced biases and vocabulary rows.

    Every tensor must belong to something that the config asks for. `initial`: the tensors of the
    adapter before training, where its init changed the base. Facts that only the files have, such
    as the digest, are left empty.

    Raises: AdapterRefused naming the tensor that is missing, unknown or of the wrong shape.
    """
    try:
        modules = collect(spec, base, tensors)
        biases = _trained_biases(spec, base, weights, tensors)
        patches = row_patches(spec, base, weights, tensors)
        tensors.refuse_rest()
    except AdapterRefused as error:
        raise _with_passed_over(error, spec, base) from None
    # Inits change linear layers alone, and of a targeted head PEFT saves the changed weight too: of
    # these modules nothing is to be subtracted.
    untouched = {base.embedding, *patches}
    cancel, reduced = _cancelling_sites(modules, base), {}
    for raw in modules:
        started = "" if raw.site.path in untouched else spec.initialisation
        bias = biases.get(_key(raw.site))
        reduced[raw.site] = reduce_module(
            raw, started, base, weights, initial, bias, cancels=raw.site in cancel
        )
    forms = {_key(site): one.form for site, one in reduced.items() if site.expert is None}
    forms |= joined_experts({s: one.form for s, one in reduced.items() if s.expert}, base)
    for key, bias in biases.items():
        forms.setdefault(key, ModuleForm(bias=bias))
    for path, patch in patches.items():
        key = ModuleKey(path)
        forms[key] = replace(forms.get(key, ModuleForm()), patch=patch)
    facts = AdapterFacts(
        variant=spec.variant,
        honoured=spec.honoured,
        inert=spec.inert,
        layer_map=spec.layer_map,
        invocation_tokens=spec.invocation_tokens,
        notes=(*passed_over(spec, base), *_subtracted(spec, reduced.values(), initial)),
    )
    return ServingForm(facts=facts, modules=forms)


def _cancelling_sites(modules: Iterable[RawModule], base: BaseSpec) -> set[Site]:
    """Where the factors cancel; of experts, which stay as they are, none."""
    plain = [raw for raw in modules if not is_mixture(raw.site, base)]
    found = cancelling([raw.factors for raw in plain])
    return {raw.site for raw, is_so in zip(plain, found, strict=True) if is_so}


def _left_out(tensors: AdapterTensors, base: BaseSpec) -> dict[TensorName, str]:
    """Tensors of parts of the checkpoint that are left out here → the part. They act on images and
    sounds alone, so on text the adapter does the same without them. Raises AdapterRefused where it
    has no others.
    """
    parts = {name: left_out_part(name.module, base) for name in tensors.names}
    found = {name: part for name, part in parts.items() if part is not None}
    if found and len(found) == len(parts):
        raise AdapterRefused(
            f"target_modules selects {', '.join(sorted(set(found.values())))} alone, and of this "
            "base only the text is served: the adapter would change nothing; name linear layers of "
            "the text",
            field="target_modules",
        )
    tensors.pass_over(found)
    return found


def _without(spec: AdapterSpec, left_out: Collection[TensorName]) -> AdapterSpec:
    """Entries that mean nothing of this base, less those that mean modules of left-out parts."""
    meant = {tail for name in left_out for tail in tails(name.module)}
    kept = {
        field: tuple(e for e in entries if meant.isdisjoint((e, e.removesuffix(".weight"))))
        for field, entries in spec.unmatched.items()
    }
    return replace(spec, unmatched={field: entries for field, entries in kept.items() if entries})


def _passed_parts(left_out: Mapping[TensorName, str]) -> tuple[str, ...]:
    """A note on what an adapter of text and images or sounds has that is not served."""
    if not left_out:
        return ()
    counts = Counter(left_out.values())
    parts = ", ".join(f"{count} of {part}" for part, count in sorted(counts.items()))
    return (
        f"{len(left_out)} of its tensors ({parts}) are of parts that are not served, as only text "
        "is: they are passed over, and change no answer to text",
    )


def _with_passed_over(error: AdapterRefused, spec: AdapterSpec, base: BaseSpec) -> AdapterRefused:
    """Put entries of the config that mean nothing, the likely cause, before a tensor's refusal."""
    if not spec.unmatched:
        return error
    field = error.field if error.field in FIELDS else next(iter(spec.unmatched))
    return type(error)("; ".join([*passed_over(spec, base), error.message]), field=field)


def _key(site: Site) -> ModuleKey:
    return ModuleKey(site.path, site.replica)


def _initial_adapter(content: FolderContent, spec: AdapterSpec) -> AdapterFiles | None:
    """The state before training, in `pissa_init` or `olora_init`; `pissa_niter_N` needs it."""
    if not spec.initialisation:
        return None
    kind = spec.initialisation.partition("_")[0]
    found = content.initial.get(f"{kind}_init")
    if found is None and spec.initialisation != kind:
        raise AdapterRefused(
            f"init_lora_weights is {spec.initialisation!r}, which is random: put the adapter as "
            f"it was before training into {kind}_init/, or save it with PEFT's "
            "path_initial_model_for_weight_conversion",
            field="init_lora_weights",
        )
    return found


def _trained_biases(
    spec: AdapterSpec, base: BaseSpec, weights: BaseWeights, tensors: AdapterTensors
) -> dict[ModuleKey, Tensor]:
    """Biases that replace the base's: of the targets, of every module, or of a replaced head.

    In PEFT's model with replicated layers all visits of a layer share its bias: a bias that was
    trained at one visit acts at all visits, whether they are adapted or not.
    """
    shared: dict[str, Tensor] = {}
    for site in spec.sites:
        is_wanted = spec.bias == "all" or (spec.bias == "lora_only" and site in spec.targets)
        is_wanted = is_wanted or site.path in spec.vocabulary.replaced
        if is_wanted and weights.bias(site.path) is not None:
            _refuse_expert_bias(site, base)
            size = (base.shapes[site.path].out_features,)
            bias = tensors.take(site.module, Part.BIAS, size).float()
            if not torch.equal(bias, shared.setdefault(site.path, bias)):
                raise AdapterRefused(
                    f"the visits of {site.path} share one bias, and the file holds different ones",
                    field="bias",
                )
    return {_key(site): shared[site.path] for site in spec.sites if site.path in shared}


def _refuse_expert_bias(site: Site, base: BaseSpec) -> None:
    if base.shapes[site.path].experts is not None:
        raise AdapterRefused(
            f"bias: trained biases of experts, as of {site.name}, are not served; train with "
            "bias 'none'",
            field="bias",
        )


def _subtracted(
    spec: AdapterSpec, reduced: Iterable[Reduced], initial: AdapterTensors | None
) -> tuple[str, ...]:
    """A note on how the factors that the init took out of the base were found.

    Raises AdapterRefused if they could not be.
    """
    if not spec.initialisation:
        return ()
    if initial is not None:
        return (f"{spec.initialisation}: its first factors were in the folder and are subtracted",)
    error = max(one.error for one in reduced)
    if not error < 1:  # NaN too
        raise AdapterRefused(
            f"init_lora_weights is {spec.initialisation!r}, whose first factors cannot be told "
            "from this base's weights; save it with PEFT's "
            "path_initial_model_for_weight_conversion",
            field="init_lora_weights",
        )
    return (
        f"{spec.initialisation}: its first factors were recomputed from the checkpoint and "
        f"subtracted; relative error of the change at most {error:.1g}",
    )


def _check_fingerprint(metadata: Mapping[str, str], base: BaseSpec) -> None:
    trained_on = metadata.get(FINGERPRINT_KEY, base.fingerprint)
    if trained_on != base.fingerprint:
        raise BaseMismatch(
            f"the adapter was trained on the base with fingerprint {trained_on[:12]!r}; this one, "
            f"{base.name} as {base.quantization}, has {base.fingerprint[:12]!r}: "
            f"{_what_differs(metadata, base)}",
            field=FINGERPRINT_KEY,
        )


def _what_differs(metadata: Mapping[str, str], base: BaseSpec) -> str:
    """Which of checkpoint and quantization is another, as far as the files say it, and what to do.
    One checkpoint in two quantizations is two bases.
    """
    trained_as = metadata.get(QUANTIZATION_KEY)
    if trained_as is None:
        return (
            "another checkpoint, or the same in another quantization, which its files do not say; "
            "serve what it was trained on"
        )
    if trained_as == base.quantization:
        return f"it was trained in {trained_as} too, so on another checkpoint; serve that one"
    return (
        f"it was trained on a base in {trained_as[:20]}; serve that with quantization "
        f"{trained_as[:20]}, or train the adapter in {base.quantization}"
    )


def _unverified_base(files: AdapterFiles, base: BaseSpec) -> tuple[str, ...]:
    """A note on the base of an adapter without our fingerprint, of which PEFT saves a name at most.

    The name is a path or a hub id. Its last part is compared, for the note alone: a name refuses
    nothing.
    """
    if FINGERPRINT_KEY in files.metadata:
        return ()
    named = files.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip("/ "):
        return ("its files do not say which base it was trained on: that could not be checked",)
    if _last_part(named) in (_last_part(base.name), _last_part(base.name_or_path or "")):
        return (f"only the name of its base, {named[:80]!r}, was compared: it has no fingerprint",)
    return (
        f"its config names the base {named[:80]!r}, and this one is {base.name!r}: if they are not "
        "the same weights, its answers are wrong",
    )


def _assumed_experts(spec: AdapterSpec, files: AdapterFiles, base: BaseSpec) -> tuple[str, ...]:
    """A note where nothing in the files says of how many experts their base was: A has a row for
    each expert and rank, and only another layer of the same entry in the config shows the rank.
    """
    shown = {target.rank_pattern for s, target in spec.targets.items() if not is_mixture(s, base)}
    assumed = [
        (site, target)
        for site, target in spec.targets.items()
        if is_mixture(site, base) and target.rank_pattern not in shown
    ]
    if not assumed or FINGERPRINT_KEY in files.metadata:
        return ()
    site, target = assumed[0]
    num_experts = base.shapes[site.path].num_experts
    return (
        f"its files do not say how many experts its base had: the {num_experts * target.rank} rows "
        f"of A of {site.name} were taken for {num_experts} experts of rank {target.rank}, as its "
        "config says",
    )


def _with_bases(error: AdapterRefused, files: AdapterFiles, base: BaseSpec) -> AdapterRefused:
    """Add to a refusal that the config names another base, if it does: the likely cause."""
    named = files.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip("/ "):
        return error
    if FINGERPRINT_KEY in files.metadata or _last_part(named) == _last_part(base.name):
        return error
    return type(error)(
        f"{error.message}; its config names the base {named[:80]!r}, and this one is {base.name!r}",
        field=error.field,
    )


def _last_part(name: str) -> str:
    return name.rstrip("/ ").replace("\\", "/").rpartition("/")[2].lower()


def _digest(honoured: Mapping[str, object], hashes: Sequence[str]) -> str:
    """SHA-256 of the honoured fields and of the tensors' files.

    Top-level keys are sorted; patterns keep their order, because the first match decides.
    """
    content = [[[name, honoured[name]] for name in sorted(honoured)], *hashes]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
