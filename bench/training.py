"""How fast is training beside peft and transformers' Trainer, and four adapters at once beside one
after another?

Both sides train the same adapter from the same start on the same examples, in processes of their
own that take turns: ours on an unquantised base and on NF4, theirs on the unquantised one in the
fastest of three layouts (padded, grouped by length, packed) × three micro-batch sizes, without
activation checkpointing. Tokens are input tokens without padding. Equal held-out loss after the
same updates shows that both learn the same.

--data is a CSV file with a text and a label column; every row is a chat under one system prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench import labelled, machine
from bench.training_sides import Ours, Side, Task, Theirs
from lora_runtime.base.device import dtype_name, resolve_device, resolve_dtype
from lora_runtime.training.config import UnitConfig

LAYOUTS = ("padded", "grouped", "packed")
KINDS = {"LoRA": {}, "DoRA": {"use_dora": True}}
SCREENING_UPDATES = 2
INSTRUCTION = "Which intent has this message to a bank? Answer with its name only."


def chats(rows: list[tuple[str, str]]) -> list[dict]:
    """Texts as a user's messages, labels as their answers."""
    return [
        {
            "messages": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in rows
    ]


def write(path: Path, rows: list[dict]) -> Path:
    """As JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def speed(updates: list[tuple[int, float]]) -> float:
    """Median tokens per second."""
    return median(tokens / seconds for tokens, seconds in updates)


def screen(task: Task, args: argparse.Namespace, console: Console) -> tuple[Theirs, dict]:
    """The peer's fastest setting, and the speeds of all, each of its second update."""
    found: dict[Theirs, float] = {}
    for layout, size in product(args.peer_layouts, args.peer_sizes):
        kind = Theirs(layout, size)
        with Side(task, kind, args.threads) as side:
            found[kind] = speed([side.update() for _ in range(SCREENING_UPDATES)][1:])
        console.print(f"  peer, {layout}, {size} examples: {found[kind]:.0f} tokens/s")
    best = max(found, key=lambda kind: found[kind])
    return best, {f"{kind.layout} {kind.micro_batch_size}": s for kind, s in found.items()}


def compare(task: Task, args: argparse.Namespace, console: Console) -> dict:
    """Peer and ours in turns; the first update of each is not timed."""
    best, screened = screen(task, args, console)
    with ExitStack() as stack:
        kinds = {"peer": best, "ours": Ours("none"), "ours, NF4": Ours("nf4")}
        sides = {
            name: stack.enter_context(Side(task, kind, args.threads))
            for name, kind in kinds.items()
        }
        updates: dict[str, list] = {name: [] for name in sides}
        for _ in range(task.num_updates):
            for name, side in sides.items():
                updates[name].append(side.update())
        result = {
            name: {
                "tokens_per_s": speed(updates[name][1:]),
                "held_out_loss": side.loss(),
                "resident_bytes": side.memory(),
            }
            for name, side in sides.items()
        }
    ratios = {
        name: median(
            (ours[0] / ours[1]) / (theirs[0] / theirs[1])
            for ours, theirs in zip(updates[name][1:], updates["peer"][1:], strict=True)
        )
        for name in result
    }
    for name, values in result.items():
        values["times_peer"] = ratios[name]
        values["loss_over_peer"] = values["held_out_loss"] / result["peer"]["held_out_loss"]
    return {"peer_setting": asdict(best), "peer_screened": screened, **result}


def together(task: Task, args: argparse.Namespace) -> dict:
    """Four units in one process beside one: the four one after another have the speed of one."""
    alone = replace(task, units=task.units[:1])
    with (
        Side(task, Ours("nf4"), args.threads) as four,
        Side(alone, Ours("nf4"), args.threads) as one,
    ):
        pairs = [(four.update(), one.update()) for _ in range(args.updates)][1:]
    return {
        "four_tokens_per_s": speed([four for four, _ in pairs]),
        "one_tokens_per_s": speed([one for _, one in pairs]),
        "ratio": median((f[0] / f[1]) / (o[0] / o[1]) for f, o in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    labelled.add_arguments(parser)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="examples in an update")
    parser.add_argument("--peer-layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--peer-sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--unit-batch", type=int, default=4, help="of each of four units")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the sides take turns
    dtype = resolve_dtype(args.dtype, resolve_device("cpu"))  # the same for both sides
    args.dtype = dtype_name(dtype)
    console, result = Console(stderr=True), {}
    with tempfile.TemporaryDirectory() as folder:
        rows = chats(labelled.read(args))
        held_out = write(Path(folder) / "held-out.jsonl", rows[: args.held_out])
        count = 4 * args.batch * args.updates
        parts = [
            write(Path(folder) / f"{i}.jsonl", rows[args.held_out :][i * count : (i + 1) * count])
            for i in range(4)
        ]
        plain = UnitConfig(
            name="unit", data=parts[0], learning_rate=1e-3, schedule="constant", warmup=0,
            rank=16, alpha=32.0, micro_batch_size=args.batch,
        )  # fmt: skip
        for kind in args.kinds:
            console.print(kind)
            unit = replace(plain, **KINDS[kind])
            task = Task(args.base, args.dtype, (unit,), held_out, args.updates)
            result[kind] = compare(task, args, console)
        small = replace(plain, micro_batch_size=args.unit_batch)
        four = tuple(replace(small, name=f"unit{i}", data=parts[i]) for i in range(4))
        result["four units at once"] = together(
            Task(args.base, args.dtype, four, held_out, args.updates), args
        )
    show(result, console)
    machine.save(
        "training",
        {
            **machine.facts(),
            "question": __doc__.splitlines()[0],
            "workload": {**vars(args), "data": args.data.name},
            **result,
        },
    )


def show(result: dict, console: Console) -> None:
    """The tables, for people."""
    for kind in KINDS.keys() & result.keys():
        table = Table(kind, "tokens/s", "× peer", "held-out loss", "÷ peer's", "peak memory")
        for name in ("peer", "ours", "ours, NF4"):
            row = result[kind][name]
            table.add_row(
                name, f"{row['tokens_per_s']:.0f}", f"{row['times_peer']:.2f}",
                f"{row['held_out_loss']:.4f}", f"{row['loss_over_peer']:.4f}",
                f"{row['resident_bytes']['peak'] / 2**30:.2f} GiB",
            )  # fmt: skip
        console.print(table)
    console.print(f"four units at once: {result['four units at once']['ratio']:.2f} × one")


if __name__ == "__main__":
    main()
