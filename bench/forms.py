"""What does each form of the base give and cost on a CPU: tokens a second of one stream and of 32,
and memory?

Forms are the quantizations in bfloat16, where the processor multiplies it, and in float32, there
with a dequantised copy of the weights and without. Each is held by a process of its own, so that
its memory is its own; they take turns in an order drawn anew each round. Streams are requests of 90
prompt and 64 new tokens on the base alone, prompts included in the time; figures are medians over
the rounds. Memory of the base is what is resident after it was loaded and was not before, 25 to 35
MiB of libraries at their first use among it; of the engine, what is so after the rounds: the base
and what the batches have touched of the cache and of buffers.

It takes about ten minutes on two cores and up to 10 GB of memory: --forms and --dtypes choose.
What was measured and the time left are printed as it goes; the result, which is JSON and the last
line printed, is written after every round, and Ctrl-C ends with the rounds that are whole.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import signal
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import psutil
from rich.console import Console
from rich.table import Table

from bench import machine, turns
from bench.serving_load import BASE, Batch
from bench.serving_sides import Ours
from bench.turns import Turn, say
from lora_runtime.base.device import resolve_device, resolve_dtype
from lora_runtime.base.loader import load_base
from lora_runtime.config import BaseConfig, DtypeName, Quantization

STREAMS = (1, 32)
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
LIBRARIES = ("bitsandbytes", "transformers.models.llama.modeling_llama")
DTYPES: tuple[DtypeName, ...] = ("bfloat16", "float32")


@dataclass(frozen=True)
class Form:
    """One way to hold the base."""

    quantization: Quantization
    dtype: DtypeName
    has_copy: bool
    """A dequantised one beside the codes: in float32 alone."""

    def __str__(self) -> str:
        return f"{self.quantization}, {self.dtype}" + ", with a copy" * self.has_copy


def forms(quantizations: list[Quantization], dtypes: list[DtypeName]) -> list[Form]:
    """Every form there is of these."""
    found = []
    for dtype in dtypes:
        for quantization in quantizations:
            if dtype == "float32" and quantization != "none":
                found.append(Form(quantization, dtype, has_copy=True))
            found.append(Form(quantization, dtype, has_copy=False))
    return found


@dataclass(frozen=True)
class Held:
    """A form in the process that holds it."""

    engine: Ours
    vocab_size: int
    bytes_before: int
    """Resident before the base was loaded."""
    bytes_loaded: int
    """And after."""


@functools.cache
def held(form: Form, model: str) -> Held:
    """Loaded at the first call."""
    before = resident()
    base = load_base(
        BaseConfig(
            model=model, device="cpu", quantization=form.quantization, dtype=form.dtype,
            dequantized_cache=form.has_copy,
        )
    )  # fmt: skip
    loaded = resident()
    return Held(Ours(base, []), base.spec.vocab_size, before, loaded)


def load(form: Form, args: argparse.Namespace) -> None:
    """Into the process of the form, before anything is measured."""
    held(form, args.base)


def seconds(form: Form, args: argparse.Namespace, num_rows: int) -> float:
    """Of a batch, in the process of the form."""
    holder = held(form, args.base)
    batch = Batch(BASE, num_rows, args.prompt_tokens, args.new_tokens, holder.vocab_size)
    return holder.engine.run(batch)


def memory(form: Form, args: argparse.Namespace) -> dict[str, int]:
    """Resident bytes, in the process of the form, beside those of libraries."""
    now, holder = resident(), held(form, args.base)
    before = holder.bytes_before
    return {"base": holder.bytes_loaded - before, "engine": now - before}


def resident() -> int:
    """Bytes of this process."""
    return psutil.Process().memory_info().rss


def import_libraries() -> None:
    """In each process first: a load would import them, and they are not the base's memory."""
    for name in LIBRARIES:
        importlib.import_module(name)


