"""The engine on a base of Llama-3.1-8B's shape with random weights: steps against their bytes,
whole requests, many adapters, and graphs against eager steps."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bench.gpu_rows import Case, Figures, Table
from bench.gpu_timing import DEVICE, HAS_GPU, REPLAYS, Ceilings, timed
from bench.gpu_trace import device_kernels, host_microseconds
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
    AdapterPlacement,
    AdapterUse,
    Request,
    SamplingParams,
    ScheduledBatch,
    ScheduledRow,
)
from lora_runtime.engine.engine import Engine
from lora_runtime.errors import Unavailable

RANK = 16
PROMPT, NEW_TOKENS = (128, 64) if HAS_GPU else (16, 4)
ROWS = (1, 8, 32, 64) if HAS_GPU else (1, 3)
MOST_ROWS = max(ROWS)
ADAPTERS = 32 if HAS_GPU else 3
"""Distinct adapters of the engine that most tables ask."""
TOTAL, RESIDENT = (100, 32) if HAS_GPU else (4, 3)
"""Adapters that are loaded, and those of them that the pool holds, where there are many."""
STEPS_AT_ONCE = 8 if HAS_GPU else 1
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
    """Of one adapter in the pool, whose weights on a GPU are bfloat16."""
    sides = sum(s.in_features + s.out_features for s in base.spec.linears.values())
    return (2 if HAS_GPU else 4) * RANK * sides


BYTES_PER_WEIGHT = {"nf4": 9 / 16, "nf4-double": 0.5 + 1 / 64, "int8": 1.0, "none": 2.0}


def step_bytes(base: Base, cached_tokens: int, num_adapters: int) -> float:
    """What a decode step must read: the weights, the output layer, the cache, the adapters."""
    spec = base.spec
    weights = sum(s.in_features * s.out_features for s in spec.linears.values())
    per_weight = BYTES_PER_WEIGHT[spec.quantization]
    head = 2 * spec.hidden_size * spec.vocab_size
    cache = cached_tokens * base.kv_bytes_per_token()
    return weights * per_weight + head + cache + num_adapters * adapter_bytes(base)


@dataclass
class Bench:
    """One engine, and what is asked of it."""

    base: Base
    engine: Engine
    digests: list[str]
    start_figures: dict[str, object] = field(default_factory=dict)
    num_requests: int = 0
    step_seconds: list[float] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        quantization: Quantization,
        num_adapters: int,
        *,
        pool_adapters: int,
        max_rows: int = MOST_ROWS,
        cuda_graphs: bool = True,
    ) -> Bench:
        begin = time.perf_counter()
        base = random_base(quantization)
        loaded = time.perf_counter()
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
                    pool_bytes=pool_adapters * (adapter_bytes(base) + (1 << 20))
                ),
                cuda_graphs=cuda_graphs,
            ),
        )
        forms = random_forms(base, num_adapters)
        for form in forms:
            engine.add_adapter(form)
        made, free = time.perf_counter(), []
        engine.runner.warm_up(lambda _: free.append(free_bytes()))
        figures = {
            "base_s": loaded - begin, "adapters_s": made - loaded,
            "warm_up_s": time.perf_counter() - made, "graphs": len(free),
            "graphs_gb": (free[0] - free[-1]) / 1e9 if free else 0.0,
        }  # fmt: skip
        return cls(base, engine, [form.digest for form in forms], figures)

    def add(
        self, owner: int | None, prompt_tokens: int, new_tokens: int, **sampling: object
    ) -> str:
        """Queue a request, greedy unless `sampling` says otherwise; its id."""
        generator = torch.Generator().manual_seed(self.num_requests)
        prompt = torch.randint(5, self.base.spec.vocab_size, (prompt_tokens,), generator=generator)
        adapters = () if owner is None else (AdapterUse(digest=self.digests[owner]),)
        request_id = str(self.num_requests)
        self.engine.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=tuple(prompt.tolist()),
                sampling=SamplingParams(
                    **{"max_tokens": new_tokens, "temperature": 0.0, **sampling}
                ),
                adapters=adapters,
            )
        )
        self.num_requests += 1
        return request_id

    def prefilled(
        self, owners: Sequence[int | None], new_tokens: int = NEW_TOKENS, **sampling: object
    ) -> None:
        """Rows with a prompt behind them, one token a step from here on."""
        for owner in owners:
            self.add(owner, PROMPT, new_tokens, **sampling)
        while self.engine.scheduler.waiting or any(
            s.num_uncomputed_tokens > 1 for s in self.engine.scheduler.running
        ):
            self.engine.step()

    def finish(self) -> float:
        """Run all requests to their end, noting how long each step took; output tokens a second."""
        num_tokens, start = 0, time.perf_counter()
        self.step_seconds.clear()
        while not self.engine.is_idle:
            begin = time.perf_counter()
            num_tokens += sum(len(output.token_ids) for output in self.engine.step())
            self.step_seconds.append(time.perf_counter() - begin)
        return num_tokens / (time.perf_counter() - start)

    def answers(self, owners: Sequence[int | None]) -> list[tuple[int, ...]]:
        """Greedy tokens of requests that arrive a step apart, some of them cancelled on the way."""
        tokens: dict[str, list[int]] = {}
        for index, owner in enumerate(owners):
            request_id = self.add(owner, PROMPT // (1 + index % 3), NEW_TOKENS)
            tokens[request_id] = []
            if index % 5 == 4:
                self.engine.abort(request_id)
            self._step_into(tokens)
        while not self.engine.is_idle:
            self._step_into(tokens)
        return [tuple(found) for found in tokens.values()]

    def _step_into(self, tokens: dict[str, list[int]]) -> None:
        for output in self.engine.step():
            tokens[output.request_id] += output.token_ids

    @torch.inference_mode()
    def device_seconds(self) -> float:
        """Of the forward that the engine did last of the rows that run now, done again."""
        running = self.engine.scheduler.running
        rows = [ScheduledRow(s, s.num_computed_tokens - 1, 1) for s in running]
        plan = ScheduledBatch(tuple(rows))
        runner = self.engine.runner

        def some() -> None:
            for _ in range(STEPS_AT_ONCE):
                runner.logits(plan)

        return statistics.median(timed(some) for _ in range(REPLAYS)) / STEPS_AT_ONCE


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if HAS_GPU else 0


def release() -> None:
    """Give back what no longer is used, so that the next base fits."""
    mixed_bench.cache_clear()
    random_base.cache_clear()
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def mixed_bench() -> Bench:
    """The NF4 engine that most tables ask, started once."""
    return Bench.start("nf4", ADAPTERS, pool_adapters=ADAPTERS)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))]


# Tables


def start_table() -> Table:
    """Seconds of loading, packing and capturing, and what the graphs take."""
    return Table("start", lambda: [{}], lambda: mixed_bench().start_figures)


def decode_cases() -> Iterator[Case]:
    """Base alone, then mixed over 1, 8 and all adapters as far as there are rows."""
    for rows in ROWS:
        for adapters in sorted({0, 1, min(4, rows), min(8, rows), min(rows, ADAPTERS)}):
            yield {"rows": rows, "adapters": adapters}


def decode_table(ceilings: Ceilings) -> Table:
    """A decode step: on the device alone, by the clock of whole engine steps, and its floor."""

    def measure(rows: int, adapters: int) -> Figures:
        bench = mixed_bench()
        bench.prefilled([i % adapters if adapters else None for i in range(rows)])
        device = bench.device_seconds()
        speed = bench.finish()
        floor = ceilings.read_seconds(step_bytes(bench.base, rows * PROMPT, adapters))
        return {
            "floor_ms": floor * 1e3, "device_ms": device * 1e3, "over_floor": device / floor,
            "step_ms": statistics.median(bench.step_seconds) * 1e3, "tokens_per_s": speed,
        }  # fmt: skip

    return Table("decode", decode_cases, measure)


STEPS: dict[str, tuple[list[int | None], dict[str, object]]] = {
    "decode, base": ([None] * MOST_ROWS, {}),
    "decode, adapters": ([i % ADAPTERS for i in range(MOST_ROWS)], {}),
    "decode, top_p": ([None] * MOST_ROWS, {"temperature": 1.0, "top_p": 0.9}),
}
"""Kinds of step that are looked into: owners of the rows, and how they sample."""


def step_table(folder: Path) -> Table:
    """Launches and device time of some kinds of step, and the host's part of each."""

    def measure(step: str) -> Figures:
        bench, (owners, sampling) = mixed_bench(), STEPS[step]
        bench.prefilled(owners, LONG_ENOUGH, **sampling)
        host = host_microseconds(bench.engine, bench.engine.step)
        path = folder / f"trace-{step.replace(', ', '-')}.json.gz"
        kernels = device_kernels(bench.engine.step, path)
        bench.engine.abort_all(Unavailable("measured"))
        bench.finish()
        return {**host, **kernels}

    return Table("steps", lambda: [{"step": name} for name in STEPS], measure)


