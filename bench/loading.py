"""How long does an adapter take from its folder to the serving form, by kind, and to the pool?

All-linear adapters on SmolLM2-135M, the same factors as LoRA and as DoRA. The first DoRA is timed
apart: nothing may be left for it to compute once for the base.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench import machine
from bench.random_adapters import write_random_adapters
from lora_runtime.adapters.files.folder import read_adapter, write_adapter
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.loader import Base, load_base
from lora_runtime.config import BaseConfig
from lora_runtime.core import AdapterPlacement


def as_dora(lora: Path, base: Base, folder: Path) -> Path:
    """The same factors with magnitudes near the base's own row norms."""
    files = read_adapter(lora)
    magnitudes = {
        f"base_model.model.{path}.lora_magnitude_vector": (
            base.weights.squared_norms(path).sqrt() * (1 + 0.1 * torch.rand(shape.out_features))
        ).float()
        for path, shape in base.spec.linears.items()
    }
    config = {**files.config, "use_dora": True}
    write_adapter(folder, config, {**files.tensors, **magnitudes}, files.metadata)
    return folder


def seconds_to_load(folder: Path, base: Base) -> float:
    """From the folder to the serving form; the files are in the page cache."""
    start = time.perf_counter()
    load_adapter(folder, base.spec, base.weights)
    return time.perf_counter() - start


def seconds_to_pool(folder: Path, base: Base, repeats: int) -> tuple[float, float]:
    """Of packing, once when an adapter is added, and of a load into the pool; medians."""
    form = load_adapter(folder, base.spec, base.weights)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        adapter = pack_for(base, form)
        packed = time.perf_counter()
        like = torch.empty(0, dtype=adapter.dtype, device=base.device)
        pool = AdapterPool(base.spec.shapes, adapter.nbytes, 1, like)
        pool.load(AdapterPlacement(form.digest, slot=0, address=0), adapter)  # touches its pages
        begin = time.perf_counter()
        pool.load(AdapterPlacement(form.digest, slot=0, address=0), adapter)
        times.append((packed - start, time.perf_counter() - begin))
    pack_s, load_s = (statistics.median(column) for column in zip(*times, strict=True))
    return pack_s, load_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    base = load_base(BaseConfig(model=args.base))
    with tempfile.TemporaryDirectory() as name:
        (lora,) = write_random_adapters(base, Path(name), [args.rank])
        dora = as_dora(lora, base, Path(name) / "dora")
        seconds_to_load(lora, base)
        first = seconds_to_load(dora, base)
        pairs = [
            (seconds_to_load(lora, base), seconds_to_load(dora, base)) for _ in range(args.repeats)
        ]
        pack_s, pool_s = seconds_to_pool(lora, base, args.repeats)
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    result = {
        **machine.facts(),
        "question": "seconds to load an all-linear adapter",
        "workload": vars(args),
        "dtype": base.spec.dtype,
        "lora_s": round(medians[0], 4),
        "dora_s": round(medians[1], 4),
        "first_dora_s": round(first, 4),
        "pack_s": round(pack_s, 4),
        "pool_load_s": round(pool_s, 4),
        "dora_over_lora": round(medians[1] / medians[0], 2),
        "first_dora_over_lora": round(first / medians[0], 2),
    }
    machine.save("loading", result)


if __name__ == "__main__":
    main()
