"""Does the parity gate let every honest adapter in, and does it notice a changed tensor?

Every variant is trained for a few updates on every base, all in one run, in the dtype the machine
chooses, and goes through the gate in that dtype and in float32; then again with one tensor (a
module's B or rows in the middle of the model) and with every such tensor 10 % larger. The last
columns are what the numbers alone say of the changed ones; a record also names its file's SHA-256,
by which every one of them is refused.

--data is JSONL with `prompt` and `completion`; --base can be given several times.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import machine
from lora_runtime.adapters.files.folder import read_adapter, write_adapter
from lora_runtime.adapters.files.parity_record import read_parity_record
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.parity import Parity, ParityRecord, compare, forwards
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.loader import Base, load_base
from lora_runtime.config import BaseConfig
from lora_runtime.engine.probe import adapter_logits
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.trainer import train_units

VARIANTS: dict[str, dict] = {
    "lora": {},
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "pissa": {"variant": "pissa_niter_8"},
    "olora": {"variant": "olora"},
    "loftq": {"variant": "loftq"},
    "qera": {"variant": "qera"},
    "pissa-dora-rslora": {"variant": "rslora", "use_dora": True, "init": "pissa_niter_8"},
    "bfloat16-file": {"variant": "dora", "adapter_dtype": "bfloat16"},
    "vocabulary": {"target_modules": ("q_proj", "down_proj", "embed_tokens")},
    "tokens": {"trainable_token_indices": (1, 5, 20), "target_modules": ("v_proj",)},
    "saved-head": {"modules_to_save": ("lm_head",), "target_modules": ("o_proj",)},
}
CHANGE = 1.1


def variants_on(base: Base) -> dict[str, dict]:
    """VARIANTS, and the two layers in the middle run twice."""
    end = base.spec.num_layers
    return {
        **VARIANTS,
        "replicated": {"layer_replication": ((0, end // 2 + 1), (end // 2 - 1, end))},
    }


def train_all(base: Base, args: argparse.Namespace, output: Path) -> dict[str, Path]:
    units = tuple(
        UnitConfig(
            name=name, data=args.data, rank=8, max_steps=args.updates, warmup=0.0,
            micro_batch_size=2, **settings,
        )
        for name, settings in variants_on(base).items()
        if not args.variants or name in args.variants
    )  # fmt: skip
    config = TrainConfig(output=output, units=units, max_seq_len=args.max_seq_len)
    results = train_units(base, Tokenizer.load(base.folder), config, Console(stderr=True))
    return {result.name: result.folder for result in results if result.folder is not None}


def checked(base: Base, folder: Path, record: ParityRecord) -> tuple[Parity, float]:
    """The gate's numbers, and the longest of the forwards in seconds."""
    form = load_adapter(folder, base.spec, base.weights)
    logits, longest = [], 0.0
    for forward in forwards(record, adapter_logits(base, pack_for(base, form))):
        begun = time.perf_counter()
        logits.append(forward())
        longest = max(longest, time.perf_counter() - begun)
    return compare(record, logits, base.spec.dtype), longest


def changed(folder: Path, out: Path, *, everywhere: bool) -> Path:
    """A copy of an adapter of which one tensor, or every one of its kind, is larger."""
    files = read_adapter(folder)
    names = sorted(name for name in files.tensors if "lora_A" not in name)
    kept = [name for name in names if "lora_B" in name or "trainable_tokens" in name] or names
    chosen = kept if everywhere else [kept[len(kept) // 2]]
    tensors = {n: t * CHANGE if n in chosen else t for n, t in files.tensors.items()}
    write_adapter(out, files.config, tensors, files.metadata)
    return out


def rows_of(base: Base, folders: dict[str, Path], scratch: Path) -> list[dict]:
    table = []
    for name, folder in folders.items():
        record = read_parity_record(folder, base.spec)
        assert record is not None and record.noise is not None
        honest, seconds = checked(base, folder, record)
        row = {
            "base": base.spec.name, "variant": name, "dtype": base.spec.dtype,
            "effect": honest.effect_rms, "noise": record.noise, "limit": honest.limit,
            "error": honest.error, "passed": honest.passed, "longest_forward_s": seconds,
        }  # fmt: skip
        for kind, everywhere in (("one", False), ("all", True)):
            other = changed(folder, scratch / f"{name}-{kind}", everywhere=everywhere)
            row[f"error_{kind}_changed"] = checked(base, other, record)[0].error
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--max-seq-len", type=int, default=256)
    parser.add_argument("--variants", nargs="+", default=[], help="default: all")
    parser.add_argument("--result", default="parity")
    args = parser.parse_args()
    begun, table = time.monotonic(), []
    for model in args.base:
        config = BaseConfig(model=model)
        with tempfile.TemporaryDirectory() as name:
            base = load_base(config)
            folders = train_all(base, args, Path(name) / "run")
            table += rows_of(base, folders, Path(name))
            if base.spec.dtype != "float32":
                del base
                gc.collect()
                base = load_base(replace(config, dtype="float32"))
                table += rows_of(base, folders, Path(name))
        show(table)
    result = {
        **machine.facts(),
        "question": "does the parity gate let every honest adapter in, and notice a changed tensor",
        "workload": {
            **vars(args),
            "data": args.data.name,
            "base": [Path(b).name for b in args.base],
        },
        "table": table,
        "seconds": round(time.monotonic() - begun, 1),
    }
    machine.save(args.result, result)


def show(table: list[dict]) -> None:
    """The table, for people."""
    names = ("effect", "noise", "limit", "error", "error_one_changed", "error_all_changed")
    shown = Table("base", "variant", "dtype", *names, "passed", "forward, s")
    for row in table:
        numbers = [f"{row[name]:.3g}" for name in names]
        facts = [row["base"], row["variant"], row["dtype"], *numbers, str(row["passed"])]
        shown.add_row(*facts, f"{row['longest_forward_s']:.2f}")
    Console(stderr=True, width=160).print(shown)


if __name__ == "__main__":
    main()
