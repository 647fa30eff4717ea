"""Which kind of adapter learns a classification best from a few thousand tokens?

Every kind at every learning rate is a unit of one training run: one forward of the base serves all
of them. The rate is chosen on validation rows and reported on test rows that no choice has seen.
Accuracy is of the greedy answer from the engine, loss in nats per answer token.

--data is a CSV file with a text and a label column.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import labelled, machine
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.adapters.serving_form import ServingForm
from lora_runtime.base.loader import Base, load_base
from lora_runtime.config import AdapterConfig, BaseConfig, EngineConfig
from lora_runtime.core import AdapterUse, Request, SamplingParams
from lora_runtime.engine.engine import Engine
from lora_runtime.engine.probe import probe_logits
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.trainer import train_units

KINDS: dict[str, dict] = {
    "LoRA": {},
    "rsLoRA": {"variant": "rslora"},
    "LoRA+": {"loraplus_ratio": 16.0},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init": "pissa_niter_8"},
    "OLoRA": {"init": "olora"},
    "LoftQ": {"init": "loftq"},
    "QERA": {"init": "qera"},
}
ROWS_PER_FORWARD = 32


@dataclass(frozen=True)
class Row:
    """One text and its label, as token ids: the prompt as served, and the answer to it."""

    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def read_rows(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Row]:
    rows = []
    for text, label in labelled.read(args):
        prompt, completion = f"Query: {text}\nIntent:", f" {label}"
        token_ids, is_target = tokenizer.split_completion(prompt, completion)
        start = is_target.index(True)
        rows.append(Row(prompt, completion, tuple(token_ids[:start]), tuple(token_ids[start:])))
    return rows


def take_tokens(rows: list[Row], budget: int) -> list[Row]:
    """The first rows that fit the budget."""
    taken, used = [], 0
    for row in rows:
        if used + row.num_tokens > budget:
            break
        taken.append(row)
        used += row.num_tokens
    return taken


def unit_name(kind: str, rate: str) -> str:
    return f"{kind.replace('+', 'plus')}-{rate}"


def train_all(base: Base, tokenizer: Tokenizer, rows: list[Row], args, folder: Path) -> list[Path]:
    """One run of every kind at every rate; the folders of their adapters."""
    data = folder / "train.jsonl"
    lines = [json.dumps({"prompt": r.prompt, "completion": r.completion}) for r in rows]
    data.write_text("\n".join(lines) + "\n")
    units = tuple(
        UnitConfig(
            name=unit_name(kind, rate), data=data, learning_rate=float(rate),
            rank=args.rank, alpha=2.0 * args.rank, micro_batch_size=args.batch, **settings,
        )
        for kind, settings in KINDS.items()
        for rate in args.rates
    )  # fmt: skip
    config = TrainConfig(output=folder / "run", units=units, seed=args.seed)
    results = train_units(base, tokenizer, config, Console(stderr=True))
    return [result.folder for result in results]


def accuracy(engine: Engine, rows: list[Row], digests: dict[str, str | None]) -> dict[str, float]:
    """Share of rows whose greedy answer is the label, for all adapters in one mixed batch."""
    wanted, answers = {}, {}
    for name, digest in digests.items():
        for index, row in enumerate(rows):
            key = f"{name} {index}"
            uses = () if digest is None else (AdapterUse(digest=digest),)
            sampling = SamplingParams(
                max_tokens=len(row.answer_ids), temperature=0.0,
                stop_token_ids=frozenset(row.answer_ids[-1:]),
            )  # fmt: skip
            engine.add_request(
                Request(
                    request_id=key,
                    prompt_token_ids=row.prompt_ids,
                    sampling=sampling,
                    adapters=uses,
                )
            )
            wanted[key], answers[key] = list(row.answer_ids), []
        while not engine.is_idle:
            for output in engine.step():
                answers[output.request_id] += output.token_ids
    return {
        name: sum(answers[f"{name} {i}"] == wanted[f"{name} {i}"] for i in range(len(rows)))
        / len(rows)
        for name in digests
    }


def loss(base: Base, form: ServingForm | None, rows: list[Row]) -> float:
    """Mean negative log-likelihood of the answers' tokens."""
    total, count = 0.0, 0
    for start in range(0, len(rows), ROWS_PER_FORWARD):
        part = rows[start : start + ROWS_PER_FORWARD]
        every = probe_logits(base, form, [(*row.prompt_ids, *row.answer_ids) for row in part])
        for row, logits in zip(part, every, strict=True):
            predicting = logits[len(row.prompt_ids) - 1 : -1].float().log_softmax(1)
            total -= float(predicting.gather(1, torch.tensor(row.answer_ids)[:, None]).sum())
            count += len(row.answer_ids)
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    labelled.add_arguments(parser)
    parser.add_argument("--rates", nargs="+", default=["3e-4", "1e-3", "3e-3"])
    parser.add_argument("--train-tokens", type=int, default=15_000, help="for each unit")
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    begun = time.monotonic()
    base = load_base(BaseConfig(model=args.base))
    tokenizer = Tokenizer.load(base.folder)
    rows = read_rows(args, tokenizer)
    test, validation = rows[: args.test], rows[args.test : args.test + args.validation]
    training = take_tokens(rows[args.test + args.validation :], args.train_tokens)
    with tempfile.TemporaryDirectory() as folder:
        folders = train_all(base, tokenizer, training, args, Path(folder))
        trained = time.monotonic() - begun
        forms = {f.name: load_adapter(f, base.spec, base.weights) for f in folders}
    pool = AdapterConfig(pool_bytes=sum(2 * form.nbytes for form in forms.values()))
    engine = Engine(base, EngineConfig(adapters=pool))
    for form in forms.values():
        engine.add_adapter(form)
    losses = {name: loss(base, form, validation) for name, form in forms.items()}
    table = [{"kind": "base", "rate": None, "validation_loss": loss(base, None, validation)}]
    chosen: dict[str, ServingForm | None] = {"base": None}
    for kind in KINDS:
        rate = min(args.rates, key=lambda rate: losses[unit_name(kind, rate)])
        name = unit_name(kind, rate)
        chosen[kind] = forms[name]
        table.append({"kind": kind, "rate": rate, "validation_loss": losses[name]})
    shares = accuracy(engine, test, {kind: form and form.digest for kind, form in chosen.items()})
    for entry in table:
        entry["test_loss"] = loss(base, chosen[entry["kind"]], test)
        entry["test_accuracy"] = shares[entry["kind"]]
    show(table)
    result = {
        **machine.facts(),
        "question": "what each kind learns from the same tokens, rate chosen on validation rows",
        "workload": {**vars(args), "data": args.data.name, "train_examples": len(training)},
        "dtype": base.spec.dtype,
        "table": table,
        "validation_losses": losses,
        "training_s": round(trained, 1),
        "seconds": round(time.monotonic() - begun, 1),
    }
    machine.save("variants", result)


def show(table: list[dict]) -> None:
    """The table, for people."""
    shown = Table("kind", "rate", "validation loss", "test loss", "test accuracy")
    for entry in table:
        numbers = [f"{entry[k]:.3f}" for k in ("validation_loss", "test_loss", "test_accuracy")]
        shown.add_row(entry["kind"], entry["rate"] or "", *numbers)
    Console(stderr=True).print(shown)


if __name__ == "__main__":
    main()
