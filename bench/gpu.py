"""How near does a GPU come to the bytes it must read? Checks first, then times, in one run.

The questions: are the kernels right on random data, with everything poisoned that they must not
read? Which share of its bytes' time does each reach? How long is a decode step of a base of
Llama-3.1-8B's shape, alone and with 4, 8 and 32 adapters, and a long prefill? Do 200 adapters cost
more than 5, and does loading one stall the others? How fast are transformers and PEFT on
bitsandbytes' 4-bit layers? Ceilings are measured in the same run. Random weights: nothing is
downloaded. Every part is written to the result file as soon as it is known.

On a machine without a GPU it is a dry run of tiny sizes through Triton's interpreter, which shows
that everything runs and measures nothing: TRITON_INTERPRET=1 python -m bench.gpu
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from bench import gpu_engine, gpu_kernels, gpu_peers, gpu_timing, machine
from bench.gpu_timing import DEVICE, HAS_GPU
from lora_runtime.config import EngineConfig
from lora_runtime.core import AdapterPlacement
from lora_runtime.engine.engine import Engine
from lora_runtime.kernels import gpu

ROWS, COUNTS = (32, (4, 8, 32)) if HAS_GPU else (3, (2,))
TOTAL, RESIDENT = (200, 64) if HAS_GPU else (4, 3)
AGAINST_PEERS = 8 if HAS_GPU else 2
"""Adapters of the mixed batch that PEFT is given too."""


def ceilings() -> dict[str, float]:
    return {
        "read_bytes_per_s": gpu_timing.read_bandwidth(),
        "copy_bytes_per_s": gpu_timing.copy_bandwidth(),
        "multiply_adds_per_s": gpu_timing.gemm_rate(),
    }


def decode(bandwidth: float) -> dict[str, object]:
    """Lines 2 to 4: decode steps of the base alone and mixed, whole requests, a long prefill."""
    base = gpu_engine.random_base("nf4")
    bench = gpu_engine.Bench.start(base, max(COUNTS), pool_adapters=max(COUNTS), max_rows=ROWS)
    steps = [bench.decode([None] * rows, bandwidth) for rows in (1, ROWS)]
    steps += [bench.decode([i % n for i in range(ROWS)], bandwidth) for n in COUNTS]
    prefill = {"base_s": bench.prefill(None), "adapter_s": bench.prefill(0)}
    served = {
        "base_tokens_per_s": bench.serve([None] * ROWS),
        "mixed_tokens_per_s": bench.serve([i % AGAINST_PEERS for i in range(ROWS)]),
    }
    return {"steps": steps, "prefill": prefill, "served": served, "quantization": "nf4"}


def formats(bandwidth: float) -> list[dict[str, object]]:
    """Line 3: NF4 beside int8 and bfloat16, up to 64 rows."""
    found = []
    for quantization in ("nf4", "int8", "none"):
        base = gpu_engine.random_base(quantization)
        bench = gpu_engine.Bench.start(base, 0, pool_adapters=1, max_rows=2 * ROWS)
        for rows in (1, ROWS, 2 * ROWS):
            step = bench.decode([None] * rows, bandwidth)
            found.append({"quantization": quantization, **step})
        del bench
        free()
    return found


def many_adapters() -> dict[str, object]:
    """Line 5: streams over 5 and over 200 adapters by Zipf's law, and how long steps and loads
    take. Names point to contents, so 1,000 names over these cost the same.
    """
    base = gpu_engine.random_base("nf4")
    bench = gpu_engine.Bench.start(base, TOTAL, pool_adapters=RESIDENT, max_rows=ROWS)
    runs = {}
    for count in (min(5, TOTAL), TOTAL):
        generator = random.Random(0)
        weights = [1 / (i + 1) for i in range(count)]
        bench.step_seconds.clear()
        for owner in generator.choices(range(count), weights, k=16 * ROWS if HAS_GPU else 5):
            bench.add(owner, 32 if HAS_GPU else 3, 32 if HAS_GPU else 2)
        speed = bench.finish()
        ordered = sorted(bench.step_seconds)
        runs[count] = {
            "tokens_per_s": speed,
            "step_median_ms": statistics.median(ordered) * 1e3,
            "step_p99_ms": ordered[int(0.99 * (len(ordered) - 1))] * 1e3,
        }
    return {"runs": runs, "load_ms": load_seconds(bench) * 1e3}


def load_seconds(bench: gpu_engine.Bench) -> float:
    """From the host copy of one adapter to the end of its copy on the device."""
    engine, digest = bench.engine, bench.digests[0]
    placement = AdapterPlacement(digest=digest, slot=0, address=0)
    load = partial(engine.pool.load, placement, engine.host[digest])
    return statistics.median(gpu_timing.timed(load) for _ in range(5))


def memory() -> dict[str, float]:
    """What the default settings find for keys and values, and what is left over."""
    engine = Engine(gpu_engine.random_base("nf4"), EngineConfig())
    free_bytes, total = torch.cuda.mem_get_info() if HAS_GPU else (0, 1)
    return {
        "kv_tokens": engine.info.num_blocks * engine.info.block_size,
        "free_share": free_bytes / total,
    }


def peers() -> dict[str, object]:
    model = gpu_peers.four_bit_model()
    plain = {rows: gpu_peers.tokens_per_second(model, rows) for rows in (1, ROWS)}
    adapted = gpu_peers.with_adapters(model, AGAINST_PEERS)
    mixed = gpu_peers.tokens_per_second(adapted, ROWS, AGAINST_PEERS)
    return {"transformers_tokens_per_s": plain, "peft_mixed_tokens_per_s": mixed}


def free() -> None:
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()


def show(name: str, found: object) -> None:
    """A table of a part's rows, or the part as it is."""
    rows = found if isinstance(found, list) else None
    console = Console()
    if not rows:
        console.print(f"[bold]{name}[/]", found)
        return
    table = Table(title=name)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


PARTS: dict[str, Callable[[dict[str, float]], object]] = {
    "checks": lambda limits: gpu_kernels.checks(),
    "products": lambda limits: gpu_kernels.product_times(limits["read_bytes_per_s"]),
    "adapters": lambda limits: gpu_kernels.adapter_times(limits["read_bytes_per_s"]),
    "attention": lambda limits: gpu_kernels.attention_times(
        limits["read_bytes_per_s"], limits["multiply_adds_per_s"]
    ),
    "decode": lambda limits: decode(limits["read_bytes_per_s"]),
    "many": lambda limits: many_adapters(),
    "memory": lambda limits: memory(),
    "formats": lambda limits: formats(limits["read_bytes_per_s"]),
    "peers": lambda limits: peers(),
}
"""In an order that makes the NF4 base once."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    gpu.DEVICES.add(DEVICE.type)
    limits = ceilings()
    result: dict[str, object] = {
        **machine.facts(),
        "question": "share of the byte floor of kernels and steps on a GPU",
        "gpu": torch.cuda.get_device_name() if HAS_GPU else "none: a dry run, no figure counts",
        "ceilings": limits,
    }
    for name in args.only:
        start = time.perf_counter()
        try:
            result[name] = PARTS[name](limits)
            show(name, result[name])
        except Exception:
            result[name] = {"failed": traceback.format_exc()}
            Console().print(result[name]["failed"])
        result[f"{name}_took_s"] = round(time.perf_counter() - start, 1)
        free()
        if HAS_GPU:
            machine.save("gpu", result)


if __name__ == "__main__":
    main()
