"""Where an adapter may act: every module of the base, once for each visit of its layer map.

Plain Python. Source: peft 0.21.2, `replicate_layers`: layers are renumbered in the new order, and
each visit of a base layer has its own adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from lora_runtime.config import MAX_DEPTH
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused


class ExpertRows(NamedTuple):
    """Some outputs of one expert of a mixture."""

    expert: int
    rows: range


class Site(NamedTuple):
    """A module of the base at one visit, and its name in the model of the training."""

    path: str
    replica: int
    name: str
    expert: ExpertRows | None = None
    """What it is of a mixture of experts, if it is one expert's own layer in the training."""
    holder: str = ""
    """The module by which files name its tensors, where that is not `name`."""

    @property
    def module(self) -> str:
        """The module by which files name its tensors."""
        return self.holder or self.name


def parse_layer_map(value: object, base: BaseSpec) -> tuple[int, ...] | None:
    """`layer_replication` [[start, end), …] → base layers in the order of their visits.

    None where each layer is visited once, in order. Raises AdapterRefused.
    """
    num_layers = base.num_layers
    if not value:
        return None
    ranges = value if isinstance(value, list) else [value]
    spans = [_range(pair, num_layers) for pair in ranges]
    if (depth := sum(len(span) for span in spans)) > MAX_DEPTH:
        raise AdapterRefused(
            f"layer_replication makes {depth} layers; at most {MAX_DEPTH} are served",
            field="layer_replication",
        )
    layers = [layer for span in spans for layer in span]
    if layers == list(range(num_layers)):
        return None
    if not base.can_reorder_layers:
        raise AdapterRefused(
            f"layer_replication is not served on {base.model_type}: its layers differ in what they "
            "keep or are given of a token, or carry a state, so they run in their own order only",
            field="layer_replication",
        )
    return tuple(layers)


def check_depth(layer_map: tuple[int, ...] | None, limit: int) -> None:
    """Raise AdapterRefused (field `layer_replication`) for more than `limit` layers."""
    if layer_map is not None and len(layer_map) > limit:
        raise AdapterRefused(
            f"layer_replication makes {len(layer_map)} layers; at most {limit} are served here; "
            "raise max_adapter_layers, or replicate less",
            field="layer_replication",
        )


def _range(pair: object, num_layers: int) -> range:
    if isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair):
        start, end = pair
        if 0 <= start < end <= num_layers:
            return range(start, end)
    raise AdapterRefused(
        f"layer_replication holds {str(pair)[:40]}; each entry must be [start, end] with "
        f"0 <= start < end <= {num_layers}, the layers of this base",
        field="layer_replication",
    )


def sites_of(
    base: BaseSpec, names: Mapping[str, str], layer_map: tuple[int, ...] | None
) -> tuple[Site, ...]:
    """Every site of a base under a layer map; `names`: base path → name in the training."""
    if layer_map is None:
        return tuple(Site(path, 0, names[path]) for path in base.shapes)
    inside: dict[int, list[str]] = {}
    outside: list[str] = []
    for path in base.linears:
        layer = layer_index(path)
        (outside if layer is None else inside.setdefault(layer, [])).append(path)
    visits: Counter[int] = Counter()
    sites = []
    for position, layer in enumerate(layer_map):
        for path in inside.get(layer, []):
            sites.append(Site(path, visits[layer], _moved(names[path], position)))
        visits[layer] += 1
    ends = (*outside, base.embedding, base.head)
    return (*sites, *(Site(path, 0, names[path]) for path in ends))


def layer_index(path: str) -> int | None:
    """The layer that a module is part of, the first number in its path; None outside of layers."""
    return next((int(piece) for piece in path.split(".") if piece.isdecimal()), None)


def _moved(name: str, position: int) -> str:
    """The name with its layer index, the first number in it, replaced."""
    pieces = name.split(".")
    index = next(i for i, piece in enumerate(pieces) if piece.isdecimal())
    return ".".join([*pieces[:index], str(position), *pieces[index + 1 :]])
