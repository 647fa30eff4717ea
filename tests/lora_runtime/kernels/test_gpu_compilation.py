"""What the interpreter cannot show: what is launched compiles and fits the card, a warm engine
compiles nothing, and a step neither syncs nor branches on data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_runtime.kernels import AdapterMemory, Span, StepMeta
from lora_runtime.kernels.triton import adapters as triton_adapters


@pytest.fixture(scope="module")
def found(pytestconfig) -> dict[str, dict]:
    """What compile_launches.py says; in a process in which Triton compiles for GPUs."""
    module = "tests.lora_runtime.kernels.compile_launches"
    cache = pytestconfig.cache.mkdir("gpu_launches")
    root = Path(__file__).parents[3]
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", module, "quick", "--cache", cache],
        env=environment | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


@pytest.mark.timeout(400)
def test_the_largest_tile_of_every_kernel_fits_a_card(found):
    """The launchers' own launches compile, fit the card's shared memory and spill nothing. All
    launches of all cards: make test-gpu-compile.
    """
    sample = found["sample"]
    assert sample["never_launched"] == [], "let gpu_drives.sample launch it"
    assert sample["launches"] == len(sample["kernels"])
    assert sample["complaints"] == [], "\n".join(sample["complaints"])


@pytest.mark.timeout(400)
def test_nothing_is_compiled_while_serving(found):
    """A compile stops all streams for a second: after the warm-up every launch is known, however
    many rows a step has, how long they are and which adapters come.
    """
    serving = found["while serving"]
    assert serving["launches"] > 1000
    assert serving["complaints"] == [], "\n".join(serving["complaints"])


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
    monkeypatch.setattr(triton_adapters, "tiles_kernel", tiles)
    monkeypatch.setattr(triton_adapters, "shrink_kernel", shrink)
    monkeypatch.setattr(triton_adapters, "expand_kernel", expand)
    spans = [Span(slot=i % 3, first_token=i, num_tokens=1) for i in range(7)]
    meta, extents = StepMeta.build(spans), torch.zeros(3, 1, 8, dtype=torch.int64)
    memory = AdapterMemory.over(torch.zeros(1024, dtype=torch.uint8), torch.float32, 16)
    mode = FakeTensorMode()
    fake = mode.from_tensor
    tables = ("tokens", "slots", "replicas", "weights", "segment_starts")
    with mode:
        y = triton_adapters.apply_adapters(
            torch.empty(9, 300),
            torch.empty(9, 4096),
            None,
            AdapterMemory(fake(memory.weights), fake(memory.vectors), fake(memory.indices), 40, 16),
            fake(extents)[None],
            StepMeta(**{name: fake(getattr(meta, name)) for name in tables}),
            (300,),
        )
    assert y.shape == (9, 300)
    assert tiles.grids == [(3 + 1,)]
    assert expand.grids == [(3 + 1, 5)] and shrink.grids == [(3, 1, 8)]
