"""Every variant on a base, requests under each of them, and what the oracle says of them."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.core import AdapterUse
from tests.driver import greedy, teacher_forced, tiny_engine
from tests.tiny import VOCAB_SIZE, dense_twin, tiny_base, tiny_checkpoint
from tests.variants import composed, write_variants

COMPOSITIONS = [
    (("lora", 0.5), ("dora", 0.75)),
    (("rslora", -0.6), ("patterns", 0.8)),
    (("dora-bias", 1.25),),
]


class World:
    """A base, every variant on it, and what each of them should say."""

    def __init__(self, shape, dtype, folder, *, names=None, prompts=(40, 8), **options):
        checkpoint = tiny_checkpoint(folder / "base", shape)
        self.base = tiny_base(shape, dtype=dtype, folder=checkpoint, **options)
        self.longest, self.tail = prompts
        self.twin = dense_twin(self.base, shape)
        variants = write_variants(self.base, shape, folder / "adapters", names)
        self.variants = {variant.name: variant for variant in variants}
        self.forms = {
            name: load_adapter(variant.folder, self.base.spec, self.base.weights)
            for name, variant in self.variants.items()
        }
        compositions = [c for c in COMPOSITIONS if all(name in self.variants for name, _ in c)]
        self.rows = [None, *((name, 1.0) for name in self.variants), None, *compositions, None]
        self.rows = [
            row if row is None or isinstance(row[0], tuple) else (row,) for row in self.rows
        ]

    def prompt(self, index):
        """Up to `longest` random tokens and a tail of them; the invocation tokens of an activated
        LoRA between both.
        """
        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(2, self.longest, (), generator=generator))
        tokens = torch.randint(3, VOCAB_SIZE, (length + self.tail,), generator=generator).tolist()
        row = self.rows[index]
        for name, _ in row or ():
            invocation = self.forms[name].facts.invocation_tokens
            tokens[length : length + len(invocation)] = invocation
        return tokens

    def request(self, index, num_steps):
        uses = tuple(
            AdapterUse(digest=self.forms[name].digest, weight=weight)
            for name, weight in self.rows[index] or ()
        )
        return replace(greedy(str(index), self.prompt(index), None, num_steps), adapters=uses)

    def engine(self, **options):
        options = {"max_num_seqs": 48, "max_num_batched_tokens": 48, "max_slots": 40, **options}
        engine = tiny_engine(self.base, **options)
        for form in self.forms.values():
            engine.add_adapter(form)
        return engine

    def expected(self, index, token_ids, dtype):
        return self.oracle(self.rows[index], self.prompt(index), token_ids, dtype)

    @torch.no_grad()
    def oracle(self, row, prompt, token_ids, dtype=torch.float32):
        if row is None:
            twin = self.twin if dtype == self.twin.dtype else None
            return teacher_forced(twin or dense_twin_of(self, dtype), prompt, token_ids)
        if len(row) == 1 and row[0][1] == 1.0:
            return self.variants[row[0][0]].expected(prompt, token_ids, dtype)
        uses = [(self.variants[name], weight) for name, weight in row]
        return composed(uses, prompt, token_ids, dtype)


def dense_twin_of(world, dtype):
    return dense_twin(world.base, world.base.spec.name, dtype=dtype)


def shuffled(world, num_steps, seed=0):
    requests = [world.request(index, num_steps) for index in range(len(world.rows))]
    random.Random(seed).shuffle(requests)
    return requests


def rms(errors):
    return float(torch.cat(errors).double().pow(2).mean().sqrt())
