"""Which tokens run in the next step. Bookkeeping only: ints, no tensors, no device.

A step first takes the rows that need one token (decode); while prompts wait, these get at most half
of the step's tokens. The rest goes to prompts, running and waiting ones, always to the next of the
client that has been served least. A long prompt is split into chunks that share steps with others.

A client's first row waits for the step that runs and then for little else: the step in which it
begins has no other prompts of clients that have rows already, and no tokens of a client that has
more than half of all rows. Of one client's prompts, those that a step can finish go before an
older one that it cannot. Every second step at most is a step of either kind, or rows that are held
back could be so for ever.

A waiting row begins where a place and blocks are free. Otherwise it may take those of a client that
has been served at least as much and holds at least two rows more: that client's youngest row is
preempted. A row is also preempted when a running one needs a block and none is free: the youngest
of the client with the most rows. The oldest row of all gives way to none, so it always finishes. A
preempted row is computed again later, after the leading blocks that the prefix cache still holds.

A row whose adapters find no room in the pool is passed over. After MAX_STEPS_PASSED_OVER steps new
rows may no longer bring in or keep other adapters until this row's have room. A row whose adapter
is still being copied to the device is admitted but gets no tokens yet.

A step can be planned before the previous one is committed: `advance` counts a started step as done
while its new tokens are known to the device alone. If a row turns out to have finished in the
meantime, its extra result is discarded.

Source: continuous batching, Orca (OSDI '22); chunked prefill, Sarathi (arXiv:2308.16369); fair
shares, VTC (arXiv:2401.00588).
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from lora_runtime.adapters.slot_table import SlotTable
from lora_runtime.config import SchedulerConfig
from lora_runtime.core import (
    FinishReason,
    PromptChunk,
    RequestTiming,
    Row,
    RowStatus,
    SampledToken,
    ScheduledBatch,
    ScheduledRow,
    StepOutput,
)
from lora_runtime.engine.block_manager import BlockManager
from lora_runtime.engine.fair_shares import FairShares
from lora_runtime.engine.queue_places import check_place
from lora_runtime.engine.step_plan import StepPlan
from lora_runtime.engine.waiting_queue import WaitingQueue
from lora_runtime.errors import AdapterFailed, InvalidRequest, LoramuxError, RequestFailed

log = logging.getLogger(__name__)

MAX_STEPS_PASSED_OVER = 100
"""Steps in which a row whose adapters find no room is passed over at most."""


class Scheduler:
    """Waiting and running rows, and the blocks and slots they hold."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, slots: SlotTable) -> None:
        self._config, self._blocks, self._slots = config, blocks, slots
        self.waiting = WaitingQueue()
        self.running: list[Row] = []
        """In the order in which they began."""
        self.num_preemptions = 0
        self._shares = FairShares()
        self._next_in_pool: Row | None = None
        """A row that was passed over too often: no other row under adapters begins before it."""
        self._has_held_back = False
        """The last step held rows back for others that came later."""

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, row: Row) -> None:
        """Queue a new row. Raises Overloaded if the queue, or its client's share, is full."""
        num_own = self.waiting.num_of(row.request.client)
        check_place(self._config.max_queued_requests, len(self.waiting), num_own)
        self.waiting.arrive(row)
        self._shares.enter(row.request.client)

    def rows(self) -> list[Row]:
        """Every live row, running ones first."""
        return [*self.running, *self.waiting]

    def end(self, row: Row, reason: FinishReason, error: LoramuxError | None = None) -> StepOutput:
        """Finish a row now, free all it holds and give its terminal output."""
        self._remove(row)
        return terminal_output(row, reason, error)

    def fail(self, row: Row, cause: Exception) -> StepOutput:
        """Finish a row for which an unforeseen error occurred; the log has the error."""
        request_id = row.request.request_id
        log.error("request %s failed", request_id, exc_info=cause)
        error = RequestFailed(f"something unforeseen ended request {request_id}; see the log")
        return self.end(row, FinishReason.ERROR, error)

    def schedule(self, loading: AbstractSet[str] | None = None) -> ScheduledBatch:
        """Plan one step. The plan may be without rows when nothing can run yet.

        `loading`: digests of adapters that are being copied; rows under one of them, or under one
        that this plan loads, get no tokens. None: a plan's copies are done before its rows run.
        """
        step = StepPlan(
            self._config.max_num_batched_tokens, loading, may_hold_back=not self._has_held_back
        )
        self._has_held_back = False
        turns = self._turns()
        newcomers: set[str] = set()
        may_begin = step.may_hold_back and any(num_rows == 0 for _, num_rows, _, _ in turns)
        held_back = self._client_of_most() if may_begin else None
        # While prompts wait, rows that need one token get half of the step: neither starves.
        limit = step.budget - step.budget // 2 if turns else step.budget
        self._plan_single_tokens(step, limit, held_back)
        while step.budget > 0 and turns:
            _, num_rows, _, client = heapq.heappop(turns)
            if newcomers and num_rows and client not in newcomers:
                self._has_held_back = True
                continue
            if self._plan_prompt(client, step):
                if num_rows == 0 and step.may_hold_back:
                    newcomers.add(client)
                num_rows = sum(row.request.client == client for row in self.running)
                heapq.heappush(turns, self._turn(client, num_rows))
        # What the prompts have left, for the rows that got nothing above.
        self._has_held_back |= bool(newcomers and held_back)
        self._plan_single_tokens(step, step.budget, held_back if newcomers else None)
        return step.batch()

    def advance(self, batch: ScheduledBatch) -> None:
        """Count a plan that has been started as done; the tokens it samples are not known yet."""
        num_sampled = 0
        for scheduled in batch.rows:
            scheduled.row.num_computed_tokens = scheduled.end
            if scheduled.samples:
                scheduled.row.token_ids.append(-1 - num_sampled)  # see `Row`
                num_sampled += 1

    def commit(
        self,
        batch: ScheduledBatch,
        sampled: Sequence[SampledToken],
        prompts: Sequence[PromptChunk] = (),
    ) -> list[StepOutput]:
        """Record the results of a plan that was advanced, before those of any later one.

        `sampled` has one entry per row that samples, in order; `prompts` is what the step says of
        prompts' own tokens. Rows that have finished
        since are passed over. A preempted row gets its token but publishes no blocks. Where
        a result cannot be recorded, that row alone fails.
        """
        outputs, results = [], iter(sampled)
        for scheduled in batch.rows:
            result = next(results) if scheduled.samples else None
            if scheduled.row.status is RowStatus.FINISHED:
                continue
            chunks = [chunk for chunk in prompts if chunk.row is scheduled.row]
            try:
                output = self._record(scheduled, result, chunks)
            except Exception as cause:
                output = self.fail(scheduled.row, cause)
            if output is not None:
                outputs.append(output)
        return outputs

    def _record(
        self, scheduled: ScheduledRow, result: SampledToken | None, chunks: Sequence[PromptChunk]
    ) -> StepOutput | None:
        is_finite = result is None or result.is_finite
        if not is_finite or not all(map(_is_finite, chunks)):
            return self._fail_non_finite(scheduled.row)
        if result is not None and (error := _structure_error(scheduled.row)) is not None:
            return self.end(scheduled.row, FinishReason.ERROR, error)
        for chunk in chunks:
            _keep(chunk)
        if scheduled.row.status is RowStatus.RUNNING:
            self._blocks.publish(scheduled.row, scheduled.end)
        return None if result is None else self._accept(scheduled.row, scheduled.end, result)

    def check_integrity(self) -> None:
        """Assert that blocks, slots, pins and shares agree with the live rows."""
        self._blocks.check_integrity(self.running)
        uses = (use.digest for row in self.running for use in row.request.adapters)
        self._slots.check_integrity(Counter(uses))
        self._shares.check_integrity(_num_by_client(self.rows()))
        assert not any(row.block_table for row in self.waiting)
        assert self._next_in_pool is None or self._next_in_pool in list(self.waiting)

    def _turns(self) -> list[tuple[float, int, int, str]]:
        """A heap of the clients that have prompts, running or waiting, by whose turn is next."""
        clients = {row.request.client for row in self.running if row.num_uncomputed_tokens > 1}
        num_rows = _num_by_client(self.running)
        everyone = clients.union(self.waiting.clients)
        turns = [self._turn(client, num_rows[client]) for client in everyone]
        heapq.heapify(turns)
        return turns

    def _turn(self, client: str, num_rows: int) -> tuple[float, int, int, str]:
        """A client's place in the heap: by what it was served, then its rows, then its arrival."""
        ticket = self.waiting.first_ticket(client)
        return self._shares.counter(client), num_rows, ticket, client

    def _client_of_most(self) -> str | None:
        """The client that has more than half of the running rows, if one has."""
        for client, num_rows in _num_by_client(self.running).most_common(1):
            return client if 2 * num_rows > len(self.running) else None
        return None

    def _plan_single_tokens(self, step: StepPlan, limit: int, held_back: str | None) -> None:
        """Plan up to `limit` running rows that need one token, but none of client `held_back`."""
        for row in list(self.running):
            if limit <= 0:
                return
            if row.request.client == held_back or row.num_uncomputed_tokens != 1:
                continue
            if self._plan_running(row, step):
                limit -= 1

    def _plan_prompt(self, client: str, step: StepPlan) -> bool:
        """Plan the next chunk of a client's prompts; False when it has none that can run."""
        for row in self._prompts_in_turn(client, step):
            is_running = row.status is RowStatus.RUNNING
            if self._plan_running(row, step) if is_running else self._plan_waiting(row, step):
                return True
        return False

    def _prompts_in_turn(self, client: str, step: StepPlan) -> Iterator[Row]:
        """A client's prompts: running ones in the order in which they began, then waiting ones.
        Before all where the first is longer than what is left of the step: the shorter ones.
        """
        first = next(self._prompts(client, step), None)
        if first is not None and step.may_hold_back and not step.has_room(first):
            for row in step.shorter(client, first, self._prompts(client, step)):
                self._has_held_back = True
                yield row
        yield from self._prompts(client, step)

    def _prompts(self, client: str, step: StepPlan) -> Iterator[Row]:
        """A client's prompts that have had no turn in the step yet."""
        for row in list(self.running):
            is_prompt = row.request.client == client and row.num_uncomputed_tokens != 1
            if is_prompt and step.is_open(row):
                yield row
        yield from filter(step.is_open, self.waiting.of(client))

    def _plan_waiting(self, row: Row, step: StepPlan) -> bool:
        """Let a waiting row begin and plan its first tokens; False if it cannot."""
        # A running row has just found no block. Whoever began now would take the blocks that the
        # preempted row gave up, and the two would preempt each other step after step.
        if step.is_short_of_blocks or row.request.client in step.crowded_out:
            return False
        step.seen.add(row)
        try:
            if not self._has_pool_room(row, step):
                return False
            if not self._begin(row, step):
                step.crowded_out.add(row.request.client)
                return False
        except Exception as cause:
            step.failed.append(self.fail(row, cause))
            return False
        if not step.lacks_adapter(row):
            num_tokens = step.num_fitting(row)
            self._blocks.grow(row, row.num_computed_tokens + num_tokens)
            self._shares.charge(step.add(row, num_tokens))
        return True

    def _plan_running(self, row: Row, step: StepPlan) -> bool:
        """Plan the next tokens of a running row; False if it got some already or cannot run."""
        if row.status is not RowStatus.RUNNING or row in step:
            return False
        if step.lacks_adapter(row) or _has_all_tokens(row):
            return False
        num_tokens = step.num_fitting(row)
        if num_tokens <= 0 or not self._grow(row, num_tokens, step):
            return False
        self._shares.charge(step.add(row, num_tokens))
        return True

    def _grow(self, row: Row, num_tokens: int, step: StepPlan) -> bool:
        """Give a row the blocks for its next tokens, preempting others where none are free.

        False when the row itself was preempted, or has to wait because all candidates began in this
        very step.
        """
        while not self._blocks.grow(row, row.num_computed_tokens + num_tokens):
            step.is_short_of_blocks = True
            victim = _youngest_of_most(
                [other for other in self.running if other not in step.admitted]
            )
            if victim is not row or not step.admitted:
                self._preempt(victim, step)
            if victim is row:
                return False
        return True

    def _preempt(self, row: Row, step: StepPlan) -> None:
        step.drop(row)
        self._release(row)
        row.status = RowStatus.WAITING
        row.num_computed_tokens = 0
        row.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.put_back(row)

    def _has_pool_room(self, row: Row, step: StepPlan) -> bool:
        """Whether the adapters of a waiting row can be brought to the device now."""
        digests = tuple(use.digest for use in row.request.adapters)
        if digests and self._next_in_pool not in (None, row):
            return False
        if digests not in step.without_room:
            if self._slots.has_room(digests):
                return True
            step.without_room.add(digests)
        row.num_steps_passed_over += 1
        if row.num_steps_passed_over >= MAX_STEPS_PASSED_OVER:
            self._next_in_pool = self._next_in_pool or row
        return False

    def _begin(self, row: Row, step: StepPlan) -> bool:
        """Move a waiting row to running if a place and blocks for all its tokens are free, or
        would be if rows of clients with more were preempted. Rows are preempted only once it is
        certain that they are enough.
        """
        found: list[int] | None = None
        leaving: list[Row] = []
        while True:
            if len(self.running) - len(leaving) < self._config.max_num_seqs:
                found = self._blocks.find(row) if found is None else found
                if self._blocks.has_room(row, found, leaving):
                    break
            victim = self._next_victim(row, leaving, step)
            if victim is None:
                return False
            leaving.append(victim)
        for victim in leaving:
            self._preempt(victim, step)
            step.without_room.clear()
        return self._place(row, found, step)

    def _next_victim(self, row: Row, leaving: Sequence[Row], step: StepPlan) -> Row | None:
        """The row to preempt for a waiting row, beside those `leaving`; None if there is none.

        It is a row of a client that was served at least as much and, after the exchange, will
        still not have fewer rows than the waiting row's client.
        """
        client = row.request.client
        num_own = sum(other.request.client == client for other in self.running)
        served = self._shares.counter(client)
        rows = [
            other
            for other in self.running
            if other not in leaving
            and other not in step.admitted
            and self._shares.counter(other.request.client) >= served
        ]
        if not rows:
            return None
        victim = _youngest_of_most(rows)
        num_theirs = sum(other.request.client == victim.request.client for other in rows)
        return victim if num_theirs > num_own + 1 else None

    def _place(self, row: Row, found: list[int], step: StepPlan) -> bool:
        slots = self._acquire_slots(row, step)
        if slots is None:
            return False
        try:
            self._blocks.share(row, found)
        except Exception:
            for use in row.request.adapters:
                self._slots.release(use.digest)
            raise
        self._leave_queue(row)
        row.slots, row.status = slots, RowStatus.RUNNING
        if row.first_scheduled is None:  # begun again, it may find what it computed itself
            row.first_scheduled = time.monotonic()
            row.num_cached_tokens = row.num_computed_tokens
        row.num_steps_passed_over = 0
        self.running.append(row)
        step.admitted.add(row)
        return True

    def _leave_queue(self, row: Row) -> None:
        self.waiting.remove(row)
        if self._next_in_pool is row:
            self._next_in_pool = None

    def _acquire_slots(self, row: Row, step: StepPlan) -> tuple[int, ...] | None:
        acquired = self._slots.acquire([use.digest for use in row.request.adapters])
        if acquired is None:
            return None
        step.loads.extend(got.load for got in acquired if got.load is not None)
        return tuple(got.slot for got in acquired)

    def _fail_non_finite(self, row: Row) -> StepOutput:
        self._blocks.retract(row)
        error = AdapterFailed(
            "the model gave non-finite logits for this request; its adapter's weights overflow"
            if row.request.adapters
            else "the model gave non-finite logits for this request"
        )
        return self.end(row, FinishReason.ERROR, error)

    def _accept(self, row: Row, position: int, result: SampledToken) -> StepOutput:
        row.token_ids[position] = result.token_id
        row.first_token = row.first_token or time.monotonic()
        if row.matcher is not None and result.token_id not in row.request.sampling.stop_token_ids:
            row.matcher.take(result.token_id)
        reason = _finish_reason(row, position)
        output = StepOutput(
            request_id=row.request.request_id,
            token_ids=(result.token_id,),
            logprobs=() if result.logprob is None else (result.logprob,),
            prompt_logprobs=None if row.prompt_logprobs is None else tuple(row.prompt_logprobs),
            num_cached_tokens=row.num_cached_tokens,
        )
        row.prompt_logprobs = None
        if reason is None:
            return output
        self._remove(row)
        return replace(output, finish_reason=reason, timing=_timing(row))

    def _remove(self, row: Row) -> None:
        if row.status is RowStatus.RUNNING:
            self._release(row)
        else:
            self._leave_queue(row)
        self._shares.leave(row.request.client)
        row.status = RowStatus.FINISHED

    def _release(self, row: Row) -> None:
        self.running.remove(row)
        self._blocks.release(row)
        for use in row.request.adapters:
            self._slots.release(use.digest)
        row.slots = ()


