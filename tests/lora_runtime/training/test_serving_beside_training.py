"""An engine on the very Base that is trained on notices nothing of it, and the training nothing of
the engine: both to the bit.
"""

from __future__ import annotations

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.training.config import UnitConfig
from tests.driver import Trace, greedy, record_logits, tiny_engine
from tests.lora_runtime.training.conftest import content_of
from tests.lora_runtime.training.tiny_runs import ragged_data, run
from tests.peft_adapters import write_adapter
from tests.tiny import dense_twin, tiny_base

PROMPT = [5, 17, 2, 250, 33, 264, 120, 7]
LONG_PROMPT = [int(token) for token in torch.arange(40) * 7 % 290 + 2]
REPLICATION = [[0, 2], [1, 3]]
SERVED = {"dora": {"use_dora": True}, "replicated": {"layer_replication": REPLICATION}}
TRAINED = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"variant": "pissa"},
    "vocabulary": {
        "modules_to_save": ("embed_tokens", "lm_head"),
        "target_modules": ("q_proj",),
    },
    "replicated": {"layer_replication": tuple(map(tuple, REPLICATION))},
}
NUM_TOKENS = 7
"""Of an answer: no divisor of the number of passes, so that answers begin and end anywhere."""


class Server:
    """Gives the same answers over and over, one step of the engine a call."""

    def __init__(self, base, folders):
        self.engine = tiny_engine(base, prefix_cache=False)
        digests = {"base": None}
        for name, folder in folders.items():
            form = load_adapter(folder, base.spec, base.weights)
            self.engine.add_adapter(form)
            digests[name] = form.digest
        self.requests = [
            greedy(f"{name}-{len(prompt)}", prompt, digest, NUM_TOKENS)
            for name, digest in digests.items()
            for prompt in (PROMPT, LONG_PROMPT)
        ]
        self.rounds = []

    def step(self):
        if self.engine.is_idle:
            self.rounds.append({request.request_id: Trace() for request in self.requests})
            record_logits(self.engine, self.rounds[-1])
            for request in self.requests:
                self.engine.add_request(request)
        assert all(output.error is None for output in self.engine.step())

    def finish(self):
        """Finish this round of answers and give another."""
        for _ in range(2):
            self.step()
            while not self.engine.is_idle:
                self.step()


def configs_of(folder):
    return [
        UnitConfig(
            name=name, data=ragged_data(folder / f"{name}.jsonl", 9, seed=seed), rank=4, warmup=0,
            learning_rate=2e-2, num_epochs=4, micro_batch_size=2, **options,
        )
        for seed, (name, options) in enumerate(TRAINED.items())
    ]  # fmt: skip


def facts(results):
    """All that training found, without the seconds."""
    return [[record[:-1] for record in result.records] for result in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_changes_the_other(tmp_path, tokenizer, dtype):
    """Requests live on while passes run between their steps."""
    twin = dense_twin(tiny_base("llama"), "llama")
    folders = {
        name: write_adapter(twin, tmp_path / name, seed=seed, **options)
        for seed, (name, options) in enumerate(SERVED.items())
    }
    configs = configs_of(tmp_path)
    alone = run(tiny_base("llama", dtype=dtype), tokenizer, tmp_path / "alone", configs)

    base = tiny_base("llama", dtype=dtype)
    server = Server(base, folders)
    before = content_of(base)
    server.finish()

    def go_on():
        server.step()
        return False

    beside = run(base, tokenizer, tmp_path / "beside", configs, should_stop=go_on)
    assert not server.engine.is_idle  # answers that began before the end
    server.finish()

    assert facts(beside) == facts(alone)
    for config in configs:
        file = f"{config.name}/adapter_model.safetensors"
        trained, expected = (tmp_path / kind / file for kind in ("beside", "alone"))
        assert trained.read_bytes() == expected.read_bytes()
    assert len(server.rounds) >= 4
    assert_equal_rounds(server.rounds)
    assert content_of(base) == before


def assert_equal_rounds(rounds):
    expected = {name: torch.stack(trace.logits) for name, trace in rounds[0].items()}
    for answers in rounds:
        for name, trace in answers.items():
            assert trace.logits[0].isfinite().all()
            assert torch.equal(torch.stack(trace.logits), expected[name]), name
    for name in SERVED:  # no dead adapter
        difference = expected[f"{name}-{len(PROMPT)}"][0] - expected[f"base-{len(PROMPT)}"][0]
        assert difference.abs().max() >= 1
