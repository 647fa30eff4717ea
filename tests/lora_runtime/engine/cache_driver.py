"""A model for the scheduler that knows nothing but the cache, and the same model without one.

Its "keys and values" of a token are a digest of the token, the adapters on it, the row's layers
and what the row's block table holds of the token before. One wrong block anywhere, and every later
token of the row differs from the same recurrence without a cache.
"""

from __future__ import annotations

from collections import Counter, deque
from hashlib import blake2b

from lora_runtime.adapters.slot_table import SlotTable
from lora_runtime.config import SchedulerConfig
from lora_runtime.core import FinishReason, Request, Row, SampledToken, SamplingParams
from lora_runtime.engine.block_manager import BlockManager
from lora_runtime.engine.scheduler import Scheduler

BLOCK_SIZE, VOCAB_SIZE = 4, 3
BAD = "overflows"
NAN = "nan"
LAYER_MAPS = {1: None, 2: (0, 1, 1), 3: (0, 1, 0, 1, 0)}


def cell(row, position, plane, before, drawn=()) -> str:
    """Keys and values of one token in one plane; `before`: all planes of the token before,
    `drawn`: what the last step gave each row.
    """
    uses = row.request.adapters
    acting = sorted((u.digest, u.weight) for u in uses if position >= u.start_position)
    if NAN in before or any(digest == BAD for digest, _ in acting):
        return NAN
    token_id = row.token_ids[position]
    if token_id < 0:
        token_id = drawn[-1 - token_id]
    content = repr((token_id, acting, row.layer_map, plane, before))
    return blake2b(content.encode(), digest_size=8).hexdigest()


def next_token(cells) -> SampledToken:
    if NAN in cells:
        return SampledToken(token_id=0, is_finite=False)
    return SampledToken(token_id=int(cells[0], 16) % VOCAB_SIZE, is_finite=True)


def without_cache(row) -> tuple[list[int], FinishReason]:
    """The output tokens of a fresh sequence and how it must end, computed in one go."""
    cells: tuple = ()
    for position in range(row.num_prompt_tokens + row.request.sampling.max_tokens - 1):
        planes = range(row.num_planes)
        cells = tuple(cell(row, position, plane, cells) for plane in planes)
        if position >= row.num_prompt_tokens - 1:
            if not next_token(cells).is_finite:
                return row.token_ids[row.num_prompt_tokens :], FinishReason.ERROR
            row.token_ids.append(next_token(cells).token_id)
    return row.token_ids[row.num_prompt_tokens :], FinishReason.LENGTH


