"""The engine: step = schedule → start → commit. Single-threaded; `loop.py` gives it a thread."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from lora_runtime.adapters.config.layer_sites import check_depth
from lora_runtime.adapters.host_cache import HostCache
from lora_runtime.adapters.packed_adapter import PackedAdapter, pack_for
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.adapters.serving_form import ServingForm
from lora_runtime.adapters.slot_table import SlotTable
from lora_runtime.base.catalog import resolve_base
from lora_runtime.base.device import check_memory, resolve_device, resolve_dtype
from lora_runtime.base.loader import Base, load_base
from lora_runtime.base.outline import outline
from lora_runtime.config import EngineConfig
from lora_runtime.core import (
    ANY_FOLDER,
    MAX_PROMPT_LOGPROBS,
    AdapterUse,
    FinishReason,
    FolderRules,
    Request,
    Row,
    RowStatus,
    ScheduledBatch,
    ScheduledRow,
    StepOutput,
)
from lora_runtime.engine.admission import admit
from lora_runtime.engine.block_manager import BlockManager
from lora_runtime.engine.client import EngineInfo, EngineStats, LoadedAdapter
from lora_runtime.engine.cpu_capture import CpuCapture, can_capture_on_cpu
from lora_runtime.engine.decode_graphs import CudaCapture
from lora_runtime.engine.load import AdapterLoad
from lora_runtime.engine.memory_budget import check_states, num_kv_blocks, num_state_slots
from lora_runtime.engine.model_runner import ModelRunner
from lora_runtime.engine.sampler import Draw
from lora_runtime.engine.scheduler import Scheduler, terminal_output
from lora_runtime.engine.state_slots import StatefulBlockManager, num_snapshots
from lora_runtime.errors import AdapterNotFound, InvalidRequest, LoramuxError, PromptTooLong
from lora_runtime.kernels import BACKEND, LIBRARY_MISSING, adapter_dtype
from lora_runtime.kernels.compiling import watch_compiles

log = logging.getLogger(__name__)

USUAL_MAX_RANK = 64
"""Graphs are captured for adapters of up to this rank; one of a larger rank captures them anew."""


def load_engine(config: EngineConfig, on_progress: Callable[[str], None] | None = None) -> Engine:
    """Load a base and build its engine, ready to run; blocks. Raises as `load_base`; ConfigError
    for states that the device has no memory for, before the weights are read.
    """
    say = on_progress or (lambda _: None)
    found = resolve_base(config.base.model, on_progress=on_progress)
    device = resolve_device(config.base.device)
    described = outline(found.folder, resolve_dtype(config.base.dtype, device))
    check_states(described.state_bytes, device, config)
    base = load_base(config.base, on_progress, found)
    if base.device.type == "cuda":
        watch_compiles()
    with current_device(base.device):
        engine = Engine(base, config)
        is_cpu = base.device.type == "cpu"
        num_threads = torch.get_num_threads()
        threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
        where = threads if is_cpu else str(base.device)
        say(f"computing in {base.spec.dtype} by {engine.info.kernel_backend} on {where}")
        if is_cpu and BACKEND == "torch":
            log.warning("%s", LIBRARY_MISSING)
        say(f"the base takes {base.nbytes / 1e6:,.0f} MB")
        say(f"the cache has room for {engine.info.num_blocks * engine.info.block_size} tokens")
        if states := num_state_slots(base.spec.state_bytes, config):
            kept = num_snapshots(config)
            say(
                f"beside it are {states} recurrent states of {base.spec.state_bytes} bytes each, "
                f"{kept} of them snapshots"
            )
        elif config.cache.state_snapshots is not None:
            say("state_snapshots is of no use: the base has no recurrent layers")
        engine.runner.warm_up(say)
    return engine


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the thread's own: every thread begins with the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Engine:
    """Requests in, step outputs out, over one base and the adapters added to it."""

    def __init__(self, base: Base, config: EngineConfig) -> None:
        self.base, self.config = base, config
        like = torch.empty(0, dtype=adapter_dtype(base.device, base.dtype), device=base.device)
        max_slots = config.adapters.max_slots
        self.host = HostCache(config.adapters.host_bytes)
        has_state = base.spec.state_bytes > 0
        # How many segments a mixture's pairs have is read on the host.
        is_cuda = base.device.type == "cuda"
        has_graphs = config.cuda_graphs and is_cuda and not base.spec.routers
        check_memory(base.device, config.adapters.pool_bytes, "adapter_pool_bytes")
        self.pool = AdapterPool(
            base.spec.shapes,
            config.adapters.pool_bytes,
            max_slots,
            like,
            bound=base.spec.linears if has_graphs else None,
            max_rank=USUAL_MAX_RANK if is_cuda else 0,  # what the warm-up compiles kernels for
        )
        num_blocks = num_kv_blocks(base, config)
        self.blocks = _block_manager(config, num_blocks, has_state)
        self.slots = SlotTable(self.pool.nbytes, max_slots)
        self.scheduler = Scheduler(config.scheduler, self.blocks, self.slots)
        cache = base.allocate_kv(num_blocks * config.cache.block_size)
        states = base.allocate_states(num_state_slots(base.spec.state_bytes, config))
        max_num_seqs = config.scheduler.max_num_seqs
        self.runner = ModelRunner(
            base, cache, config.cache.block_size, self.pool, self.host, max_num_seqs, states
        )
        self.info = _info(base, config, num_blocks, self.pool.nbytes)
        if has_graphs or (can_capture_on_cpu(base) and not has_state):
            capture = CudaCapture(base.device) if has_graphs else CpuCapture()
            self.runner.use_graphs(self.info.max_num_seqs, self.info.max_model_len, capture)
        self.num_steps_ahead = int(is_cuda)
        """0, or 1: a step runs on the device while the next one is planned and queued."""
        self._started: deque[tuple[ScheduledBatch, Draw]] = deque()
        self._live: dict[str, Row] = {}
        self._outputs: list[StepOutput] = []
        """Made and not yet taken: they are not lost with what is raised behind them."""
        self._num_steps = 0

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle and not self._started

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises InvalidRequest, AdapterNotFound, AdapterTooLarge or Overloaded.
        """
        self._check(request)
        self.slots.check_fits([use.digest for use in request.adapters])
        row = admit(request, [self.host[use.digest] for use in request.adapters], self.info)
        self.scheduler.add(row)
        self._live[request.request_id] = row

    def abort(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.CANCELLED,
        error: LoramuxError | None = None,
    ) -> list[StepOutput]:
        """End a request before its next step, freeing all it holds; no output if it is over."""
        row = self._live.pop(request_id, None)
        if row is None or row.status is RowStatus.FINISHED:
            return []
        return [self.scheduler.end(row, reason, error)]

    def abort_all(self, error: LoramuxError) -> list[StepOutput]:
        """End every request with `error`, whatever has happened before."""
        outputs, reason = self.take_outputs(), FinishReason.ERROR
        for row in self._live.values():
            if row.status is RowStatus.FINISHED:
                continue  # its end is among what was taken
            try:
                outputs.append(self.scheduler.end(row, reason, error))
            except Exception:  # what keeps count of blocks and slots may be what broke
                row.status = RowStatus.FINISHED
                outputs.append(terminal_output(row, reason, error))
        self._live.clear()
        return outputs

    def take_outputs(self) -> list[StepOutput]:
        """Return the outputs since the last call, also those of a step or command that raised."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def add_adapter(self, form: ServingForm) -> None:
        """Pack an adapter and keep its bytes; `form` may be freed. Raises as `add_packed`."""
        self.add_packed(pack_for(self.base, form))

    def load_adapter(self, folder: Path, rules: FolderRules = ANY_FOLDER) -> LoadedAdapter:
        """Read, check and keep an adapter, all on this thread. Raises as `EngineClient`'s."""
        load = AdapterLoad.read(folder, self.base, rules)
        packed = load.pack(self.info.max_adapter_layers)
        load.gate(packed)
        self.add_packed(packed)
        return load.loaded(packed)

    def add_packed(self, adapter: PackedAdapter) -> None:
        """Keep an adapter, or gain a reference to its content.

        Raises AdapterTooLarge, Overloaded where host memory has no room for it, and AdapterRefused
        for more layers than are served.
        """
        check_depth(adapter.facts.layer_map, self.info.max_adapter_layers)
        if adapter.digest not in self.host:
            self.host.check_room(adapter.nbytes)
            self.slots.register(adapter.digest, adapter.nbytes)
        self.host.add(adapter)

    def drop_adapter(self, digest: str, *, ending: Collection[str] = ()) -> list[StepOutput]:
        """Give up one reference; with the last, new requests fail. The requests of the ids `ending`
        end now, and their outputs are returned.
        """
        if not self.host.is_referenced(digest):
            raise AdapterNotFound(f"no adapter with digest {digest[:12]} is loaded")
        self.host.drop(digest)
        self._outputs += [output for request_id in ending for output in self.abort(request_id)]
        self.collect()
        return self.take_outputs()

    def pin_adapter(self, digest: str, *, is_pinned: bool = True) -> None:
        """Keep an adapter in the pool whether or not requests use it, or no longer.

        Raises AdapterNotFound, AdapterTooLarge (field `pin`) where others would find no place any
        more, and Overloaded while running requests fill the pool.
        """
        if not self.host.is_referenced(digest):
            raise AdapterNotFound(f"no adapter with digest {digest[:12]} is loaded")
        if not is_pinned:
            self.slots.let_go(digest)
            return
        together = [[use.digest for use in row.request.adapters] for row in self._live.values()]
        placement = self.slots.keep(digest, together)
        if placement is None:
            return
        try:
            self.runner.load(placement)
        except Exception:
            self.slots.let_go(digest)
            self.slots.evict(digest)
            raise

    def collect(self) -> list[str]:
        """Free every dropped adapter that no live request uses; returns their digests."""
        dropped = self.host.unreferenced()
        if not dropped:
            return []
        used = {use.digest for s in self._live.values() for use in s.request.adapters}
        freed = [digest for digest in dropped if digest not in used]
        for digest in freed:
            self.slots.forget(digest)
            self.host.remove(digest)
            self.blocks.forget_adapter(digest)
        self._clear_slots()
        return freed

    def _clear_slots(self) -> None:
        """Empty the slots whose adapters have gone; one that cannot be is tried again. No row is
        under it before another adapter is copied there.
        """
        for slot in self.slots.vacated:
            try:
                self.runner.clear(slot)
            except Exception:
                log.exception("slot %d of the adapter pool could not be emptied", slot)
            else:
                self.slots.cleared(slot)

    def step(self) -> list[StepOutput]:
        """Plan a step, start it, and record what is done: this one, or the one before it.

        A row that cannot be planned, run, sampled or recorded ends with RequestFailed, and the
        others go on. Where a step's results cannot be read, all of its rows end so. Raises what the
        device raises when not even the base runs any more; `take_outputs` has what came before.
        """
        self._outputs += self._expire()
        plan = self.scheduler.schedule(self.runner.loads.in_progress())
        self._outputs += plan.failed
        plan = self._load(plan)
        if not plan.rows:
            if not self._started:
                self.runner.loads.wait()
            self._commit(num_steps_ahead=0)
        elif self._start(plan):
            self._commit(self.num_steps_ahead)
        else:
            self._commit(num_steps_ahead=0)
            self._run_each(plan)
        self._num_steps += 1
        outputs = self.take_outputs()
        for output in outputs:
            if output.finish_reason is not None:
                self._live.pop(output.request_id, None)
        return outputs

    def _load(self, plan: ScheduledBatch) -> ScheduledBatch:
        """Copy the adapters that a plan asks for, or start to. One that cannot be copied ends its
        rows: the plan without them.
        """
        self._clear_slots()
        for placement in plan.loads:
            try:
                self.runner.load(placement)
            except Exception as cause:
                users = [s for s in self.scheduler.running if _uses(s, placement.digest)]
                self._outputs += [self.scheduler.fail(row, cause) for row in users]
                self.slots.evict(placement.digest)
        rows = tuple(
            scheduled for scheduled in plan.rows if scheduled.row.status is RowStatus.RUNNING
        )
        return replace(plan, rows=rows)

    def _start(self, plan: ScheduledBatch) -> bool:
        """Start a plan; False when something went wrong with one of its rows, or with all."""
        try:
            drawn = self.runner.start(plan, lambda: self._commit(num_steps_ahead=0))
            self._started.append((plan, drawn))
        except Exception:
            log.exception("a step of %d rows failed; each is run alone", len(plan.rows))
            return False
        self.scheduler.advance(plan)
        return True

    def _commit(self, num_steps_ahead: int) -> None:
        """Record started steps until `num_steps_ahead` of them are left."""
        while len(self._started) > num_steps_ahead:
            plan, drawn = self._started.popleft()
            try:
                sampled, prompts = drawn.result(), drawn.prompt_chunks()
            except Exception as cause:  # nothing tells which of the rows it was
                self._outputs += [self.scheduler.fail(row, cause) for row in _live(plan)]
                self.runner.check()
            else:
                self._outputs += self.scheduler.commit(plan, sampled, prompts)

    def _run_each(self, plan: ScheduledBatch) -> None:
        """Run the rows of a failed step one by one, with no step in flight; those that fail end.

        A row's keys and values are only its own, so that writing them again changes nothing. A
        recurrent state is not what it was before the step: it is computed again as well.
        """
        num_run = num_failed = 0
        for scheduled in plan.rows:
            if scheduled.row.status is not RowStatus.RUNNING:
                continue  # a step that was in flight ended it
            num_run += 1
            alone = ScheduledBatch((scheduled,))
            try:
                for before in self._state_again(scheduled):
                    self.runner.start(before).result()
                drawn = self.runner.start(alone)
                sampled, prompts = drawn.result(), drawn.prompt_chunks()
            except Exception as cause:
                num_failed += 1
                self._outputs.append(self.scheduler.fail(scheduled.row, cause))
            else:
                self.scheduler.advance(alone)
                self._outputs += self.scheduler.commit(alone, sampled, prompts)
        if num_failed == num_run:
            self.runner.check()

    def _state_again(self, scheduled: ScheduledRow) -> Iterator[ScheduledBatch]:
        """Steps after which a row's state is again what it was before `scheduled`."""
        row = scheduled.row
        if not self.base.spec.state_bytes:
            return
        first = 0 if row.resumed is None else row.resumed[0]
        longest = self.info.max_num_batched_tokens
        for start in range(first, scheduled.start, longest):
            num_tokens = min(longest, scheduled.start - start)
            yield ScheduledBatch((ScheduledRow(row, start, num_tokens, samples=False),))

    def stats(self) -> EngineStats:
        """A snapshot for metrics and people."""

        def digests(rows: list[Row]) -> tuple[str, ...]:
            return tuple(sorted({use.digest for s in rows for use in s.request.adapters}))

        return EngineStats(
            is_alive=True,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            waiting_by_client=self.scheduler.waiting.by_client(),
            kv_blocks_used=self.blocks.num_used,
            kv_blocks_total=self.blocks.num_blocks,
            pool_bytes_used=self.slots.num_bytes_used,
            pool_bytes_total=self.pool.nbytes,
            num_preemptions=self.scheduler.num_preemptions,
            num_prefix_queries=self.blocks.num_prefix_queries,
            num_prefix_hits=self.blocks.num_prefix_hits,
            num_steps=self._num_steps,
            running_adapters=digests(self.scheduler.running),
            waiting_adapters=digests(list(self.scheduler.waiting)),
            resident_adapters=self.slots.resident,
            num_adapter_loads=self.slots.num_loads,
            num_adapter_evictions=self.slots.num_evictions,
            states=self.blocks.state_stats,
        )

    def check_integrity(self) -> None:
        """Assert that all bookkeeping agrees. For tests and idle moments."""
        self.scheduler.check_integrity()
        assert set(map(id, self._live.values())) == set(map(id, self.scheduler.rows()))

    def _expire(self) -> list[StepOutput]:
        now = time.monotonic()
        late = [
            request_id
            for request_id, row in self._live.items()
            if row.request.deadline is not None and row.request.deadline <= now
        ]
        return [output for request_id in late for output in self.abort(request_id)]

    def _check(self, request: Request) -> None:
        """Raise InvalidRequest or AdapterNotFound for a request that cannot run.

        Ids are checked here because they index tables on the device, where nothing checks them.
        """
        if request.request_id in self._live:
            raise InvalidRequest(
                f"request_id {request.request_id!r} is in use; send another", field="request_id"
            )
        num_prompt, longest = len(request.prompt_token_ids), self.info.max_model_len
        if not num_prompt:
            raise InvalidRequest("the prompt is empty; send at least one token", field="prompt")
        if num_prompt >= longest:
            raise PromptTooLong(
                f"the prompt has {num_prompt} tokens; at most {longest - 1} fit", field="prompt"
            )
        if num_prompt + request.sampling.max_tokens > longest:
            raise InvalidRequest(
                f"sampling.max_tokens is {request.sampling.max_tokens}; after a prompt of "
                f"{num_prompt} tokens at most {longest - num_prompt} fit",
                field="sampling.max_tokens",
            )
        self._check_token_ids(request.prompt_token_ids, "prompt")
        self._check_token_ids(request.sampling.stop_token_ids, "sampling.stop_token_ids")
        biased = [token_id for token_id, _ in request.sampling.logit_bias]
        self._check_token_ids(biased, "sampling.logit_bias")
        _check_prompt_logprobs(num_prompt, request.sampling.num_prompt_logprobs)
        if (request.structure is None) != (request.sampling.structured_output is None):
            raise InvalidRequest(
                "sampling.structured_output has not been compiled for this request",
                field="sampling.structured_output",
            )
        for index, use in enumerate(request.adapters):
            self._check_use(use, f"adapters[{index}]")

    def _check_token_ids(self, token_ids: Collection[int], field: str) -> None:
        """Every id is used as an index into the vocabulary."""
        vocab_size = self.base.spec.vocab_size
        if not all(0 <= token_id < vocab_size for token_id in token_ids):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
            raise InvalidRequest(
                f"{field} holds token id {wrong}; ids must be between 0 and {vocab_size - 1}",
                field=field,
            )

    def _check_use(self, use: AdapterUse, field: str) -> None:
        if not self.host.is_referenced(use.digest):
            raise AdapterNotFound(f"no adapter with digest {use.digest[:12]} is loaded")
        if not math.isfinite(use.weight):
            raise InvalidRequest(
                f"{field}.weight is {use.weight!r}; it must be finite", field=f"{field}.weight"
            )
        if use.start_position < 0:
            raise InvalidRequest(
                f"{field}.start_position is {use.start_position}; it must not be negative",
                field=f"{field}.start_position",
            )


