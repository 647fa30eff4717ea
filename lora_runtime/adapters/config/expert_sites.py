"""How files name the experts of a mixture, and the sites that these names make. Plain Python.

transformers 5 and PEFT hold a layer's experts as parameters of one module, and files name them so.
Older versions had a linear layer for each expert, and other trainers still write those: each is a
site of its own, which covers some of the outputs of one expert. Source: peft 0.21.2,
`BaseTuner._inject_parameters`, `transformers_weight_conversion.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lora_runtime.adapters.config.layer_sites import ExpertRows, Site
from lora_runtime.adapters.config.matching import likely_meant
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused

PerExpert = Mapping[str, tuple[str, ...]]
"""Last name of a product of all experts → the layers of one expert, `{}`, that make it up."""

PER_EXPERT: tuple[PerExpert, ...] = (
    {"gate_up_proj": ("{}.gate_proj", "{}.up_proj"), "down_proj": ("{}.down_proj",)},
    {"gate_up_proj": ("{}.w1", "{}.w3"), "down_proj": ("{}.w2",)},
    {"gate_up_proj": ("gate_up_projs.{}",), "down_proj": ("down_projs.{}",)},
)
"""transformers 4's and Megatron's names; Mixtral's of transformers 4; Unsloth's of gpt-oss in 4
bits.
"""

OLD_PARAMETERS = {
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
}
"""What transformers 4 called the experts' weights of Granite → what 5 calls them."""

TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Last names in target_modules that PEFT takes for experts and routers, of the families that
transformers 4 held in linear layers."""


def per_expert_names(modules: Iterable[str]) -> PerExpert | None:
    """The names in PER_EXPERT that a file's modules have, if it has a layer for each expert."""
    listed = list(modules)
    for names in PER_EXPERT:
        layers = (
            re.escape(layer).replace(r"\{\}", r"\d+") for own in names.values() for layer in own
        )
        pattern = re.compile(rf".*\.experts\.(?:{'|'.join(layers)})")
        if any(pattern.fullmatch(module) for module in listed):
            return names
    return None


def split_experts(sites: Sequence[Site], base: BaseSpec, names: PerExpert) -> tuple[Site, ...]:
    """`sites` with one for each expert's own layers in the place of those of all experts."""
    found: list[Site] = []
    for site in sites:
        layout = base.shapes[site.path].experts
        found += [site] if layout is None else _layers_of(site, base, names)
    return tuple(found)


def _layers_of(site: Site, base: BaseSpec, names: PerExpert) -> list[Site]:
    shape = base.shapes[site.path]
    holder, _, last = site.name.rpartition(".")
    layers = names[last]
    is_interleaved = shape.experts is not None and shape.experts.is_interleaved
    size = shape.out_features
    found = []
    for expert in range(shape.num_experts):
        for index, layer in enumerate(layers):
            rows = range(index * size // len(layers), (index + 1) * size // len(layers))
            if is_interleaved:
                rows = range(index, size, len(layers))
            name = f"{holder}.{layer.format(expert)}"
            found.append(Site(site.path, site.replica, name, ExpertRows(expert, rows)))
    return found


def is_mixture(site: Site, base: BaseSpec) -> bool:
    """True for a site of all experts at once, which only target_parameters names."""
    return base.shapes[site.path].experts is not None and site.expert is None


def parameter_name(site: Site, base: BaseSpec) -> str:
    """As target_parameters names a site: of a plain layer `….weight`, of experts the name that the
    layer has here.
    """
    return site.name if is_mixture(site, base) else f"{site.name}.weight"


def parameter_names(sites: Iterable[Site], base: BaseSpec) -> list[str]:
    """What target_parameters may name of some sites."""
    return [parameter_name(site, base) for site in sites if site.expert is None]


def likely_parameter(entry: str, names: Sequence[str]) -> str:
    """`likely_meant` of an entry of target_parameters, which may be an older name."""
    newer = OLD_PARAMETERS.get(".".join(entry.split(".")[-2:]))
    if newer is not None and any(name.endswith(f".{newer}") for name in names):
        return f"transformers 5 calls it {newer!r}: train with that"
    return likely_meant(entry, names)


def refuse_expert_biases(entries: Iterable[str], sites: Iterable[Site], base: BaseSpec) -> None:
    """Raise AdapterRefused for biases of experts, which PEFT adapts as they are two-dimensional."""
    biases = {f"{site.name}_bias": site for site in sites if is_mixture(site, base)}
    for entry in entries:
        meant = next((name for name in biases if f".{name}".endswith(f".{entry}")), None)
        if meant is not None:
            raise AdapterRefused(
                f"target_parameters names {entry[:80]!r}, the biases of experts: adapters of them "
                "are not served, though PEFT has them; train the weight "
                f"{biases[meant].name!r} alone",
                field="target_parameters",
            )


def parameter_sites(
    entries: Sequence[str], sites: Sequence[Site], base: BaseSpec
) -> tuple[list[Site], list[str]]:
    """The sites that target_parameters selects, and the entries that select none.

    As in PEFT an entry is the end of a `parameter_name`. Patterns of ranks are matched with that
    name. Where several parameters of one module are adapted, their wrappers nest in the order in
    which the module has them: the last one has the module's name in the file, each before it
    `.base_layer` more.
    """
    found, used = [], set()
    for site in sites:
        name = parameter_name(site, base)
        own = [entry for entry in entries if name == entry or name.endswith(f".{entry}")]
        used |= set(own)
        if own and site.expert is None:
            holder = name.rpartition(".")[0]
            found.append(site._replace(name=name, holder=holder))
    nested = []
    for index, site in enumerate(found):
        later = sum(other.holder == site.holder for other in found[index + 1 :])
        nested.append(site._replace(holder=site.holder + ".base_layer" * later))
    return nested, [entry for entry in entries if entry not in used]
