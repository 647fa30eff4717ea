"""The one place that acts on the device: adapter copies, the forward, sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lora_runtime.adapters.host_cache import HostCache
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.base.loader import Base
from lora_runtime.base.model.adapted_linear import PooledBinding
from lora_runtime.base.model.attention import KVCache, PagedAttention
from lora_runtime.base.model.quant_linear import FrozenLinear
from lora_runtime.base.model.recurrence import StatePool
from lora_runtime.base.model.reordered_model import LayerSteps
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.core import (
    AdapterPlacement,
    AdapterUse,
    Request,
    Row,
    SamplingParams,
    ScheduledBatch,
    ScheduledRow,
)
from lora_runtime.engine.adapter_loads import AdapterLoads, CopyStream
from lora_runtime.engine.batch import ForwardBatch, build_batch
from lora_runtime.engine.cpu_capture import can_capture_on_cpu
from lora_runtime.engine.decode_graphs import Capture, DecodeGraphs, Outputs, buckets
from lora_runtime.engine.probe import probe_logits
from lora_runtime.engine.reordered_batch import reordered_batch
from lora_runtime.engine.sampler import Draw, PromptScores, draw
from lora_runtime.engine.step_buffers import StepBuffers
from lora_runtime.kernels import can_run_on_gpu, most_likely
from lora_runtime.kernels.cpu_library import num_threads, threads

WARM_TOKENS = (2, 16, 32, 64, 96, 320)
"""Tokens of the steps that are run before any request: one of every size by which a kernel is
chosen, 8 to 64 rows of a product and 256 entries of adapters."""


class ModelRunner:
    """Executes step plans with the base, the cache and the adapter pool; it decides nothing."""

    def __init__(
        self,
        base: Base,
        cache: KVCache,
        block_size: int,
        pool: AdapterPool,
        host: HostCache,
        max_num_seqs: int,
        states: StatePool | None = None,
    ) -> None:
        self.base, self.cache, self.block_size = base, cache, block_size
        self.states = states
        self.pool, self.host = pool, host
        is_cuda = base.device.type == "cuda"
        self.loads = AdapterLoads(pool, CopyStream(base.device) if is_cuda else None)
        self.graphs: DecodeGraphs | None = None
        self._leaves_torch_little = can_capture_on_cpu(base) and _are_compiled(base)
        self._drawn = torch.zeros(max_num_seqs, dtype=torch.int64, device=base.device)
        """(max_num_seqs,) int64: the token that the last step gave each row that sampled."""
        self._best: Tensor | None = None
        """`most_likely` of the last logits, if a graph has computed it along with them."""
        self._prompts: list[PromptScores] = []
        """What the last forward says of prompts' own tokens."""

    @torch.inference_mode()
    def use_graphs(self, max_num_seqs: int, max_model_len: int, capture: Capture) -> None:
        """From now on replay decode steps of up to `max_num_seqs` rows."""
        num_blocks = -(-max_model_len // self.block_size)
        buffers = [
            StepBuffers(size, num_blocks, self.block_size, self.base.device, self.states)
            for size in buckets(max_num_seqs)
        ]
        outputs = None if self.base.device.type == "cpu" else self._room(buffers[-1].num_rows)
        self.graphs = DecodeGraphs(self._forward_and_choose, tuple(buffers), capture, outputs)

    def _room(self, num_rows: int) -> Outputs:
        """Memory for the outputs of a step."""
        vocab_size, device = self.base.spec.vocab_size, self.base.device
        logits = torch.empty(num_rows, vocab_size, dtype=self.base.dtype, device=device)
        return logits, torch.empty(num_rows, 2, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def warm_up(self, on_progress: Callable[[str], None]) -> None:
        """Compile, capture and make what steps need, before the first request waits for it. Only
        while nothing runs: it writes to the cache. On a CPU that is one step, for which layers make
        the copies that they keep: nothing is compiled there, and a capture takes about as long as a
        step, so that most of them would wait for a number of rows that never comes.
        """
        if not can_run_on_gpu(torch.empty(0, dtype=self.base.dtype, device=self.base.device)):
            on_progress("running a first step")
            self._warm_up_step(WARM_TOKENS[0], ())
            return
        on_progress("compiling the kernels of prompts and adapters")
        self._warm_up_kernels()
        if self.graphs is not None:
            self.graphs.warm_up(self.pool.layout, on_progress)

    def _warm_up_kernels(self) -> None:
        """Steps as no graph holds them, short and long, of the base and with an adapter: in a slot
        that holds none, so that all kernels run and change nothing. And a forward as a parity gate
        runs it, which has no cache to write to.
        """
        for num_tokens in WARM_TOKENS:
            for slots in ((), (0,)):
                self._warm_up_step(num_tokens, slots)
        probe_logits(self.base, None, [range(WARM_TOKENS[0])])

    def _warm_up_step(self, num_tokens: int, slots: tuple[int, ...]) -> None:
        """Of so many tokens, or as many as there is room for."""
        longest = min(self.cache.num_cache_slots, self.base.spec.max_model_len)
        plan = _warm_plan(min(num_tokens, longest), slots, self.block_size)
        batch = build_batch(plan, self.block_size, self.base.device, self.states)
        self.forward(batch, bindings=self.pool.all_bindings())

    @torch.inference_mode()
    def load(self, placement: AdapterPlacement) -> None:
        """Copy an adapter to the device, or start to."""
        self.loads.start(placement, self.host[placement.digest])

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Empty a slot of the pool whose adapter has gone."""
        self.loads.clear(slot)

    @torch.inference_mode()
    def start(self, plan: ScheduledBatch, settle: Callable[[], None] = lambda: None) -> Draw:
        """Run a plan's tokens and sample the rows that are due, in order: on a GPU, queue it.

        `settle` records the steps before. It is called once this step's forward is queued, if a row
        of structured output ends in a token that only the device knows: which tokens may follow
        depends on it. The device goes on meanwhile.
        """
        logits = self.logits(plan)
        best, prompts = self._best, self._prompts
        due = [scheduled.row for scheduled in plan.rows if scheduled.samples]
        if any(row.matcher is not None and row.token_ids[-1] < 0 for row in due):
            settle()
        found = draw(logits, due, best, self._drawn, prompts)
        self._drawn[: len(found.token_ids)] = found.token_ids
        return found

    @torch.inference_mode()
    def check(self) -> None:
        """Run one token of the base, outside of cache and pool, and wait for it.

        Raises what the device raises: after an error that took the device away, anything does.
        """
        one = torch.zeros(1, dtype=torch.int64, device=self.base.device)
        attention = VarlenAttention([RowLengths([1])], self.base.device)
        self.base.forward(one, one, attention, one).cpu()

    def logits(self, plan: ScheduledBatch) -> Tensor:
        """Logits (n, vocab) of the rows of a plan that sample; writes the cache."""
        self._best, self._prompts = None, []
        if self.graphs is not None:
            replayed = self.graphs.run(plan, self.pool.layout)
            if replayed is not None:
                logits, self._best = replayed
                return logits
        batch = build_batch(plan, self.block_size, self.base.device, self.states)
        return self.forward(batch, reordered_batch(plan, batch, self.cache))

    def _one_torch_thread(self) -> AbstractContextManager[None]:
        """Where layers are fused and the library multiplies, torch has little to do, and threads
        that help it would look for more for milliseconds, on cores that the library wants.
        """
        if not self._leaves_torch_little:
            return nullcontext()
        return threads(of_torch=1, of_library=num_threads())

    def _forward_and_choose(self, batch: ForwardBatch) -> Outputs:
        logits = self.forward(batch)
        return logits, most_likely(logits)

    def forward(
        self,
        batch: ForwardBatch,
        layer_steps: LayerSteps | None = None,
        bindings: Mapping[str, PooledBinding] | None = None,
    ) -> Tensor:
        """Logits (n, vocab) of the rows that sample; writes the cache. The tokens of prompts are
        scored where that is wanted.

        A token −1 − r is what the step before gave row r of those that sampled. `bindings`: the
        pool's own, if not given.
        """
        drawn = self._drawn[(-1 - batch.token_ids).clamp(min=0)]
        token_ids = torch.where(batch.token_ids < 0, drawn, batch.token_ids)
        attention = layer_steps or PagedAttention(
            self.cache, batch.attention, recurrence=batch.recurrence
        )
        bound = self.pool.bindings if bindings is None else bindings
        adapters = self.base.context.adapters(batch.adapters, bound, batch.head_adapters)
        with adapters, self._one_torch_thread():
            if not batch.scored:
                return self.base.forward(token_ids, batch.positions, attention, batch.logits_at)
            states = self.base.hidden_states(token_ids, batch.positions, attention)
            logits = self.base.logits(states[batch.logits_at])
        for scored in batch.scored:
            with self.base.context.adapters(None, bound, scored.head_adapters):
                own = self.base.logits(states[scored.positions])
            self._prompts.append(PromptScores.of(own, scored))
        return logits


def _are_compiled(base: Base) -> bool:
    """True if products with all of the base's weights run in the CPU's compiled library."""
    return all(
        layer.is_compiled_for(torch.empty(0, layer.in_features, dtype=base.dtype))
        for layer in base.model.modules()
        if isinstance(layer, FrozenLinear)
    )


def _warm_plan(num_tokens: int, slots: tuple[int, ...], block_size: int) -> ScheduledBatch:
    """A decode row beside a prompt, `num_tokens` tokens in all."""
    rows, uses = [], tuple(AdapterUse(digest="") for _ in slots)
    for length, start in ((num_tokens - 1, 0), (2, 1)):
        sampling = SamplingParams(max_tokens=1)
        request = Request(
            request_id="", prompt_token_ids=(0,) * length, sampling=sampling, adapters=uses
        )
        row = Row.of(request)
        row.slots, row.block_table = slots, list(range(-(-length // block_size)))
        rows.append(ScheduledRow(row, start, length - start))
    return ScheduledBatch(tuple(rows))