def _check_prompt_logprobs(num_prompt_tokens: int, num_top: int | None) -> None:
    if num_top is not None and num_prompt_tokens * (1 + num_top) > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"sampling.prompt_logprobs is {num_top}; with {num_prompt_tokens} tokens at most "
            f"{MAX_PROMPT_LOGPROBS // num_prompt_tokens - 1} are given",
            field="sampling.prompt_logprobs",
        )


def _live(plan: ScheduledBatch) -> list[Row]:
    rows = (scheduled.row for scheduled in plan.rows)
    return [row for row in rows if row.status is not RowStatus.FINISHED]


def _uses(row: Row, digest: str) -> bool:
    return any(use.digest == digest for use in row.request.adapters)


def _block_manager(config: EngineConfig, num_blocks: int, has_state: bool) -> BlockManager:
    cache = config.cache
    if not has_state:
        return BlockManager(num_blocks, cache.block_size, enable_prefix_cache=cache.prefix_cache)
    return StatefulBlockManager(
        num_blocks,
        cache.block_size,
        num_rows=config.scheduler.max_num_seqs,
        num_snapshots=num_snapshots(config),
        enable_prefix_cache=cache.prefix_cache,
    )


def _info(base: Base, config: EngineConfig, num_blocks: int, pool_bytes: int) -> EngineInfo:
    limit = config.scheduler.max_model_len or base.spec.max_model_len
    return EngineInfo(
        base=base.spec,
        kernel_backend=BACKEND,
        max_model_len=min(limit, base.spec.max_model_len, num_blocks * config.cache.block_size),
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        block_size=config.cache.block_size,
        num_blocks=num_blocks,
        pool_bytes=pool_bytes,
        max_slots=config.adapters.max_slots,
        max_adapter_layers=config.adapters.layer_limit(base.spec.num_layers),
        num_snapshots=num_snapshots(config) if base.spec.state_bytes else 0,
        max_queued_requests=config.scheduler.max_queued_requests,
    )
