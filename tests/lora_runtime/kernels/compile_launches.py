"""Compile what a GPU would be asked to launch, for cards that need not be there.

    python -m tests.lora_runtime.kernels.compile_launches all            every launch, every card
    python -m tests.lora_runtime.kernels.compile_launches sample         some of every kernel
    python -m tests.lora_runtime.kernels.compile_launches while-serving  compiles after the warm-up

The first is `make test-gpu-compile`: the launches of serving, training, bench/gpu.py and of real
models' shapes, by gpu_drives.py. It takes long when nothing is known yet; results are kept in
--cache by the source of each kernel. test_gpu_compilation.py runs the others. Prints one JSON
object; status 1 when anything is wrong with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch
from triton.runtime import JITFunction

from lora_runtime import kernels
from tests.lora_runtime.kernels import gpu_drives
from tests.lora_runtime.kernels.fake_gpu import (
    CARDS,
    Card,
    Launch,
    Result,
    distinct,
    launches_on,
    result_of,
)
from tests.tiny import tiny_base

DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loramux-launches"


def launches_of(drive: str, card: Card) -> list[Launch]:
    """Every specialisation that a drive launches on a card."""
    with launches_on(card) as launches:
        gpu_drives.DRIVES[drive]()
    return distinct(launches)


def kernel_names() -> set[str]:
    """The kernels of the product: what is compiled by itself, and not called by a kernel alone."""
    modules = [f"lora_runtime.kernels.{m.name}" for m in iter_modules(kernels.__path__)]
    members = [vars(import_module(name)) for name in modules if "gpu" in name]
    functions = [m for own in members for m in own.values() if isinstance(m, JITFunction)]
    return {f.__name__ for f in functions if f.__name__.endswith("_kernel")}


def _is_bfloat16(launch: Launch) -> bool:
    return "*bf16" in launch.arguments.values()


def _tile_size(launch: Launch) -> int:
    sides = [n for name, n in launch.arguments.items() if name.startswith("BLOCK_")]
    return math.prod(sides)


def _num_ones(launch: Launch) -> int:
    """Integers that are constants because they are 1."""
    return sum(name.islower() and n == 1 for name, n in launch.arguments.items())


def largest(launches: Iterable[Launch]) -> Iterator[Launch]:
    """Of every kernel in either dtype the launch of the largest tile."""
    for own in _by_kernel(launches):
        yield max(own, key=_tile_size)


def smallest(launches: Iterable[Launch]) -> Iterator[Launch]:
    """Of each kernel the launch with most integers equal to 1, in bfloat16 where it has a dtype."""
    for own in _by_kernel(launches):
        if _is_bfloat16(own[0]) or own[0].kernel == "tiles_kernel":
            yield max(own, key=_num_ones)


def _by_kernel(launches: Iterable[Launch]) -> list[list[Launch]]:
    found: dict[tuple[str, bool], list[Launch]] = {}
    for launch in launches:
        found.setdefault((launch.kernel, _is_bfloat16(launch)), []).append(launch)
    return list(found.values())


def sample() -> list[Launch]:
    """The largest tiles on a card with little shared memory, and the smallest steps on another."""
    return [
        *largest(launches_of("sample", CARDS[89])),
        *smallest(launches_of("sample", CARDS[90])),
    ]


def everything(cards: Sequence[Card], jobs: int) -> list[Launch]:
    """Each drive in a process of its own: the benchmark's dry run changes how Triton works, and
    bitsandbytes keeps its tables on the device that asked first.
    """
    drives = [name for name in gpu_drives.DRIVES if name != "sample"]
    with _processes(jobs, tasks_each=1) as pool:
        found = pool.map(launches_of, *zip(*itertools.product(drives, cards), strict=True))
        return distinct([launch for own in found for launch in own])


def _processes(jobs: int, tasks_each: int | None = None) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=tasks_each)


def report(
    launches: Sequence[Launch], results: Iterable[Result], names: set[str]
) -> dict[str, object]:
    """How many launches of which kernels were compiled, and what is wrong with which of them."""
    found = zip(launches, results, strict=True)
    complaints = [(launch, r.complaint(CARDS[launch.arch])) for launch, r in found]
    return {
        "launches": len(launches),
        "kernels": sorted({launch.kernel for launch in launches}),
        "never_launched": sorted(names - {launch.kernel for launch in launches}),
        "complaints": [
            f"{launch.kernel} on sm_{launch.arch}: {said}: {launch}"
            for launch, said in complaints
            if said is not None
        ],
    }


def while_serving() -> dict[str, object]:
    """What an engine compiles after its warm-up, under rows, lengths and adapters that change."""
    base = tiny_base("llama-bias", dtype=torch.bfloat16, dequantized_cache=False)
    with launches_on(CARDS[90]) as launches, gpu_drives.as_on_cuda():
        forms = gpu_drives.forms_of(base)
        serving = gpu_drives.cuda_engine(base, forms)
        serving.runner.warm_up(lambda _: None)
        known = {launch.specialization for launch in launches}
        num_warm = len(launches)
        gpu_drives.varied_load(serving, forms)
    late = [launch for launch in distinct(launches) if launch.specialization not in known]
    return {
        "warm_launches": num_warm,
        "launches": len(launches) - num_warm,
        "complaints": [f"{launch.kernel}: {launch}" for launch in late],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("all", "sample", "while-serving"))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--cards", nargs="*", type=int, choices=CARDS, default=list(CARDS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # Triton's own: large, and of no use afterwards
        os.environ["TRITON_CACHE_DIR"] = folder
        found = _run(args.what, args.cache, [CARDS[arch] for arch in args.cards], args.jobs)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["complaints"] or found.get("never_launched")))


def _run(what: str, cache: Path, cards: Sequence[Card], jobs: int) -> dict[str, object]:
    if what == "while-serving":
        return while_serving()
    compile_one: Callable[[Launch], Result] = partial(result_of, cache=cache)
    if what == "sample":
        launches = sample()
        return report(launches, map(compile_one, launches), kernel_names())
    launches = everything(cards, jobs)
    with _processes(jobs) as pool:
        return report(launches, pool.map(compile_one, launches, chunksize=8), kernel_names())


if __name__ == "__main__":
    main()
