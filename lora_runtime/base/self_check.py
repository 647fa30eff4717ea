"""Checks that a model with replaced modules gives the logits it gave before; not yet quantised.

A mixture's router turns a difference of rounding into another expert where two are nearly as good.
So its logits are compared as the model's are, and behind it both go the way of the original.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_runtime.base.model.experts import AdaptedRouter, routers
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.errors import BaseRefused

SELF_CHECK_LENGTHS = (5, 23)
SELF_CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 0.15}
"""The largest logit difference that is accepted, relative to the largest logit."""


def _check_rows(model: PreTrainedModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    rows = [torch.randint(vocab_size, (n,), generator=generator) for n in SELF_CHECK_LENGTHS]
    return [row.to(model.device) for row in rows]


class Original(NamedTuple):
    """What transformers' own modules gave.

    logits: the last ones (vocab,) of each row, run alone. routed: of every router in turn, logits,
    weights and experts of the tokens of all rows.
    """

    logits: list[Tensor]
    routed: list[tuple[Tensor, ...]]


@torch.no_grad()
def original_logits(model: PreTrainedModel) -> Original:
    """Run each row alone."""
    logits: list[Tensor] = []
    routed: list[list[tuple[Tensor, ...]]] = []
    for row in _check_rows(model):
        routed.append([])
        hooked = _hooked(routers(model).values(), lambda found: routed[-1].append(found))
        with _without_advice(), hooked:
            logits.append(model(row[None], use_cache=False).logits[0, -1])
    of_router = [tuple(map(torch.cat, zip(*own, strict=True))) for own in zip(*routed, strict=True)]
    return Original(logits, of_router)


@contextmanager
def _without_advice() -> Iterator[None]:
    """transformers advises to install faster kernels for recurrent layers, which are never run
    again.
    """
    advice = logging.getLogger("transformers.integrations.hub_kernels")
    advice.addFilter(_says_nothing)
    try:
        yield
    finally:
        advice.removeFilter(_says_nothing)


def _says_nothing(_: logging.LogRecord) -> bool:
    return False


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[[Any], Any]) -> Iterator[None]:
    """Let `hook` see, and replace, what modules return."""
    handles = [m.register_forward_hook(lambda _m, _x, found: hook(found)) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def self_check(model: PreTrainedModel, original: Original) -> None:
    """Run a short row beside a long one through the replaced modules.

    Raises BaseRefused if the logits of either differ from `original`, where each ran alone.
    """
    rows = _check_rows(model)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    choices = iter(original.routed)

    def route(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        theirs = next(choices)
        _compare(model, found[0], theirs[0], float(theirs[0].abs().max()), "a router")
        return theirs

    ours = [module for module in model.modules() if isinstance(module, AdaptedRouter)]
    with _hooked(ours, route):
        out = model(
            torch.cat(rows)[None],
            position_ids=torch.cat([torch.arange(len(r), device=model.device) for r in rows])[None],
            use_cache=False,
            attention=VarlenAttention([RowLengths(lengths.tolist())], model.device),
            logits_to_keep=lengths.cumsum(0) - 1,
        )
    scale = max(float(logits.abs().max()) for logits in original.logits)
    for row, logits in enumerate(original.logits):
        where = f"a row of {SELF_CHECK_LENGTHS[row]} tokens"
        _compare(model, out.logits[0, row], logits, scale, where)


def _compare(
    model: PreTrainedModel, ours: Tensor, theirs: Tensor, scale: float, where: str
) -> None:
    error = float((ours - theirs).abs().max()) / scale
    if not error <= SELF_CHECK_TOLERANCE[model.dtype]:
        raise BaseRefused(
            f"{model.config.model_type} does not give its own logits with our attention and "
            f"linear layers (relative error {error:.2g} on {where}); this architecture is not "
            "served"
        )
