"""The peer of the training benchmark: peft + transformers' Trainer, one update at a time."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lora_runtime.training.data import Example
from lora_runtime.training.units import Unit

LAYOUTS = ("padded", "grouped", "packed")
IGNORED = -100


@dataclass(frozen=True)
class PeerSettings:
    """How the peer lays out its batches."""

    layout: str
    micro_batch_size: int


class CountingTrainer(Trainer):
    """Counts the tokens that are not padding."""

    num_tokens = 0

    def training_step(self, model: Any, inputs: dict[str, Tensor], *args: Any) -> Tensor:
        mask = inputs.get("attention_mask")
        self.num_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return super().training_step(model, inputs, *args)


class StepByStep(TrainerCallback):
    """Holds the Trainer before every update until it is told to go on."""

    def __init__(self) -> None:
        self.go: Queue[bool] = Queue()
        self.done: Queue[BaseException | None] = Queue()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.go.get()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done.put(None)


class Peer:
    """One adapter trained by transformers' Trainer; it starts from a unit's A."""

    def __init__(self, model: Any, trainer: CountingTrainer, steps: StepByStep) -> None:
        self.model, self.trainer, self.steps = model, trainer, steps
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self.steps.done.put(error)
            raise

    def update(self) -> tuple[int, float]:
        """One update: tokens and seconds."""
        before, start = self.trainer.num_tokens, time.perf_counter()
        self.steps.go.put(True)
        if error := self.steps.done.get():
            raise error
        return self.trainer.num_tokens - before, time.perf_counter() - start

    def close(self) -> None:
        self.thread.join()

    @torch.no_grad()
    def held_out_loss(self, examples: Sequence[Example]) -> float:
        """Mean over the target tokens, one example at a time."""
        total, count = 0.0, 0
        for example in examples:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.trainer.args.bf16):
                logits = self.model(input_ids=example.token_ids[None]).logits[0]
            labels = example.token_ids[example.predictors + 1]
            logits = logits[example.predictors].float()
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        return total / count


def peer_model(folder: Path, unit: Unit, dtype: torch.dtype) -> Any:
    """The unit's adapter as PEFT makes it, on an unquantised base."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    config = peft.LoraConfig(
        r=unit.config.rank, lora_alpha=unit.config.alpha, use_dora=unit.config.use_dora,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    for module in unit.modules.values():
        layer = adapted.base_model.model.get_submodule(module.path)
        layer.lora_A.default.weight.data.copy_(module.a.data)
    return adapted


def create_peer(
    model: Any, unit: Unit, examples: Sequence[Example], settings: PeerSettings, folder: Path,
    num_updates: int, *, bf16: bool = True,
) -> Peer:  # fmt: skip
    """`examples` in the order in which our trainer takes them; `grouped` has its own order."""
    size = unit.config.examples_per_step
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=size // settings.micro_batch_size,
        max_steps=num_updates,
        learning_rate=unit.config.learning_rate,
        weight_decay=unit.config.weight_decay,
        max_grad_norm=unit.config.max_grad_norm,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length" if settings.layout == "grouped" else "sequential",
        bf16=bf16,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=unit.seed,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    steps = StepByStep()
    trainer = CountingTrainer(
        model=model,
        args=arguments,
        train_dataset=[_features(example) for example in examples],
        data_collator=DataCollatorWithFlattening() if settings.layout == "packed" else padding,
        callbacks=[steps],
    )
    return Peer(model, trainer, steps)


def _features(example: Example) -> dict[str, list[int]]:
    labels = torch.full_like(example.token_ids, IGNORED)
    labels[example.predictors + 1] = example.token_ids[example.predictors + 1]
    return {"input_ids": example.token_ids.tolist(), "labels": labels.tolist()}
