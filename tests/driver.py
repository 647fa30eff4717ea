"""Drives an engine step by step in the test's own thread and records what it computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_runtime.base.loader import Base
from lora_runtime.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from lora_runtime.core import AdapterUse, FinishReason, Request, SamplingParams, TokenLogprob
from lora_runtime.engine.engine import Engine
from lora_runtime.errors import LoramuxError


@dataclass
class Trace:
    """One request's tokens and the logits (vocab,) of the step that gave each of them."""

    token_ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: LoramuxError | None = None
    num_terminals: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    """Every time that they were given."""


def tiny_engine(
    base: Base, *, poison: bool = True, steps_ahead: int | None = None, **options
) -> Engine:
    """A small engine whose free cache blocks and free pool rows hold NaN.

    `steps_ahead` 1: a step is planned and started before the last one is recorded. None: as the
    engine has it, 1 on a GPU.
    """
    engine = Engine(
        base,
        EngineConfig(
            cache=CacheConfig(
                block_size=options.pop("block_size", 4),
                num_blocks=options.pop("num_blocks", 400),
                prefix_cache=options.pop("prefix_cache", True),
                state_snapshots=options.pop("state_snapshots", None),
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=options.pop("max_num_seqs", 16),
                max_num_batched_tokens=options.pop("max_num_batched_tokens", 32),
            ),
            adapters=AdapterConfig(**{"pool_bytes": 24 << 20, "max_slots": 8, **options}),
        ),
    )
    if steps_ahead is not None:
        engine.num_steps_ahead = steps_ahead
    if poison:
        poison_free_memory(engine)
    return engine


def poison_free_memory(engine: Engine) -> None:
    """Fill cache blocks, states and the adapter pool with NaN. Only before anything is loaded."""
    states = engine.runner.states
    held = [] if states is None else [part for own in states.layers.values() for part in own]
    for tensor in (engine.runner.cache.keys, engine.runner.cache.values, *held):
        tensor.fill_(float("nan"))
    engine.pool.memory.weights.fill_(float("nan"))


def greedy(
    request_id: str,
    prompt: list[int],
    digest: str | None = None,
    max_tokens: int = 64,
    adapters: tuple[AdapterUse, ...] = (),
) -> Request:
    """A greedy request of exactly `max_tokens` tokens, under `digest` or `adapters`."""
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        adapters=adapters if digest is None else (AdapterUse(digest=digest),),
    )


def run(engine: Engine, requests: list[Request], *, arrivals: dict[str, int] | None = None):
    """Run requests to their end; `arrivals` delays some to a step. Returns id → Trace."""
    traces = {request.request_id: Trace() for request in requests}
    pending = {r.request_id: (arrivals or {}).get(r.request_id, 0) for r in requests}
    record_logits(engine, traces)
    step = 0
    while pending or not engine.is_idle:
        for request in requests:
            if pending.get(request.request_id, step + 1) <= step:
                engine.add_request(request)
                del pending[request.request_id]
        for output in engine.step():
            trace = traces[output.request_id]
            trace.token_ids += output.token_ids
            trace.num_cached_tokens = max(trace.num_cached_tokens, output.num_cached_tokens)
            if output.prompt_logprobs is not None:
                trace.prompt_logprobs.append(output.prompt_logprobs)
            if output.finish_reason is not None:
                trace.finish_reason, trace.error = output.finish_reason, output.error
                trace.num_terminals += 1
        engine.check_integrity()
        step += 1
        assert step < 10_000, "the engine makes no progress"
    return traces


def record_logits(engine: Engine, traces: dict[str, Trace]) -> None:
    """From now on keep the logits of every row that samples."""
    runner = engine.runner

    def logits(plan):
        found = type(runner).logits(runner, plan)
        due = [scheduled.row.request.request_id for scheduled in plan.rows if scheduled.samples]
        for request_id, row in zip(due, found, strict=True):
            traces[request_id].logits.append(row.clone())
        return found

    runner.logits = logits


@torch.no_grad()
def teacher_forced(model, prompt: list[int], token_ids: list[int]) -> Tensor:
    """(n, vocab): the model's logits before each of `token_ids`, in one forward."""
    ids = torch.tensor([[*prompt, *token_ids]])
    return model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