LONG_ENOUGH = 200 if HAS_GPU else 12
"""New tokens of rows that must still run when a trace ends."""


def prefill_table() -> Table:
    """One prompt of LONG tokens in one step, with and without an adapter; the median of three."""

    def measure(adapter: bool) -> Figures:
        bench, seconds = mixed_bench(), []
        for _ in range(3):
            bench.add(0 if adapter else None, LONG, 1)
            seconds.append(timed(bench.engine.step))
            bench.finish()
        return {"tokens": LONG, "seconds": statistics.median(seconds)}

    return Table("prefill", lambda: [{"adapter": False}, {"adapter": True}], measure)


def served_table() -> Table:
    """Whole requests, prompts included, as the peers are timed: output tokens a second."""

    def measure(contender: str, rows: int, adapters: int) -> Figures:
        bench = mixed_bench()
        for index in range(rows):
            bench.add(index % adapters if adapters else None, PROMPT, NEW_TOKENS)
        return {"tokens_per_s": bench.finish()}

    return Table("served", partial(served_cases, "loramux nf4"), measure)


def served_cases(contender: str) -> Iterator[Case]:
    """What the peers are timed at too."""
    for rows in ROWS:
        for adapters in sorted({0, min(8, rows)}):
            yield {"contender": contender, "rows": rows, "adapters": adapters}


