"""How fast is training beside peft and transformers' Trainer, and four adapters at once beside one
after another, and in bfloat16 beside float32?

Both sides train the same adapter from the same start on the same examples, in processes of their
own that take turns: ours on an unquantised base and on NF4, theirs on the unquantised one in the
fastest of three layouts (padded, grouped by length, packed) × three micro-batch sizes, without
activation checkpointing. Tokens are input tokens without padding. Equal held-out loss after the
same updates shows that both learn the same; grouped by length the peer takes the examples in
another order, and then the losses are not compared. Four adapters beside one, and bfloat16 beside
float32 (where the processor multiplies bfloat16), are ours alone, on NF4.

All three parts take about 25 minutes on two cores, a quarter of an hour without DoRA; --parts
chooses. The result, JSON and the last line printed, is written after each part.

--data is a CSV file with a text and a label column; every row is a chat under one system prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench import labelled, machine
from bench.training_sides import Ours, Side, Task, Theirs
from bench.turns import say
from lora_runtime.base.device import dtype_name, resolve_device, resolve_dtype
from lora_runtime.training.config import UnitConfig

LAYOUTS = ("padded", "grouped", "packed")
PEER, TOGETHER, DTYPES = PARTS = "peer", "together", "dtypes"
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
        for number in range(task.num_updates):
            for name, side in sides.items():
                updates[name].append(side.update())
            told = (f"{name} {speed(all_of[-1:]):.0f}" for name, all_of in updates.items())
            console.print(
                f"  update {number + 1} of {task.num_updates}: {', '.join(told)} tokens/s"
            )
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
        values["loss_over_peer"] = (
            None if best.layout == "grouped"  # another order of examples
            else values["held_out_loss"] / result["peer"]["held_out_loss"]
        )  # fmt: skip
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


def dtypes(task: Task, args: argparse.Namespace) -> dict:
    """The same unit in both dtypes, by turns; the first update of each is not timed."""
    names = "bfloat16", "float32"
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Side(replace(task, dtype=name), Ours("nf4"), args.threads))
            for name in names
        ]
        pairs = [[side.update() for side in sides] for _ in range(args.updates)][1:]
        losses = [side.loss() for side in sides]
    ratios = ((b[0] / b[1]) / (f[0] / f[1]) for b, f in pairs)
    found = {
        name: {"tokens_per_s": speed(list(updates)), "held_out_loss": loss}
        for name, updates, loss in zip(names, zip(*pairs, strict=True), losses, strict=True)
    }
    return {**found, "ratio": median(ratios)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    labelled.add_arguments(parser)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="default: all that this processor has"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="examples in an update")
    parser.add_argument("--peer-layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--peer-sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--unit-batch", type=int, default=4, help="of each of four units")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    args = parser.parse_args()
    if args.updates < 2:
        parser.error(f"--updates {args.updates}: at least 2 are wanted, the first is not timed")
    dtype = resolve_dtype(args.dtype, resolve_device("cpu"))  # the same for both sides
    args.dtype = dtype_name(dtype)
    if args.dtype == "float32" and DTYPES in (args.parts or ()):
        parser.error("--parts dtypes: the dtype is float32, where bfloat16 is wanted beside it")
    args.parts = args.parts or [p for p in PARTS if (p, args.dtype) != (DTYPES, "float32")]
    return args


def parts(args: argparse.Namespace, folder: Path, console: Console) -> Iterator[dict]:
    """Each part's result as it is found."""
    rows = chats(labelled.read(args))
    held_out = write(folder / "held-out.jsonl", rows[: args.held_out])
    count = 4 * args.batch * args.updates
    data = [
        write(folder / f"{i}.jsonl", rows[args.held_out :][i * count : (i + 1) * count])
        for i in range(4)
    ]
    plain = UnitConfig(
        name="unit", data=data[0], learning_rate=1e-3, schedule="constant", warmup=0,
        rank=16, alpha=32.0, micro_batch_size=args.batch,
    )  # fmt: skip
    task = Task(args.base, args.dtype, (plain,), held_out, args.updates)
    if DTYPES in args.parts:
        console.print("bfloat16 beside float32")
        yield {"bfloat16 beside float32": dtypes(task, args)}
    if TOGETHER in args.parts:
        console.print("four units beside one")
        small = replace(plain, micro_batch_size=args.unit_batch)
        four = tuple(replace(small, name=f"unit{i}", data=data[i]) for i in range(4))
        yield {"four units at once": together(replace(task, units=four), args)}
    for kind in args.kinds if PEER in args.parts else ():
        console.print(kind)
        yield {kind: compare(replace(task, units=(replace(plain, **KINDS[kind]),)), args, console)}


def main() -> None:
    args = parsed()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the sides take turns
    console = Console(stderr=True)
    result = {
        **machine.facts(),
        "question": __doc__.partition("\n\n")[0].replace("\n", " "),
        "workload": {
            **{name: value for name, value in vars(args).items() if name != "out"},
            "data": args.data.name,
        },
    }
    path = machine.result_file("training", result["date"], args.out)
    with tempfile.TemporaryDirectory() as folder:
        for found in parts(args, Path(folder), console):
            result |= found
            machine.keep(result, path)
            say(console, f"in {path}: {', '.join(found)}")
    show(result, console)
    print(json.dumps(result))


def show(result: dict, console: Console) -> None:
    """The tables, for people."""
    for kind in KINDS.keys() & result.keys():
        table = Table(kind, "tokens/s", "× peer", "held-out loss", "÷ peer's", "peak memory")
        for name in ("peer", "ours", "ours, NF4"):
            row = result[kind][name]
            table.add_row(
                name, f"{row['tokens_per_s']:.0f}", f"{row['times_peer']:.2f}",
                f"{row['held_out_loss']:.4f}",
                "not comparable" if row["loss_over_peer"] is None
                else f"{row['loss_over_peer']:.4f}",
                f"{row['resident_bytes']['peak'] / 2**30:.2f} GiB",
            )  # fmt: skip
        console.print(table)
    for part, other in (("four units at once", "one"), ("bfloat16 beside float32", "float32")):
        if part in result:
            console.print(f"{part}: {result[part]['ratio']:.2f} × {other}")


if __name__ == "__main__":
    main()
