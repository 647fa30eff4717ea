"""The engine on a base of Llama-3.1-8B's shape with random weights: steps against their bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bench.gpu_timing import DEVICE, HAS_GPU, REPLAYS, timed
from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey, ServingForm
from lora_runtime.base.loader import Base, prepare_base
from lora_runtime.config import (
    AdapterConfig,
    BaseConfig,
    CacheConfig,
    EngineConfig,
    Quantization,
    SchedulerConfig,
)
from lora_runtime.core import (
    AdapterUse,
    Request,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
)
from lora_runtime.engine.engine import Engine

RANK = 16
PROMPT, NEW_TOKENS = (128, 64) if HAS_GPU else (16, 4)
STEPS_AT_ONCE = 8
"""Queued behind each other, so that the device does not wait for the host in between."""
LONG = 8192 if HAS_GPU else 24
SHAPE = (
    dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
        rope_theta=500000.0, rms_norm_eps=1e-5,
    )
    if HAS_GPU
    else dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=512,
    )
)  # fmt: skip


def random_model() -> PreTrainedModel:
    """A bfloat16 model of SHAPE, made on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(**SHAPE), attn_implementation="eager"
            )
    finally:
        torch.set_default_dtype(torch.float32)
    model.config.dtype = torch.bfloat16
    return model.eval()


@lru_cache(maxsize=1)
def random_base(quantization: Quantization) -> Base:
    """A base of SHAPE, kept until another is asked for."""
    config = BaseConfig(quantization=quantization, dequantized_cache=False)
    return prepare_base(random_model(), config, "random-8b", Path("."))


def random_forms(base: Base, count: int) -> list[ServingForm]:
    """Adapters of rank 16 on every linear layer. Their numbers repeat: only bytes matter here."""
    generator = torch.Generator().manual_seed(0)
    longest = max(max(s.in_features, s.out_features) for s in base.spec.linears.values())
    flat = 0.01 * torch.randn(RANK * longest, generator=generator)
    modules = {
        ModuleKey(path): ModuleForm(
            a=flat[: RANK * shape.in_features].view(RANK, -1).clone(),
            b=flat[: RANK * shape.out_features].view(-1, RANK).clone(),
        )
        for path, shape in base.spec.linears.items()
    }
    return [
        ServingForm(digest=f"{i:064d}", variant="lora", modules=modules, honoured={}, inert={})
        for i in range(count)
    ]


def adapter_bytes(base: Base) -> int:
    return 2 * RANK * sum(s.in_features + s.out_features for s in base.spec.linears.values())


def step_bytes(base: Base, cached_tokens: int, num_adapters: int) -> float:
    """What a decode step must read: the weights, the output layer, the cache, the adapters."""
    spec = base.spec
    weights = sum(s.in_features * s.out_features for s in spec.linears.values())
    per_weight = {"nf4": 9 / 16, "int8": 1.0, "none": 2.0}[spec.quantization]
    head = 2 * spec.hidden_size * spec.vocab_size
    cache = cached_tokens * base.kv_bytes_per_token()
    return weights * per_weight + head + cache + num_adapters * adapter_bytes(base)


@dataclass
class Bench:
    """One engine, and what is asked of it."""

    base: Base
    engine: Engine
    digests: list[str]
    num_requests: int = 0
    step_seconds: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, base: Base, num_adapters: int, *, pool_adapters: int, max_rows: int) -> Bench:
        engine = Engine(
            base,
            EngineConfig(
                cache=CacheConfig(num_blocks=8192 if HAS_GPU else 200),
                scheduler=SchedulerConfig(
                    max_num_seqs=max_rows,
                    max_num_batched_tokens=LONG,
                    max_model_len=2 * LONG,
                ),
                adapters=AdapterConfig(
                    pool_bytes=pool_adapters * (adapter_bytes(base) * 2 + (1 << 20))
                ),
            ),
        )
        forms = random_forms(base, num_adapters)
        for form in forms:
            engine.add_adapter(form)
        engine.runner.warm_up(lambda _: None)
        return cls(base, engine, [form.digest for form in forms])

    def add(self, owner: int | None, prompt_tokens: int, new_tokens: int) -> None:
        generator = torch.Generator().manual_seed(self.num_requests)
        prompt = torch.randint(5, self.base.spec.vocab_size, (prompt_tokens,), generator=generator)
        adapters = () if owner is None else (AdapterUse(digest=self.digests[owner]),)
        self.engine.add_request(
            Request(
                request_id=str(self.num_requests),
                prompt_token_ids=tuple(prompt.tolist()),
                sampling=SamplingParams(max_tokens=new_tokens, temperature=0.0),
                adapters=adapters,
            )
        )
        self.num_requests += 1

    def finish(self) -> float:
        """Run all requests to their end, noting how long each step took; output tokens a second."""
        num_tokens, start = 0, time.perf_counter()
        while not self.engine.is_idle:
            begin = time.perf_counter()
            num_tokens += sum(len(output.token_ids) for output in self.engine.step())
            self.step_seconds.append(time.perf_counter() - begin)
        return num_tokens / (time.perf_counter() - start)

    def decode(self, owners: Sequence[int | None], bandwidth: float) -> dict[str, object]:
        """A decode step of these rows, each with a prompt behind it: on the device alone, by the
        clock of whole engine steps, and its floor.
        """
        for owner in owners:
            self.add(owner, PROMPT, NEW_TOKENS)
        while self.engine.scheduler.waiting or any(
            s.num_uncomputed_tokens > 1 for s in self.engine.scheduler.running
        ):
            self.engine.step()
        device = self._device_seconds()
        self.step_seconds.clear()
        speed = self.finish()
        cached = len(owners) * PROMPT
        distinct = len({owner for owner in owners if owner is not None})
        floor = step_bytes(self.base, cached, distinct) / bandwidth
        return {
            "rows": len(owners), "adapters": distinct, "floor_ms": floor * 1e3,
            "device_ms": device * 1e3, "over_floor": device / floor,
            "step_ms": statistics.median(self.step_seconds) * 1e3, "tokens_per_s": speed,
        }  # fmt: skip

    def serve(self, owners: Sequence[int | None]) -> float:
        """Output tokens a second with the prompts included, as the peers are timed."""
        for owner in owners:
            self.add(owner, PROMPT, NEW_TOKENS)
        return self.finish()

    @torch.inference_mode()
    def _device_seconds(self) -> float:
        """Of the forward that the engine did last of the rows that run now, done again."""
        running = self.engine.scheduler.running
        rows = [ScheduledSequence(s, s.num_computed_tokens - 1, 1) for s in running]
        plan = ScheduledBatch(tuple(rows))
        runner = self.engine.runner

        def some() -> None:
            for _ in range(STEPS_AT_ONCE):
                runner.logits(plan)

        return statistics.median(timed(some) for _ in range(REPLAYS)) / STEPS_AT_ONCE

    def prefill(self, owner: int | None) -> float:
        """Seconds of a step that takes one prompt of LONG tokens; the median of three."""
        seconds = []
        for _ in range(3):
            self.add(owner, LONG, 1)
            seconds.append(timed(self.engine.step))
            self.finish()
        return statistics.median(seconds)
