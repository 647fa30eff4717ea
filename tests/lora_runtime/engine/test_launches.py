"""What a decode step launches in one layer: the fewer, the less of a short step is waiting."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.engine.step_buffers import StepBuffers
from lora_runtime.kernels import gpu
from tests.driver import greedy, run, tiny_engine
from tests.lora_runtime.engine.mixed_batch import rows_of
from tests.lora_runtime.kernels.on_triton import DEVICE
from tests.peft_adapters import write_adapter
from tests.tiny import dense_twin, tiny_base

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="launches are counted in the interpreter")
NOTHING = {f"aten::{name}" for name in ("empty.memory_format", "empty_like", "new_empty")}
"""Operations that are no view and yet launch nothing."""
EXPECTED = {
    False: [
        "product_kernel", "_rotate_kernel", "decode_kernel", "product_kernel", "_rms_norm_kernel",
        "product_kernel", "product_kernel", "_rms_norm_kernel",
    ],
    True: [
        "product_and_shrink_kernel", "expand_kernel", "_rotate_kernel", "decode_kernel",
        "product_and_shrink_kernel", "expand_kernel", "_rms_norm_kernel",
        "product_and_shrink_kernel", "gated_expand_kernel",
        "product_and_shrink_kernel", "expand_kernel", "_rms_norm_kernel",
    ],
}  # fmt: skip
"""8 of the base, 12 with adapters."""


class Launches(TorchDispatchMode):
    """Names of kernels and of torch's operations that run on the device, while it is on."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.name() not in NOTHING:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Of what is run inside of it; a kernel is one launch, whatever the interpreter makes of it."""
    mode, run = Launches(), interpreter.GridExecutor.__call__

    def launch(self, *args, **options):
        names = [*mode.names, self.fn.__name__]
        run(self, *args, **options)
        mode.names = names

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return mode


@pytest.mark.parametrize("has_adapters", [False, True])
def test_launches_of_a_layer(monkeypatch, launches, has_adapters, tmp_path):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
    base = tiny_base("llama", dequantized_cache=False)
    engine = tiny_engine(base, poison=False)
    if has_adapters:
        adapter = write_adapter(dense_twin(base, "llama"), tmp_path, seed=1)
        form = load_adapter(adapter, base.spec, base.weights)
        engine.add_adapter(form)
        run(engine, [greedy("1", [5, 6], form.digest, max_tokens=1)])
    buffers = StepBuffers(2, 8, 4, torch.device(DEVICE))
    buffers.fill(rows_of([([3, 4], 6)], [0 if has_adapters else None]))
    layer = base.model.get_submodule("model.layers.1")
    forward, found = layer.forward, []

    def recorded(*args, **kwargs):
        launches.names = []
        with launches:
            out = forward(*args, **kwargs)
        found.extend(launches.names)
        return out

    monkeypatch.setattr(layer, "forward", recorded)
    with torch.inference_mode():
        engine.runner.forward(buffers.batch(2 if has_adapters else 0))
    assert found == EXPECTED[has_adapters]
