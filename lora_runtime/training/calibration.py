"""How strong the inputs of a base's layers are on the examples that a unit begins with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lora_runtime.base.loader import Base
from lora_runtime.base.model.layer_order import LayerMap
from lora_runtime.training.data import Example, ExampleStream
from lora_runtime.training.forward import states_of_rows

MAX_TOKENS = 4096


def calibration_rows(examples: Sequence[Example], seed: int) -> list[Tensor]:
    """Token ids of the first examples that a unit of this seed is trained on, MAX_TOKENS in all.

    The last one is cut; examples of a later epoch would only repeat these.
    """
    rows, room = list[Tensor](), MAX_TOKENS
    for example in ExampleStream(examples, seed).take(0, len(examples)):
        rows.append(example.token_ids[:room])
        room -= len(rows[-1])
        if not room:
            break
    return rows


@torch.no_grad()
def input_rms(
    base: Base, layer_map: LayerMap | None, paths: Collection[str], rows: Sequence[Tensor]
) -> dict[tuple[str, int], Tensor]:
    """sqrt(E[x_i²]) over all tokens of `rows` of every input feature i of some linear layers.

    From one forward of the base without adapters. Returns (path, visit) → (in,) float32, or float64
    on a float64 base, where the base is. A layer that `layer_map` visits several times sees other
    inputs at each visit, and each visit has an adapter of its own, so that each gets its own
    figures.
    """
    found: dict[tuple[str, int], Tensor] = {}
    visits = Counter[str]()

    def collect(module: nn.Module, args: tuple[Tensor]) -> None:
        path, x = str(module.path), args[0].flatten(0, -2)
        dtype = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x, dim=0, dtype=dtype)
        found[path, visits[path]] = norms / math.sqrt(len(x))
        visits[path] += 1

    with ExitStack() as hooks:
        for path in paths:
            module = base.model.get_submodule(path)
            hooks.enter_context(module.register_forward_pre_hook(collect))
        states_of_rows(base, {}, rows, layer_map)
    return found
