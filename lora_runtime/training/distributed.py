"""Several processes that train the same units, each on its own device and share of the examples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lora_runtime.base.device import resolve_device
from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError
from lora_runtime.training.units import Unit


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run; all of them call every method at the same point. One by default."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """Device on which flags and losses are summed over the processes."""

    @property
    def is_main(self) -> bool:
        """True on the one process that writes and shows things."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over all processes."""
        if self.size == 1:
            return
        # One reduction of all of them: small reductions cost a round trip each.
        bucket = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(bucket)
        parts = torch.split(bucket, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of `values` over all processes."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_([sums])
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """True when it is so on any process."""
        return self.total([flag])[0] > 0


ALONE = World()


def share_state(units: Sequence[Unit], world: World) -> None:
    """Give all processes the first one's weights, and to it alone the gradients so far."""
    for unit in units:
        tensors = [t.data for t in (*unit.parameters, *unit.named_constants().values())]
        if not world.is_main:
            _zero([*tensors, *_gradients(unit)])
        world.sum_(tensors)


def gather_gradients(units: Sequence[Unit], world: World) -> None:
    """Move the gradients of all processes to the first, so that a checkpoint has them all."""
    for unit in units:
        if gradients := _gradients(unit):
            world.sum_(gradients)
            if not world.is_main:
                _zero(gradients)


def _gradients(unit: Unit) -> list[Tensor]:
    """Gradients of a window that has begun: on all processes, or on none."""
    return [p.grad for p in unit.parameters if p.grad is not None] if unit.window.done else []


def _zero(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()


@contextmanager
def joined(config: BaseConfig) -> Iterator[tuple[World, BaseConfig]]:
    """Join the processes that torchrun started, if it did; each has a CUDA device or a CPU.

    Yields the world, and `config` with this process's device. Raises ConfigError. Source:
    torchrun, https://docs.pytorch.org/docs/stable/elastic/run.html
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(), config
        return
    has_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
    if not has_cuda and config.device not in ("auto", "cpu"):
        raise ConfigError(
            f"device is {config.device!r}; several processes take one each: leave it at auto",
            field="device",
        )
    device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}" if has_cuda else "cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_cuda else "gloo")
    try:
        world = World(dist.get_rank(), size, str(device))
        yield world, replace(config, device=str(device))
    finally:
        dist.destroy_process_group()
