"""Which tokens run in the next step. Bookkeeping only: ints, no tensors, no device.

Running sequences come first, then waiting ones in order of arrival; a long prompt is split into
chunks that share the step with other rows. When cache blocks run out, the youngest running
sequence gives up its blocks and is computed again later (recompute preemption). A sequence starts
after the leading blocks that the prefix cache still holds for it. One whose adapter is still being
copied to the device runs with nothing to do, and the others go on.
A step can be planned before the one ahead of it is committed: `advance` counts a started step as
done, its new tokens being known to the device alone. A row that turns out to be over by then has
run once in vain.
Source: continuous batching, Orca (OSDI '22); chunked prefill, Sarathi (arXiv:2308.16369).
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence as AbstractSequence
from collections.abc import Set as AbstractSet

from lora_runtime.adapters.slot_table import SlotTable
from lora_runtime.config import SchedulerConfig
from lora_runtime.core import (
    AdapterPlacement,
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
from lora_runtime.errors import AdapterFailed, LoramuxError, Overloaded, RequestFailed

log = logging.getLogger(__name__)


class Scheduler:
    """Waiting and running sequences, and the blocks and slots they hold."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, slots: SlotTable) -> None:
        self._config, self._blocks, self._slots = config, blocks, slots
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises Overloaded when the queue is full."""
        if len(self.waiting) >= self._config.max_queued_requests:
            raise Overloaded(f"{len(self.waiting)} requests are waiting already; try again later")
        self.waiting.append(sequence)

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
        budget = self._config.max_num_batched_tokens
        num_preemptions = self.num_preemptions
        planned: list[ScheduledSequence] = []
        for sequence in list(self.running):
            if _lacks_adapter(sequence, loading) or _has_all_tokens(sequence):
                continue
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            if num_tokens > 0 and self._make_room(sequence, num_tokens):
                planned.append(_chunk(sequence, num_tokens))
                budget -= num_tokens
        loads: list[AdapterPlacement] = []
        failed: list[StepOutput] = []
        if self.num_preemptions == num_preemptions:
            while budget > 0 and self._admit(loads, failed):
                sequence = self.running[-1]
                if _lacks_adapter(sequence, loading, loads):
                    continue
                num_tokens = min(sequence.num_uncomputed_tokens, budget)
                self._blocks.grow(sequence, sequence.num_computed_tokens + num_tokens)
                planned.append(_chunk(sequence, num_tokens))
                budget -= num_tokens
        return ScheduledBatch(tuple(planned), tuple(loads), tuple(failed))

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
        """Assert that blocks, slots and pins agree with the live sequences."""
        self._blocks.check_integrity(self.running)
        uses = (use.digest for row in self.running for use in row.request.adapters)
        self._slots.check_integrity(Counter(uses))
        assert not any(sequence.block_table for sequence in self.waiting)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Grow the sequence's blocks, preempting younger ones; False if it is preempted itself."""
        while sequence.status is SequenceStatus.RUNNING:
            if self._blocks.grow(sequence, sequence.num_computed_tokens + num_tokens):
                return True
            self._preempt(self.running[-1])
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self, loads: list[AdapterPlacement], failed: list[StepOutput]) -> bool:
        """Move the first waiting sequence to running if its blocks and adapters fit.

        Those before it that cannot be planned end, and their outputs go to `failed`.
        """
        while self.waiting and len(self.running) < self._config.max_num_seqs:
            sequence = self.waiting[0]
            try:
                return self._place(sequence, loads)
            except Exception as cause:
                failed.append(self.fail(sequence, cause))
        return False

    def _place(self, sequence: Sequence, loads: list[AdapterPlacement]) -> bool:
        found = self._blocks.find(sequence)
        if not self._blocks.has_room(sequence, found):
            return False
        slots = self._acquire_slots(sequence, loads)
        if slots is None:
            return False
        try:
            self._blocks.share(sequence, found)
        except Exception:
            for use in sequence.request.adapters:
                self._slots.release(use.digest)
            raise
        sequence.slots, sequence.status = slots, SequenceStatus.RUNNING
        sequence.first_scheduled = sequence.first_scheduled or time.monotonic()
        self.running.append(self.waiting.popleft())
        return True

    def _acquire_slots(
        self, sequence: Sequence, loads: list[AdapterPlacement]
    ) -> tuple[int, ...] | None:
        acquired = self._slots.acquire([use.digest for use in sequence.request.adapters])
        if acquired is None:
            return None
        loads.extend(got.load for got in acquired if got.load is not None)
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
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.release(sequence)
        for use in sequence.request.adapters:
            self._slots.release(use.digest)
        sequence.slots = ()


def _lacks_adapter(
    sequence: Sequence,
    loading: AbstractSet[str] | None,
    loads: AbstractSequence[AdapterPlacement] = (),
) -> bool:
    if loading is None:
        return False
    missing = loading | {load.digest for load in loads}
    return any(use.digest in missing for use in sequence.request.adapters)


def _chunk(sequence: Sequence, num_tokens: int) -> ScheduledSequence:
    samples = num_tokens == sequence.num_uncomputed_tokens
    return ScheduledSequence(sequence, sequence.num_computed_tokens, num_tokens, samples)


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
