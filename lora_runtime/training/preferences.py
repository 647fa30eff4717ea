"""Direct preference optimisation (DPO): the loss of a pair of answers.

    loss = −(1 − ε) log σ(m) − ε log σ(−m) + w · (−log π(y_w)) / |y_w|
    m = β · [(log π(y_w) − log π₀(y_w)) − (log π(y_l) − log π₀(y_l))]

π is the unit, y_w the chosen and y_l the rejected answer, log π(y) the sum over its target tokens,
β `dpo_beta`, ε `label_smoothing`, w `dpo_sft_weight`. The reference π₀ is the base in the unit's
own order of layers with the adapter off. That is where units start, so the first loss is log 2
where w is 0, but for an init that makes up for quantisation. Sources: DPO arXiv:2305.18290; ε is
its conservative form, https://ericmitchell.ai/cdpo.pdf; w is α of arXiv:2404.19733.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_runtime.base.model.layer_order import LayerMap
from lora_runtime.errors import ConfigError
from lora_runtime.settings import entries
from lora_runtime.training.config import OBJECTIVE, UnitConfig
from lora_runtime.training.data import Dataset, Example, num_tokens

References = dict[tuple[LayerMap | None, Example], float]
"""(layer map, answer) → log π₀. It is computed once, as no update changes it."""


class Signal(NamedTuple):
    """Loss, accuracy and margin of some data, as sums or as means."""

    loss: float
    accuracy: float
    """Share of pairs with m > 0, whose chosen answer the unit moved towards; 0 for other data.

    Before the first update m is 0 but for rounding, so the accuracy says nothing yet.
    """
    margin: float
    """Mean of m; 0 for other data."""

    @classmethod
    def rows(cls, values: Tensor) -> list[Signal]:
        """One Signal per row of (N, 3). Reads from the device."""
        return [cls(*row) for row in values.tolist()]

    def plus(self, other: Signal) -> Signal:
        """The sums of both."""
        return Signal(*map(sum, zip(self, other, strict=True)))


NOTHING = Signal(0.0, 0.0, 0.0)


def pair_sums(policy: Tensor, reference: Tensor, counts: Tensor, config: UnitConfig) -> Tensor:
    """Sums over pairs (3,), as a `Signal`; the loss is differentiable in `policy`.

    policy, reference (2P,): log π and log π₀ of the answers, each pair's chosen one first; counts
    (2P,): their target tokens.
    """
    chosen, rejected = (policy - reference).view(-1, 2).unbind(1)
    margins = config.dpo_beta * (chosen - rejected)
    smoothing = config.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
    losses = losses - config.dpo_sft_weight * (policy / counts)[::2]
    margins = margins.detach()
    return torch.stack([losses.sum(), (margins > 0).sum().to(margins), margins.sum()])


def check_settings(config: UnitConfig, dataset: Dataset) -> None:
    """Raise ConfigError for settings of one format's data beside other data, and for a pair that
    cannot be read in one forward.
    """
    where = f"unit {config.name!r}: "
    found = [e for e in entries(UnitConfig).values() if e.group == OBJECTIVE]
    changed = [e.name for e in found if getattr(config, e.name) != e.default]
    if changed and not dataset.is_preference:
        raise ConfigError(
            f"{where}{changed[0]} is {getattr(config, changed[0])!r}, which is for data with "
            f"prompt, chosen and rejected; {dataset.path} is {dataset.format}: leave it out",
            field=changed[0],
        )
    if config.instructions != "chat" and dataset.format != "instruction":
        raise ConfigError(
            f"{where}instructions is {config.instructions!r}, which is for data with instruction "
            f"and output; {dataset.path} is {dataset.format}: leave it out",
            field="instructions",
        )
    longest = max(map(num_tokens, dataset.pairs), default=0)
    if longest > (config.max_tokens_per_batch or longest):
        raise ConfigError(
            f"{where}max_tokens_per_batch is {config.max_tokens_per_batch}; the longest pair of "
            f"{dataset.path} has {longest} tokens, and pairs are read in one forward",
            field="max_tokens_per_batch",
        )