class CacheDriver:
    """Scheduler, memory and the recurrence over it; every step is checked."""

    def __init__(
        self,
        num_blocks=200,
        *,
        budget=64,
        max_num_seqs=8,
        is_caching=True,
        max_slots=8,
        load_steps=None,
        steps_ahead=0,
    ):
        """`load_steps`: steps until an adapter's copy is done; None: at once. `steps_ahead`: 1 to
        commit a step after the next one was started.
        """
        self.budget, self.load_steps, self.steps_ahead = budget, load_steps, steps_ahead
        self.started: deque = deque()
        self.drawn: list[int] = []
        self.loading: dict[str, int] = {}
        config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_cache=is_caching)
        self.slots = SlotTable(100, max_slots)
        for digest in ("a", "b", "a reloaded", BAD):
            self.slots.register(digest, 4)
        self.scheduler = Scheduler(config, self.blocks, self.slots)
        self.memory = [[None] * BLOCK_SIZE for _ in range(num_blocks)]
        self.rows: dict[str, Row] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, list[FinishReason]] = {}
        self.num_computed: Counter[str] = Counter()

    def add(self, request: Request, num_planes: int = 1) -> Row:
        row = Row.of(request, LAYER_MAPS[num_planes], num_planes)
        self.scheduler.add(row)
        self.rows[request.request_id] = row
        self.tokens[request.request_id], self.ends[request.request_id] = [], []
        return row

    def step(self) -> None:
        plan = self.plan()
        ids = [scheduled.row.request.request_id for scheduled in plan.rows]
        assert len(set(ids)) == len(ids) and plan.num_tokens <= self.budget
        for scheduled in plan.rows:
            self.write(scheduled)
        sampled = [
            next_token(self.read(scheduled.row, scheduled.start + scheduled.num_tokens - 1))
            for scheduled in plan.rows
            if scheduled.samples
        ]
        for scheduled in plan.rows:
            self.check(scheduled)
        self.scheduler.advance(plan)
        self.drawn = [result.token_id for result in sampled]
        self.started.append((plan, sampled))
        while len(self.started) > (self.steps_ahead if plan.rows else 0):
            for output in self.scheduler.commit(*self.started.popleft()):
                self.record(output)
        self.scheduler.check_integrity()

    def plan(self):
        """The next plan; no row of it may be under an adapter that is not there yet."""
        if self.load_steps is None:
            return self.scheduler.schedule()
        self.loading = {digest: left - 1 for digest, left in self.loading.items() if left > 1}
        plan = self.scheduler.schedule(self.loading.keys())
        self.loading |= {load.digest: self.load_steps for load in plan.loads}
        used = {use.digest for scheduled in plan.rows for use in scheduled.row.request.adapters}
        assert not used & self.loading.keys() and used <= set(self.slots.resident)
        return plan

    def write(self, scheduled) -> None:
        for position in range(scheduled.start, scheduled.start + scheduled.num_tokens):
            before = self.read(scheduled.row, position - 1) if position else ()
            for plane in range(scheduled.row.num_planes):
                block = self.block(scheduled.row, position, plane)
                self.memory[block][position % BLOCK_SIZE] = cell(
                    scheduled.row, position, plane, before, self.drawn
                )
        self.num_computed[scheduled.row.request.request_id] += scheduled.num_tokens

    def check(self, scheduled) -> None:
        """After all writes of a step: the row's whole history is its own."""
        cells: tuple = ()
        for position in range(scheduled.start + scheduled.num_tokens):
            planes = range(scheduled.row.num_planes)
            cells = tuple(
                cell(scheduled.row, position, plane, cells, self.drawn) for plane in planes
            )
            assert self.read(scheduled.row, position) == cells

    def read(self, row, position) -> tuple:
        planes = range(row.num_planes)
        blocks = [self.block(row, position, plane) for plane in planes]
        return tuple(self.memory[block][position % BLOCK_SIZE] for block in blocks)

    @staticmethod
    def block(row, position, plane) -> int:
        return row.block_table[position // BLOCK_SIZE * row.num_planes + plane]

    def record(self, output) -> None:
        assert not self.ends[output.request_id], "an output after the terminal one"
        self.tokens[output.request_id] += output.token_ids
        if output.finish_reason is not None:
            self.ends[output.request_id].append(output.finish_reason)

    def finish(self) -> None:
        for _ in range(3000):
            if self.scheduler.is_idle and not self.started:
                assert self.blocks.num_used == 0
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")

    def num_output(self, client) -> int:
        """Output tokens that a client has been given."""
        return sum(
            len(self.tokens[i]) for i, scheduled in self.rows.items() if _is_of(scheduled, client)
        )

    def num_prompt_served(self, client) -> int:
        """Prompt tokens of a client that have been computed, each counted once."""
        counts = (
            min(scheduled.num_prompt_tokens, self.num_computed[request_id])
            for request_id, scheduled in self.rows.items()
            if _is_of(scheduled, client)
        )
        return sum(counts)

    def serve(self, *requests, num_planes=1) -> list[int]:
        """Run requests one after another; returns how many tokens each had to compute."""
        for request in requests:
            self.add(request, num_planes)
            self.finish()
        return [self.num_computed[request.request_id] for request in requests]


def _is_of(row, client) -> bool:
    return row.request.client == client


def ask(request_id, prompt, *adapters, salt="", max_tokens=1) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        adapters=tuple(adapters),
        cache_salt=salt,
    )
