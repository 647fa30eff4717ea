"""How near does a GPU come to the bytes it must read? Checks first, then times, in stages.

    python -m bench.gpu kernels --out FOLDER      checks, ceilings, every kernel beside its bytes
    python -m bench.gpu engine --out FOLDER       decode steps, launches, the host's part, traces
    python -m bench.gpu serve --out FOLDER        whole requests beside PEFT and transformers
    python -m bench.gpu training --out FOLDER     updates beside PEFT

The base has Llama-3.1-8B's shape and random weights: nothing is downloaded. Every row of every
table is in FOLDER/rows.jsonl as soon as it is measured, one that fails costs only itself, and with
`--seconds 540` no row is begun after nine minutes. Ceilings are measured in the same run.

On a machine without a GPU it is a dry run of tiny sizes, which shows that everything runs and
measures nothing; with TRITON_INTERPRET=1 through Triton's interpreter, which `kernels` needs.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from bench import (
    gpu_engine,
    gpu_experts,
    gpu_kernels,
    gpu_peers,
    gpu_recurrent,
    gpu_training,
    machine,
)
from bench.gpu_rows import Recorder, Table
from bench.gpu_timing import DEVICE, HAS_GPU, IS_INTERPRETED, Ceilings
from lora_runtime.kernels import gpu

CANDIDATES: dict[str, Callable] = {
    "triton": lambda x, weight: weight.triton_product(x),
    "bitsandbytes": lambda x, weight: weight.bitsandbytes_product(x),
    "dequantised": lambda x, weight: weight.dequantised_product(x),
}
"""Ways to multiply by an NF4 weight."""
if HAS_GPU:  # the source needs a device to be compiled for
    CANDIDATES["cuda"] = lambda x, weight: weight.cuda_product(x)


def kernels_stage(folder: Path) -> Iterator[Table]:
    """Is everything right, and what share of its bytes' time does each kernel reach?"""
    for module in (gpu_kernels, gpu_recurrent, gpu_experts):
        yield Table("checks", module.check_cases, module.check)
    yield Table("ceilings", lambda: [{}], lambda: asdict(ceilings()))
    yield from gpu_kernels.product_tables(ceilings(), CANDIDATES)
    yield gpu_kernels.values_table(ceilings())
    yield gpu_kernels.adapter_table(ceilings())
    yield gpu_kernels.attention_table(ceilings())
    yield gpu_recurrent.recurrent_table(ceilings())
    yield gpu_experts.experts_table(ceilings())


def engine_stage(folder: Path) -> Iterator[Table]:
    """How long is a step, and where does its time go?"""
    yield Table("ceilings", lambda: [{}], lambda: asdict(ceilings()))
    yield gpu_engine.start_table()
    yield gpu_engine.decode_table(ceilings())
    yield gpu_engine.step_table(folder)
    yield gpu_engine.prefill_table()
    yield gpu_engine.latency_table()


def serve_stage(folder: Path) -> Iterator[Table]:
    """What do clients get, beside what else there is?"""
    yield Table("ceilings", lambda: [{}], lambda: asdict(ceilings()))
    yield gpu_engine.served_table()
    yield gpu_engine.graphs_table()
    yield gpu_engine.many_table()
    yield gpu_engine.memory_table()
    yield gpu_engine.formats_table(ceilings())
    yield gpu_peers.peers_table()


def training_stage(folder: Path) -> Iterator[Table]:
    """How fast is an update, and what memory does it take?"""
    yield gpu_training.training_table(folder)


STAGES: dict[str, Callable[[Path], Iterator[Table]]] = {
    "kernels": kernels_stage,
    "engine": engine_stage,
    "serve": serve_stage,
    "training": training_stage,
}
ceilings = cache(Ceilings.measured)


def facts() -> dict[str, object]:
    gpu_name = torch.cuda.get_device_name() if HAS_GPU else "none: a dry run, no figure counts"
    return {**machine.facts(), "gpu": gpu_name}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run stages; the number of rows that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", default=list(STAGES))
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder for rows, facts and traces"
    )
    parser.add_argument(
        "--seconds", type=float, default=3600,
        help="begin no further row after so many; one that is begun is finished (default: 3600)",
    )  # fmt: skip
    parser.add_argument("--only", nargs="*", help="names of tables; default: all of the stages")
    args = parser.parse_args(arguments)
    if not HAS_GPU:
        print("No GPU: a dry run of tiny sizes. No figure below means anything.")
        if "kernels" in args.stages and not IS_INTERPRETED and DEVICE.type not in gpu.DEVICES:
            parser.error("the stage kernels runs in the interpreter here: set TRITON_INTERPRET=1")
    if unknown := set(args.stages) - STAGES.keys():
        parser.error(f"no stage is called {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if IS_INTERPRETED:
        gpu.DEVICES.add(DEVICE.type)
    gc.freeze()  # what was imported stays: `release` need not look through it after every table
    recorder = Recorder(args.out, args.seconds, facts=facts())
    unknown = set(args.only or ())
    for stage in args.stages:
        for table in STAGES[stage](args.out):
            unknown.discard(table.name)
            if args.only is None or table.name in args.only:
                recorder.run(table)
        gpu_engine.release()
    if unknown:
        print(f"no table of these stages is called {', '.join(sorted(unknown))}")
    return recorder.num_failed + len(unknown)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
