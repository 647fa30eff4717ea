"""Where the Triton backend is tested: on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import dataclasses

import torch

from lora_runtime.kernels import AdapterMemory, StepMeta, gpu
from tests.lora_runtime.kernels import interpreter
from tests.lora_runtime.kernels.one_module import of_one_module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    interpreter.mend()


def on_device(value):
    """A tensor, or a table of tensors, moved to DEVICE; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if isinstance(value, AdapterMemory | StepMeta):
        names = [f.name for f in dataclasses.fields(value) if f.name != "derived"]
        return type(value)(**{name: on_device(getattr(value, name)) for name in names})
    return value


def apply_adapters(*arguments):
    """The Triton backend's op on DEVICE, its result back on the host."""
    return of_one_module(gpu, *map(on_device, arguments)).cpu()
