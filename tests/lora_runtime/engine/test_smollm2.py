"""The real road on SmolLM2-135M: adapters of the real peft in one mixed batch, against peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.loader import load_base
from lora_runtime.config import AdapterConfig, BaseConfig, CacheConfig, EngineConfig
from lora_runtime.engine.engine import Engine
from lora_runtime.text.tokenizer import Tokenizer
from tests.driver import greedy, run, teacher_forced
from tests.peft_adapters import four_adapters, load_in_peft

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
    "How do I boil an egg? " * 12,
    "Hi",
    "Tell me about horses.",
]
OWNERS = [0, None, 1, 2, 3, None]


def dense(base, dtype):
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype).eval()
    with torch.no_grad():
        for path in base.spec.linears:
            values = base.model.get_submodule(path).linear.weight_values()
            model.get_submodule(path).weight.copy_(values)
    return model


def chat(base):
    tokenizer = Tokenizer.load(base.folder)
    return [tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS]


def serve(base, folders, prompts, num_steps):
    """One mixed batch; the packed bits of every layer must be what they were."""
    config = EngineConfig(
        cache=CacheConfig(num_blocks=128), adapters=AdapterConfig(pool_bytes=256 << 20)
    )
    engine = Engine(base, config)
    forms = [load_adapter(folder, base.spec) for folder in folders]
    for form in forms:
        engine.add_adapter(form)
    packed = [base.model.get_submodule(path).linear.packed.clone() for path in base.spec.linears]
    requests = [
        greedy(str(i), prompt, None if owner is None else forms[owner].digest, num_steps)
        for i, (prompt, owner) in enumerate(zip(prompts, OWNERS, strict=True))
    ]
    traces = run(engine, requests)
    for path, before in zip(base.spec.linears, packed, strict=True):
        assert torch.equal(base.model.get_submodule(path).linear.packed, before)
    return [traces[str(i)] for i in range(len(OWNERS))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    base = load_base(BaseConfig(dtype="float32", device="cpu"))
    return four_adapters(dense(base, torch.float32), tmp_path_factory.mktemp("smollm2"), scale=2.0)


def test_float32_logits_and_greedy_tokens_equal_peft(folders):
    base = load_base(BaseConfig(dtype="float32", device="cpu"))
    prompts, model = chat(base), dense(base, torch.float32)
    traces = serve(base, folders, prompts, 64)
    for index, owner in enumerate(OWNERS):
        trace = traces[index]
        oracle = model if owner is None else load_in_peft(model, folders[owner])
        expected = teacher_forced(oracle, prompts[index], trace.token_ids)
        assert (torch.stack(trace.logits) - expected).abs().max() <= 2e-4
        assert trace.token_ids == expected.argmax(1).tolist()
        if owner is not None:
            unadapted = teacher_forced(model, prompts[index], trace.token_ids)
            assert (expected - unadapted).abs().max() >= 1.0


def test_bfloat16_error_is_within_a_quarter_of_pefts(folders, capsys):
    base = load_base(BaseConfig(dtype="bfloat16", device="cpu"))
    prompts, exact_model = chat(base), dense(base, torch.float64)
    model = dense(base, torch.bfloat16)
    traces = serve(base, folders, prompts, 8)
    for index, owner in enumerate(OWNERS):
        token_ids = traces[index].token_ids
        oracles = [
            m if owner is None else load_in_peft(m, folders[owner]) for m in (exact_model, model)
        ]
        exact = teacher_forced(oracles[0].double(), prompts[index], token_ids)
        theirs = teacher_forced(oracles[1], prompts[index], token_ids)
        ours = torch.stack(traces[index].logits)
        our_rms, peft_rms = ((x.double() - exact).pow(2).mean().sqrt() for x in (ours, theirs))
        with capsys.disabled():
            print(f"\nSmolLM2 row {index}: bfloat16 error {our_rms:.4f}, peft's {peft_rms:.4f}")
        assert our_rms <= 1.25 * peft_rms
