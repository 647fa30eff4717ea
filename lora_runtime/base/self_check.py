"""Checks that a model with replaced modules gives the logits it gave before; not yet quantised."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

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


@torch.no_grad()
def original_logits(model: PreTrainedModel) -> list[Tensor]:
    """Last logits (vocab,) of each row, run alone through transformers' own modules."""
    # It advises to install faster kernels for its recurrent layers, which are never run again.
    advice = logging.getLogger("transformers.integrations.hub_kernels")
    advice.addFilter(_says_nothing)
    try:
        return [model(row[None], use_cache=False).logits[0, -1] for row in _check_rows(model)]
    finally:
        advice.removeFilter(_says_nothing)


def _says_nothing(_: logging.LogRecord) -> bool:
    return False


@torch.no_grad()
def self_check(model: PreTrainedModel, original: list[Tensor]) -> None:
    """Run a short row beside a long one through the replaced modules.

    Raises BaseRefused if the logits of either differ from `original`, where each ran alone.
    """
    rows = _check_rows(model)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    out = model(
        torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(len(row), device=model.device) for row in rows])[None],
        use_cache=False,
        attention=VarlenAttention([RowLengths(lengths.tolist())], model.device),
        logits_to_keep=lengths.cumsum(0) - 1,
    )
    scale = max(float(logits.abs().max()) for logits in original)
    for row, logits in enumerate(original):
        error = float((out.logits[0, row] - logits).abs().max()) / scale
        if not error <= SELF_CHECK_TOLERANCE[model.dtype]:
            raise BaseRefused(
                f"{model.config.model_type} does not give its own logits with our attention and "
                f"linear layers (relative error {error:.2g} on a row of {SELF_CHECK_LENGTHS[row]} "
                "tokens); this architecture is not served"
            )
