"""The learning rate of every update of a run, as a share of its peak.

    share(t) = (t + 1) / (w + 1) for t < w,  transformers' schedule from t = w on

t counts the updates from 0, w is the number of warm-up updates. transformers' own warm-up begins
with t / w, so that the first update, and with it the whole of a run of one update, changes nothing.
Source: linear warm-up as in torchtitan and nanoGPT.
"""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lora_runtime.training.config import UnitConfig


def create_schedule(config: UnitConfig, optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """The unit's schedule over `num_steps` updates, for every group of the optimizer.

    `constant` has no warm-up. The share is above 0 at every update.
    """
    num_warmup = 0 if config.schedule == "constant" else config.num_warmup_steps(num_steps)
    theirs = get_scheduler(
        config.schedule,
        optimizer,
        num_warmup_steps=num_warmup,
        num_training_steps=num_steps,
    ).lr_lambdas[0]

    def share(step: int) -> float:
        return (step + 1) / (num_warmup + 1) if step < num_warmup else theirs(step)

    return LambdaLR(optimizer, share)