@contextlib.contextmanager
def processes(chosen: list[Form]) -> Iterator[dict[Form, ProcessPoolExecutor]]:
    """One for each form. Ctrl-C, which a terminal sends to all of them, is for this one."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        workers = {form: stack.enter_context(ProcessPoolExecutor(1, context)) for form in chosen}
        for worker in workers.values():
            heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a new process inherits it
            try:
                started = worker.submit(import_libraries)
            finally:
                signal.signal(signal.SIGINT, heard)
            started.result()
        yield workers


def turn(form: Form, num_rows: int, process: ProcessPoolExecutor, args: argparse.Namespace) -> Turn:
    step_ms, row_ms = Ours.step_ms
    num_tokens = num_rows * args.new_tokens
    times = 2 if form.dtype == "float32" else 1
    return Turn(
        label=f"{form}, {num_rows} at once",
        run=lambda: process.submit(seconds, form, args, num_rows).result(),
        figure=lambda found: f"{num_tokens / found:.0f} tokens/s",
        expected_s=times * args.new_tokens * (step_ms + row_ms * num_rows) / 1000,
    )


def summary(
    rounds: list[dict[tuple[Form, int], float]], memories: dict[Form, dict[str, int]],
    args: argparse.Namespace,
) -> dict[str, object]:  # fmt: skip
    """Of the rounds so far; `seconds` has one value of each."""
    return {
        "rounds": len(rounds),
        "forms": [
            {
                "quantization": form.quantization,
                "dtype": form.dtype,
                "dequantized_copy": form.has_copy,
                "resident_bytes": memories[form],
                "streams": [
                    {
                        "streams": num_rows,
                        "tokens_per_s": round(
                            num_rows * args.new_tokens / _median(rounds, form, num_rows), 1
                        ),
                        "seconds": [round(found[form, num_rows], 6) for found in rounds],
                    }
                    for num_rows in STREAMS
                ],
            }
            for form in memories
        ],
    }


def _median(rounds: list[dict[tuple[Form, int], float]], form: Form, num_rows: int) -> float:
    return statistics.median(found[form, num_rows] for found in rounds)


def show(result: dict, console: Console) -> None:
    """A row for every form."""
    table = Table("form", "dtype", "1 stream", "32 streams", "base, MiB", "engine, MiB")
    table.title = f"output tokens/s and resident memory, medians of {result['rounds']} round(s)"
    for row in result["forms"]:
        table.add_row(
            row["quantization"] + " with a copy" * row["dequantized_copy"], row["dtype"],
            *(f"{each['tokens_per_s']:.0f}" for each in row["streams"]),
            *(f"{row['resident_bytes'][name] / 2**20:,.0f}" for name in ("base", "engine")),
        )  # fmt: skip
    console.print(table)


def measure(
    chosen: list[Form], args: argparse.Namespace, facts: dict[str, object], path: Path,
    console: Console,
) -> None:  # fmt: skip
    """Write the result so far after every round."""
    say(console, f"starting {len(chosen)} processes")
    with processes(chosen) as workers:
        for form in chosen:
            workers[form].submit(load, form, args).result()
            say(console, f"loaded: {form}")
        work = {
            (form, num_rows): turn(form, num_rows, workers[form], args)
            for form in chosen
            for num_rows in STREAMS
        }
        found = []
        for each in turns.rounds(work, args.rounds, console):
            found.append(each)
            memories = {form: workers[form].submit(memory, form, args).result() for form in chosen}
            machine.keep({**facts, **summary(found, memories, args)}, path)


def parsed() -> argparse.Namespace:
    is_fast = resolve_dtype("auto", resolve_device("cpu")).itemsize == 2
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--forms", nargs="+", choices=QUANTIZATIONS, default=[*QUANTIZATIONS])
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES[0 if is_fast else 1 :]],
        help="default here: %(default)s",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=90)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is wanted")
    return args


def main() -> None:
    args, console = parsed(), Console(stderr=True)
    facts = {
        **machine.facts(),
        "question": "output tokens a second and memory of each form of the base",
        "workload": {name: value for name, value in vars(args).items() if name != "out"},
    }
    path = machine.result_file("forms", facts["date"], args.out)
    with turns.kept(path, console):
        measure(forms(args.forms, args.dtypes), args, facts, path, console)
    result = json.loads(path.read_text())
    show(result, console)
    print(json.dumps(result))
    if result["rounds"] < args.rounds:
        raise SystemExit(turns.INTERRUPTED)


if __name__ == "__main__":
    main()