def latency_table() -> Table:
    """How long rows wait for their next token while long prompts are prefilled beside them."""

    def measure(prompts: int) -> Figures:
        bench = mixed_bench()
        bench.prefilled([i % ADAPTERS for i in range(MOST_ROWS // 2)])
        for _ in range(prompts):
            bench.add(None, LONG // 2, 1)
        bench.finish()
        return {
            "prompt_tokens": LONG // 2,
            "step_p50_ms": percentile(bench.step_seconds, 0.5) * 1e3,
            "step_p99_ms": percentile(bench.step_seconds, 0.99) * 1e3,
        }

    return Table("latency", lambda: [{"prompts": n} for n in (0, 1, 4)], measure)


def graphs_table() -> Table:
    """Do replayed graphs say what eager steps say? Rows come, end and are cancelled; adapters are
    evicted, rows preempted. bfloat16 tokens may part where two logits are nearly equal, so the
    share of equal rows is given beside that of eager steps run twice in another order.
    """

    def measure() -> Figures:
        owners = [i % ADAPTERS if i % 4 else None for i in range(2 * MOST_ROWS)]
        release()
        eager = Bench.start("nf4", ADAPTERS, pool_adapters=ADAPTERS // 2, cuda_graphs=False)
        expected = eager.answers(owners)
        del eager
        release()
        graphs = Bench.start("nf4", ADAPTERS, pool_adapters=ADAPTERS // 2)
        found = graphs.answers(owners)
        graphs.engine.check_integrity()
        equal = sum(a == b for a, b in zip(found, expected, strict=True))
        first = sum(a[:4] == b[:4] for a, b in zip(found, expected, strict=True))
        return {"rows": len(owners), "equal": equal, "first_four_equal": first}

    return Table("graphs", lambda: [{}], measure)


def many_table() -> Table:
    """Streams over few and over many adapters by Zipf's law, and how long steps and loads take."""

    @lru_cache(maxsize=1)
    def bench() -> Bench:
        release()
        return Bench.start("nf4", TOTAL, pool_adapters=RESIDENT, max_rows=MOST_ROWS // 2)

    def measure(adapters: int) -> Figures:
        own, generator = bench(), random.Random(0)
        weights = [1 / (i + 1) for i in range(adapters)]
        num_requests, length = (16 * MOST_ROWS, 32) if HAS_GPU else (5, 3)
        for owner in generator.choices(range(adapters), weights, k=num_requests):
            own.add(owner, length, length)
        speed = own.finish()
        return {
            "tokens_per_s": speed,
            "step_p50_ms": percentile(own.step_seconds, 0.5) * 1e3,
            "step_p99_ms": percentile(own.step_seconds, 0.99) * 1e3,
            "load_ms": load_seconds(own) * 1e3,
        }

    return Table("many", lambda: [{"adapters": n} for n in sorted({min(5, TOTAL), TOTAL})], measure)


def load_seconds(bench: Bench) -> float:
    """From the host copy of one adapter to the end of its copy on the device."""
    engine, digest = bench.engine, bench.digests[0]
    placement = AdapterPlacement(digest=digest, slot=0, address=0)
    load = partial(engine.pool.load, placement, engine.host[digest])
    with torch.inference_mode():
        return statistics.median(timed(load) for _ in range(5))


def formats_table(ceilings: Ceilings) -> Table:
    """Decode steps of the base in other formats, beside NF4's in `decode`."""

    @lru_cache(maxsize=1)
    def bench(quantization: Quantization) -> Bench:
        release()
        return Bench.start(quantization, 0, pool_adapters=1)

    def cases() -> Iterator[Case]:
        for quantization in ("nf4-double", "int8", "none"):
            for rows in ROWS:
                yield {"quantization": quantization, "rows": rows}

    def measure(quantization: Quantization, rows: int) -> Figures:
        own = bench(quantization)
        own.prefilled([None] * rows)
        device, speed = own.device_seconds(), own.finish()
        floor = ceilings.read_seconds(step_bytes(own.base, rows * PROMPT, 0))
        return {
            "floor_ms": floor * 1e3, "device_ms": device * 1e3, "over_floor": device / floor,
            "tokens_per_s": speed,
        }  # fmt: skip

    return Table("formats", cases, measure)


def memory_table() -> Table:
    """What the default settings find for keys and values, and what is left over."""

    def measure() -> Figures:
        release()
        engine = Engine(random_base("nf4"), EngineConfig())
        engine.runner.warm_up(lambda _: None)
        total = torch.cuda.mem_get_info()[1] if HAS_GPU else 1
        return {
            "kv_tokens": engine.info.num_blocks * engine.info.block_size,
            "free_share": free_bytes() / total,
        }

    return Table("memory", lambda: [{}], measure)
