"""What a request's adapters mean for its row: where they act, and which layers it visits.

Reads packed adapters; holds no state and touches no tensor's values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_runtime.adapters.packed_adapter import PackedAdapter
from lora_runtime.core import AdapterUse, Request, Row, activation_start
from lora_runtime.engine.client import EngineInfo
from lora_runtime.errors import InvalidRequest


def admit(request: Request, adapters: Sequence[PackedAdapter], info: EngineInfo) -> Row:
    """A new row for `request`; `adapters` are those it names, in order.

    An activated LoRA starts at its invocation tokens, and is left out where the prompt has none.
    Raises InvalidRequest (field `adapters`) for a composition without meaning, and for a row that
    could never fit the cache.
    """
    _check_composition(adapters)
    uses = [
        _activated(use, adapter, request)
        for use, adapter in zip(request.adapters, adapters, strict=True)
    ]
    layer_map = next((a.layer_map for a in adapters if a.layer_map is not None), None)
    depth = info.base.num_layers if layer_map is None else len(layer_map)
    num_planes = -(-depth // info.base.num_layers)
    _check_room(request, depth, num_planes, info)
    active = tuple(use for use in uses if use is not None)
    return Row.of(replace(request, adapters=active), layer_map, num_planes)


def _activated(use: AdapterUse, adapter: PackedAdapter, request: Request) -> AdapterUse | None:
    if not adapter.invocation_tokens:
        return use
    start = activation_start(request.prompt_token_ids, adapter.invocation_tokens)
    return None if start is None else replace(use, start_position=start)


def _check_composition(adapters: Sequence[PackedAdapter]) -> None:
    if len({adapter.layer_map for adapter in adapters}) > 1:
        raise InvalidRequest(
            "adapters visit the base's layers in different orders (layer_replication); name only "
            "adapters with the same layer map",
            field="adapters",
        )
    if sum(adapter.has_whole_patch for adapter in adapters) > 1:
        raise InvalidRequest(
            "more than one of adapters replaces the whole embedding or output layer; name one",
            field="adapters",
        )


def _check_room(request: Request, depth: int, num_planes: int, info: EngineInfo) -> None:
    num_tokens = len(request.prompt_token_ids) + request.sampling.max_tokens
    num_blocks = -(-num_tokens // info.block_size) * num_planes
    if num_blocks > info.num_blocks:
        raise InvalidRequest(
            f"adapters give the row {depth} layers, so its {num_tokens} tokens take {num_blocks} "
            f"cache blocks and there are {info.num_blocks}; lower the prompt or max_tokens",
            field="adapters",
        )