def _num_by_client(rows: Sequence[Row]) -> Counter[str]:
    return Counter(row.request.client for row in rows)


def _youngest_of_most(rows: Sequence[Row]) -> Row:
    """The row that began last of the client that has the most of these running rows."""
    counts = _num_by_client(rows)
    most = max(counts.values())
    return next(row for row in reversed(rows) if counts[row.request.client] == most)


def _has_all_tokens(row: Row) -> bool:
    """True when the step that runs now gives the row its last token."""
    return row.num_output_tokens >= row.request.sampling.max_tokens


def _structure_error(row: Row) -> LoramuxError | None:
    """Why no token could be drawn that keeps the form of structured output. What was asked for
    contradicts itself, which shows only here: nothing of the engine has failed.
    """
    if row.matcher is None or not row.matcher.error:
        return None
    return InvalidRequest(
        f"sampling.structured_output cannot be kept: {row.matcher.error}",
        field="sampling.structured_output",
    )


def _finish_reason(row: Row, position: int) -> FinishReason | None:
    sampling = row.request.sampling
    if row.token_ids[position] in sampling.stop_token_ids:
        return FinishReason.STOP
    if row.matcher is not None and row.matcher.is_complete:
        return FinishReason.STOP
    num_output_tokens = position + 1 - row.num_prompt_tokens
    return FinishReason.LENGTH if num_output_tokens >= sampling.max_tokens else None


def _is_finite(chunk: PromptChunk) -> bool:
    return all(math.isfinite(each.logprob) for each in chunk.logprobs)


def _keep(chunk: PromptChunk) -> None:
    """Add what a row does not have yet: one that was preempted is computed, and scored, again."""
    found = chunk.row.prompt_logprobs
    if found is not None:
        assert chunk.start <= len(found), "a part of the prompt was not scored"
        found += chunk.logprobs[len(found) - chunk.start :]


def terminal_output(row: Row, reason: FinishReason, error: LoramuxError | None) -> StepOutput:
    """The last output of a request that a step does not give."""
    return StepOutput(
        request_id=row.request.request_id, finish_reason=reason, error=error, timing=_timing(row)
    )


def _timing(row: Row) -> RequestTiming:
    """How long each of its phases took."""
    now, arrival = time.monotonic(), row.request.arrival
    scheduled = row.first_scheduled or now
    first_token = row.first_token or now
    return RequestTiming(
        queue_s=scheduled - arrival, prefill_s=first_token - scheduled, decode_s=now - first_token
    )
