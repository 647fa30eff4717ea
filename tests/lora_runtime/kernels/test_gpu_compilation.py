"""What the interpreter cannot show: the kernels compile, and a step neither syncs nor branches
on data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_runtime.kernels import AdapterMemory, Span, StepMeta, gpu_adapters

KERNELS = [
    "tiles_kernel", "shrink_kernel", "expand_kernel", "product_kernel", "scales_kernel",
    "values_kernel",
    "write_kv_kernel", "decode_kernel", "prefill_kernel", "_rms_norm_kernel", "_rotate_kernel",
    "_gated_activation_kernel", "_embed_kernel", "_patch_kernel",
]  # fmt: skip
MAX_SHARED_BYTES = 99 * 1024
"""What every GPU since Ampere gives a block."""


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    script = Path(__file__).with_name("compile_kernels.py")
    root = script.parents[3]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, script], env=environment, cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, _, _ in lines} == set(KERNELS)
    assert all(int(size) > 0 and int(shared) <= MAX_SHARED_BYTES for _, size, shared in lines)


class Launches:
    """Stands for a kernel; keeps the grids it was launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


def test_a_step_reads_no_value_on_the_host(monkeypatch):
    """A fake tensor refuses to give one; grids come from the shapes T 9, E 7, K 3 and the bound."""
    tiles, shrink, expand = Launches(), Launches(), Launches()
    monkeypatch.setattr(gpu_adapters, "tiles_kernel", tiles)
    monkeypatch.setattr(gpu_adapters, "shrink_kernel", shrink)
    monkeypatch.setattr(gpu_adapters, "expand_kernel", expand)
    spans = [Span(slot=i % 3, first_token=i, num_tokens=1) for i in range(7)]
    meta, runs = StepMeta.build(spans), torch.zeros(3, 1, 8, dtype=torch.int64)
    memory = AdapterMemory.over(torch.zeros(1024, dtype=torch.uint8), torch.float32, 16)
    mode = FakeTensorMode()
    fake = mode.from_tensor
    tables = ("tokens", "slots", "replicas", "weights", "segment_starts")
    with mode:
        y = gpu_adapters.apply_adapters(
            torch.empty(9, 300),
            torch.empty(9, 4096),
            None,
            AdapterMemory(fake(memory.weights), fake(memory.vectors), fake(memory.indices), 40, 16),
            fake(runs)[None],
            StepMeta(**{name: fake(getattr(meta, name)) for name in tables}),
            (300,),
        )
    assert y.shape == (9, 300)
    assert tiles.grids == [(3 + 1,)]
    assert expand.grids == [(3 + 1, 5)] and shrink.grids == [(3, 2, 8)]
