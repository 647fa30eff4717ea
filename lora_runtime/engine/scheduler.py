"""Which tokens run in the next step. Bookkeeping only: ints, no tensors, no device.

A step first takes the rows that need one token; where prompts wait, up to half of its tokens. The
rest goes to prompts, running ones and new ones: always the next of the client that has been served
least. A long prompt is split into chunks that share the step with other rows.
Who begins takes a free row and free blocks, or those of a client that has been served at least as
much and holds at least two rows more: its youngest row gives way. So does a row when a running one
needs a block and none is left. Which one: the youngest of the client with the most rows, never the
oldest of all, which so comes to its end. What gave way is computed again later (recompute
preemption). A sequence starts after the leading blocks that the prefix cache still holds for it.
One whose adapters find no room in the pool is passed over by the others, but not for ever: after
so many steps no other adapter is brought in or kept in use by new rows until its own have room.
One whose adapter is still being copied to the device runs with nothing to do.
A step can be planned before the one ahead of it is committed: `advance` counts a started step as
done, its new tokens being known to the device alone. A row that turns out to be over by then has
run once in vain.
Source: continuous batching, Orca (OSDI '22); chunked prefill, Sarathi (arXiv:2308.16369); fair
shares, VTC (arXiv:2401.00588).
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter
from collections.abc import Sequence as AbstractSequence
from collections.abc import Set as AbstractSet

from lora_runtime.adapters.slot_table import SlotTable
from lora_runtime.config import SchedulerConfig
from lora_runtime.core import (
    FinishReason,
    RequestTiming,
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
    StepOutput,
    TokenLogprob,
)
from lora_runtime.engine.block_manager import BlockManager
from lora_runtime.engine.fair_shares import FairShares
from lora_runtime.engine.queue_places import check_place
from lora_runtime.engine.step_plan import StepPlan
from lora_runtime.engine.waiting_queue import WaitingQueue
from lora_runtime.errors import AdapterFailed, LoramuxError, RequestFailed

log = logging.getLogger(__name__)

MAX_STEPS_PASSED_OVER = 100
"""Steps after which a sequence whose adapters find no room is passed over no more."""


class Scheduler:
    """Waiting and running sequences, and the blocks and slots they hold."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, slots: SlotTable) -> None:
        self._config, self._blocks, self._slots = config, blocks, slots
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        """Those that began first come first."""
        self.num_preemptions = 0
        self._shares = FairShares()
        self._next_in_pool: Sequence | None = None
        """Was passed over too often: until it has begun no other row under adapters does."""

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises Overloaded as `check_place`."""
        num_own = self.waiting.num_of(sequence.request.client)
        check_place(self._config.max_queued_requests, len(self.waiting), num_own)
        self.waiting.arrive(sequence)
        self._shares.enter(sequence.request.client)

    def sequences(self) -> list[Sequence]:
        """Every live sequence, running ones first."""
        return [*self.running, *self.waiting]

    def end(
        self, sequence: Sequence, reason: FinishReason, error: LoramuxError | None = None
    ) -> StepOutput:
        """Finish a sequence now, free all it holds and give its terminal output."""
        self._remove(sequence)
        return terminal_output(sequence, reason, error)

    def fail(self, sequence: Sequence, cause: Exception) -> StepOutput:
        """Finish a sequence that something unforeseen went wrong with."""
        request_id = sequence.request.request_id
        log.error("request %s failed", request_id, exc_info=cause)
        error = RequestFailed(f"something unforeseen ended request {request_id}; see the log")
        return self.end(sequence, FinishReason.ERROR, error)

    def schedule(self, loading: AbstractSet[str] | None = None) -> ScheduledBatch:
        """Plan one step. The plan may be without rows when nothing can run yet.

        `loading`: digests of adapters that are being copied; rows under one of them, or under one
        that this plan loads, get no tokens. None: a plan's copies are done before its rows run.
        """
        step = StepPlan(self._config.max_num_batched_tokens, loading)
        turns = self._turns()
        self._plan_single_tokens(step, step.budget - step.budget // 2 if turns else step.budget)
        while step.budget > 0 and turns:
            client = heapq.heappop(turns)[-1]
            if self._plan_prompt(client, step):
                num_rows = sum(row.request.client == client for row in self.running)
                heapq.heappush(turns, self._turn(client, num_rows))
        self._plan_single_tokens(step, step.budget)
        return step.batch()

    def advance(self, batch: ScheduledBatch) -> None:
        """Count a plan that has been started as done; what it samples is pending."""
        num_sampled = 0
        for row in batch.sequences:
            row.sequence.num_computed_tokens = row.end
            if row.samples:
                row.sequence.token_ids.append(-1 - num_sampled)
                num_sampled += 1

    def commit(
        self, batch: ScheduledBatch, sampled: AbstractSequence[SampledToken]
    ) -> list[StepOutput]:
        """Record the results of a plan that was advanced, before those of any later one.

        `sampled` has one entry per sequence that samples, in order. Sequences that have ended
        since are passed over; one that was preempted gets its token, and has no blocks to share.
        One that cannot be recorded fails alone.
        """
        outputs, results = [], iter(sampled)
        for row in batch.sequences:
            result = next(results) if row.samples else None
            if row.sequence.status is SequenceStatus.FINISHED:
                continue
            try:
                output = self._record(row, result)
            except Exception as cause:
                output = self.fail(row.sequence, cause)
            if output is not None:
                outputs.append(output)
        return outputs

    def _record(self, row: ScheduledSequence, result: SampledToken | None) -> StepOutput | None:
        if result is not None and not result.is_finite:
            return self._fail_non_finite(row.sequence)
        if row.sequence.status is SequenceStatus.RUNNING:
            self._blocks.publish(row.sequence, row.end)
        return None if result is None else self._accept(row.sequence, row.end, result)

    def check_integrity(self) -> None:
        """Assert that blocks, slots, pins and shares agree with the live sequences."""
        self._blocks.check_integrity(self.running)
        uses = (use.digest for row in self.running for use in row.request.adapters)
        self._slots.check_integrity(Counter(uses))
        self._shares.check_integrity(_num_by_client(self.sequences()))
        assert not any(sequence.block_table for sequence in self.waiting)
        assert self._next_in_pool is None or self._next_in_pool in list(self.waiting)

    def _turns(self) -> list[tuple[int, int, int, str]]:
        """A heap of the clients that have prompts, running or waiting."""
        clients = {row.request.client for row in self.running if row.num_uncomputed_tokens > 1}
        num_rows = _num_by_client(self.running)
        everyone = clients.union(self.waiting.clients)
        turns = [self._turn(client, num_rows[client]) for client in everyone]
        heapq.heapify(turns)
        return turns

    def _turn(self, client: str, num_rows: int) -> tuple[int, int, int, str]:
        """Sorts clients: served least, then with the fewest rows, then by arrival."""
        ticket = self.waiting.first_ticket(client)
        return self._shares.counter(client), num_rows, ticket, client

    def _plan_single_tokens(self, step: StepPlan, limit: int) -> None:
        """Plan up to `limit` running rows that need one token."""
        for sequence in list(self.running):
            if limit <= 0:
                return
            if sequence.num_uncomputed_tokens == 1 and self._plan_running(sequence, step):
                limit -= 1

    def _plan_prompt(self, client: str, step: StepPlan) -> bool:
        """Plan the next chunk of a client's prompts; False when it has none that can run."""
        for sequence in list(self.running):
            if sequence.request.client != client or sequence.num_uncomputed_tokens == 1:
                continue
            if self._plan_running(sequence, step):
                return True
        if step.is_short_of_blocks:
            return False
        for sequence in self.waiting.of(client):
            if sequence in step.seen:
                continue
            step.seen.add(sequence)
            try:
                if not self._has_pool_room(sequence, step):
                    continue
                if not self._begin(sequence, step):
                    return False
            except Exception as cause:
                step.failed.append(self.fail(sequence, cause))
                continue
            if not step.lacks_adapter(sequence):
                num_tokens = step.num_fitting(sequence)
                self._blocks.grow(sequence, sequence.num_computed_tokens + num_tokens)
                self._shares.charge(step.add(sequence, num_tokens))
            return True
        return False

    def _plan_running(self, sequence: Sequence, step: StepPlan) -> bool:
        """Plan the next tokens of a row that runs, if it can run, once."""
        if sequence.status is not SequenceStatus.RUNNING or sequence in step:
            return False
        if step.lacks_adapter(sequence) or _has_all_tokens(sequence):
            return False
        num_tokens = step.num_fitting(sequence)
        if num_tokens <= 0 or not self._grow(sequence, num_tokens, step):
            return False
        self._shares.charge(step.add(sequence, num_tokens))
        return True

    def _grow(self, sequence: Sequence, num_tokens: int, step: StepPlan) -> bool:
        """Grow a row's blocks while others give way; False when it must itself, or wait for those
        that begin in this step.
        """
        while not self._blocks.grow(sequence, sequence.num_computed_tokens + num_tokens):
            step.is_short_of_blocks = True
            victim = _youngest_of_most([row for row in self.running if row not in step.admitted])
            if victim is not sequence or not step.admitted:
                self._preempt(victim, step)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, step: StepPlan) -> None:
        step.drop(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.put_back(sequence)

    def _has_pool_room(self, sequence: Sequence, step: StepPlan) -> bool:
        """Whether the adapters of a waiting sequence can be brought to the device now."""
        digests = tuple(use.digest for use in sequence.request.adapters)
        if digests and self._next_in_pool not in (None, sequence):
            return False
        if digests not in step.without_room:
            if self._slots.has_room(digests):
                return True
            step.without_room.add(digests)
        sequence.num_steps_passed_over += 1
        if sequence.num_steps_passed_over >= MAX_STEPS_PASSED_OVER:
            self._next_in_pool = self._next_in_pool or sequence
        return False

    def _begin(self, sequence: Sequence, step: StepPlan) -> bool:
        """Move a waiting sequence to running if there is a row, and blocks for all its tokens, or
        if others owe them; nobody gives way in vain.
        """
        found: list[int] | None = None
        leaving: list[Sequence] = []
        while True:
            if len(self.running) - len(leaving) < self._config.max_num_seqs:
                found = self._blocks.find(sequence) if found is None else found
                if self._blocks.has_room(sequence, found, leaving):
                    break
            victim = self._owing(sequence, leaving, step)
            if victim is None:
                return False
            leaving.append(victim)
        for victim in leaving:
            self._preempt(victim, step)
            step.without_room.clear()
        return self._place(sequence, found, step)

    def _owing(
        self, sequence: Sequence, leaving: AbstractSequence[Sequence], step: StepPlan
    ) -> Sequence | None:
        """A row, beside those `leaving`, that gives way to a waiting sequence."""
        client = sequence.request.client
        num_own = sum(row.request.client == client for row in self.running)
        served = self._shares.counter(client)
        rows = [
            row
            for row in self.running
            if row not in leaving
            and row not in step.admitted
            and self._shares.counter(row.request.client) >= served
        ]
        if not rows:
            return None
        victim = _youngest_of_most(rows)
        num_theirs = sum(row.request.client == victim.request.client for row in rows)
        return victim if num_theirs > num_own + 1 else None

    def _place(self, sequence: Sequence, found: list[int], step: StepPlan) -> bool:
        slots = self._acquire_slots(sequence, step)
        if slots is None:
            return False
        try:
            self._blocks.share(sequence, found)
        except Exception:
            for use in sequence.request.adapters:
                self._slots.release(use.digest)
            raise
        self._leave_queue(sequence)
        sequence.slots, sequence.status = slots, SequenceStatus.RUNNING
        sequence.first_scheduled = sequence.first_scheduled or time.monotonic()
        sequence.num_steps_passed_over = 0
        self.running.append(sequence)
        step.admitted.add(sequence)
        return True

    def _leave_queue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        if self._next_in_pool is sequence:
            self._next_in_pool = None

    def _acquire_slots(self, sequence: Sequence, step: StepPlan) -> tuple[int, ...] | None:
        acquired = self._slots.acquire([use.digest for use in sequence.request.adapters])
        if acquired is None:
            return None
        step.loads.extend(got.load for got in acquired if got.load is not None)
        return tuple(got.slot for got in acquired)

    def _fail_non_finite(self, sequence: Sequence) -> StepOutput:
        self._blocks.retract(sequence)
        error = AdapterFailed(
            "the model gave non-finite logits for this request; its adapter's weights overflow"
            if sequence.request.adapters
            else "the model gave non-finite logits for this request"
        )
        return self.end(sequence, FinishReason.ERROR, error)

    def _accept(self, sequence: Sequence, position: int, result: SampledToken) -> StepOutput:
        sequence.token_ids[position] = result.token_id
        sequence.first_token = sequence.first_token or time.monotonic()
        reason = _finish_reason(sequence, position)
        logprobs = () if result.logprob is None else (result.logprob,)
        if reason is None:
            return StepOutput(
                request_id=sequence.request.request_id,
                token_ids=(result.token_id,),
                logprobs=logprobs,
            )
        self._remove(sequence)
        return terminal_output(sequence, reason, None, (result.token_id,), logprobs)

    def _remove(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._release(sequence)
        else:
            self._leave_queue(sequence)
        self._shares.leave(sequence.request.client)
        sequence.status = SequenceStatus.FINISHED

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.release(sequence)
        for use in sequence.request.adapters:
            self._slots.release(use.digest)
        sequence.slots = ()


def _num_by_client(sequences: AbstractSequence[Sequence]) -> Counter[str]:
    return Counter(sequence.request.client for sequence in sequences)


def _youngest_of_most(rows: AbstractSequence[Sequence]) -> Sequence:
    """Of the client with the most of these running rows the one that began last."""
    counts = _num_by_client(rows)
    most = max(counts.values())
    return next(row for row in reversed(rows) if counts[row.request.client] == most)


def _has_all_tokens(sequence: Sequence) -> bool:
    """True when the running step gives the last one."""
    return sequence.num_output_tokens >= sequence.request.sampling.max_tokens


def _finish_reason(sequence: Sequence, position: int) -> FinishReason | None:
    sampling = sequence.request.sampling
    if sequence.token_ids[position] in sampling.stop_token_ids:
        return FinishReason.STOP
    num_output_tokens = position + 1 - sequence.num_prompt_tokens
    return FinishReason.LENGTH if num_output_tokens >= sampling.max_tokens else None


def terminal_output(
    sequence: Sequence,
    reason: FinishReason,
    error: LoramuxError | None,
    token_ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprob, ...] = (),
) -> StepOutput:
    """The last output of a request, with how long each of its phases took."""
    now, arrival = time.monotonic(), sequence.request.arrival
    scheduled = sequence.first_scheduled or now
    first_token = sequence.first_token or now
    timing = RequestTiming(
        queue_s=scheduled - arrival, prefill_s=first_token - scheduled, decode_s=now - first_token
    )
    return StepOutput(
        request_id=sequence.request.request_id,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=reason,
        error=error,
        timing=timing,
    )
