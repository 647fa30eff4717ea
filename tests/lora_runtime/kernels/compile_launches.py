"""Compile what a GPU would be asked to launch, for cards that need not be there.

    python -m tests.lora_runtime.kernels.compile_launches all            every launch, every card
    python -m tests.lora_runtime.kernels.compile_launches quick          what make test asks

The first is `make test-gpu-compile`: the launches of serving, training, bench/gpu.py and of real
models' shapes, by gpu_drives.py. It takes long when nothing is known yet; results are kept in
--cache by the source of each kernel. The second is test_gpu_compilation.py's: one launch of every
kernel, and what is compiled after the warm-up. Prints one JSON object of both, or of all launches;
status 1 when anything is wrong with it.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch
from triton.runtime import JITFunction

from lora_runtime.engine.probe import probe_logits
from lora_runtime.kernels import triton as triton_kernels
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
    modules = iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}.")
    members = [vars(import_module(module.name)) for module in modules]
    functions = [m for own in members for m in own.values() if isinstance(m, JITFunction)]
    return {f.__name__ for f in functions if f.__name__.endswith("_kernel")}


def _is_bfloat16(launch: Launch) -> bool:
    return "*bf16" in launch.arguments.values()


def _tile_size(launch: Launch) -> tuple[int, int]:
    """Of equal tiles the one with more switched on: splits, biases, windows."""
    numbers = {name: n for name, n in launch.arguments.items() if isinstance(n, int)}
    sides = [n for name, n in numbers.items() if name.startswith("BLOCK_")]
    return math.prod(sides), sum(n for name, n in numbers.items() if name.isupper())


def sample() -> list[Launch]:
    """Of every kernel the largest tile on a card with little shared memory, in bfloat16 where the
    kernel has a dtype. Float32, small steps and other cards: `make test-gpu-compile`.
    """
    by_kernel: dict[str, list[Launch]] = {}
    for launch in launches_of("sample", CARDS[89]):
        by_kernel.setdefault(launch.kernel, []).append(launch)
    return [
        max(own, key=lambda one: (_is_bfloat16(one), _tile_size(one))) for own in by_kernel.values()
    ]


def everything(cards: Sequence[Card], jobs: int) -> list[Launch]:
    """Each drive in a process of its own: the benchmark's dry run changes how Triton works, and
    bitsandbytes keeps its tables on the device that asked first.
    """
    drives = [name for name in gpu_drives.DRIVES if name != "sample"]
    # Not ProcessPoolExecutor, which may wait for ever when its processes end after a task each.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        found = pool.starmap(launches_of, itertools.product(drives, cards), chunksize=1)
    return distinct([launch for own in found for launch in own])


def _processes(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


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
    """What is compiled after the warm-up, under rows, lengths and adapters that change: of tiny
    engines in all their ways, and of steps of real models' shapes.
    """
    late, num_launches = [], 0
    for shape in ("llama-bias", "qwen3.5", "qwen3-moe"):
        tiny = tiny_base(shape, dtype=torch.bfloat16, dequantized_cache=False)
        with launches_on(CARDS[90]) as launches, gpu_drives.as_on_cuda():
            forms = gpu_drives.forms_of(tiny)
            serving = gpu_drives.cuda_engine(tiny, forms)
            serving.runner.warm_up(lambda _: None)
            num_warm = len(distinct(launches))
            gpu_drives.varied_load(serving, forms)
            for form in (None, *forms):  # a parity gate, of every kind of adapter
                probe_logits(tiny, form, [range(64), range(64)])
        late += _late(launches, num_warm)
        num_launches += len(launches)
    for shape in (gpu_drives.LLAMA, "granite-4-h-micro", "qwen3-30b-a3b"):
        with launches_on(CARDS[90]) as launches:
            base = gpu_drives.sizeless_base(shape, torch.bfloat16)
            runner = gpu_drives.sizeless_runner(base, max_vocabulary_rows=64)
            gpu_drives.graphs_of(runner)
            num_warm = len(distinct(launches))
            gpu_drives.steps_of(runner)
        late += _late(launches, num_warm)
        num_launches += len(launches)
    return {"launches": num_launches, "complaints": late}


def _late(launches: list[Launch], num_warm: int) -> list[str]:
    """What is new in the specialisations after the first `num_warm`."""
    known, late = distinct(launches)[:num_warm], distinct(launches)[num_warm:]
    return [f"{launch.kernel}: {_what_is_new(launch, known)}" for launch in late]


def _what_is_new(launch: Launch, known: Sequence[Launch]) -> str:
    """In which arguments a launch differs from the nearest known one of its kernel."""
    own = launch.kinds.items()
    others = [one.kinds.items() for one in known if one.kernel == launch.kernel]
    if not others:
        return "not launched before"
    nearest = min(others, key=lambda other: len(own - other))
    news = ", ".join(f"{name}={value}" for name, value in own if (name, value) not in nearest)
    return f"{news} instead of {', '.join(f'{n}={v}' for n, v in nearest - own)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("all", "quick"))
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help=f"kept results (default: {DEFAULT_CACHE})"
    )
    parser.add_argument(
        "--cards", nargs="*", type=int, choices=CARDS, default=list(CARDS),
        help="compute capabilities, times ten (default: all)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all)")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:  # Triton's own: large, and of no use afterwards
        os.environ["TRITON_CACHE_DIR"] = folder
        found = _run(args.what, args.cache, [CARDS[arch] for arch in args.cards], args.jobs)
    print(json.dumps(found, indent=1))
    parts = found.values() if args.what == "quick" else [found]
    sys.exit(any(part["complaints"] or part.get("never_launched") for part in parts))


def quick(cache: Path) -> dict[str, dict[str, object]]:
    """The reports on what serves, and on a sample; in this order, because bitsandbytes keeps its
    tables on the device that asked first, and a tiny model reads them.
    """
    late = while_serving()
    launches = sample()
    results = [result_of(launch, cache) for launch in launches]
    return {"while serving": late, "sample": report(launches, results, kernel_names())}


def _run(what: str, cache: Path, cards: Sequence[Card], jobs: int) -> dict[str, object]:
    if what == "quick":
        return quick(cache)
    launches = everything(cards, jobs)
    compile_one: Callable[[Launch], Result] = partial(result_of, cache=cache)
    with _processes(jobs) as pool:
        return report(launches, pool.map(compile_one, launches, chunksize=8), kernel_names())


if __name__ == "__main__":
    main()
