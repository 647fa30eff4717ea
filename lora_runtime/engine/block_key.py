"""What a full block of keys and values depends on, as one key for the prefix cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from lora_runtime.core import Request

BlockKey = bytes
"""SHA-256, 32 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfluence:
    """What changes the keys and values of a token block beside the base."""

    adapters: tuple[tuple[str, float, int], ...] = ()
    """(digest, weight, offset) of each adapter that acts within the block, sorted; offset: the
    first token of the block it acts on.
    """
    layer_map: tuple[int, ...] | None = None


def influence_within(
    request: Request, start: int, stop: int, layer_map: tuple[int, ...] | None = None
) -> BlockInfluence:
    """What influences the token block of positions `start` to `stop` - 1.

    A block that ends before an activated LoRA's start is the base's own. An adapter of weight 0
    counts: 0 · ∞ is NaN, so its keys and values equal the base's only while its own are finite.
    """
    acting = [
        (use.digest, use.weight, max(use.start_position - start, 0))
        for use in request.adapters
        if use.start_position < stop
    ]
    return BlockInfluence(adapters=tuple(sorted(acting)), layer_map=layer_map)


def block_key(
    parent: BlockKey | None, token_ids: Sequence[int], influence: BlockInfluence, salt: str
) -> BlockKey:
    """Key of a full token block: SHA-256 of (salt, parent key, tokens, influence).

    Two blocks with equal keys hold equal keys and values, so a prefix cache may share them: the
    parent's key stands for every earlier token and what influenced it. `salt` separates tenants.
    """
    content = [
        salt,
        parent.hex() if parent else None,
        list(token_ids),
        [[digest, repr(weight), offset] for digest, weight, offset in influence.adapters],
        list(influence.layer_map) if influence.layer_map is not None else None,
    ]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).digest()
