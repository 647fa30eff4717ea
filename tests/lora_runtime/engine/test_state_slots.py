"""States of rows and snapshots of them, under any schedule: nobody reads another's.

A row's "state" is a digest of every token it went through and the adapters on them. Steps are run
as the model runs them: by the pieces of `recurrent_batch`.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.core import AdapterUse
from lora_runtime.engine import state_slots
from lora_runtime.engine.recurrent_batch import pieces
from lora_runtime.engine.scheduler import Scheduler
from lora_runtime.engine.state_slots import StatefulBlockManager
from tests.lora_runtime.engine.cache_driver import (
    BLOCK_SIZE,
    CacheDriver,
    ask,
    cell,
)
from tests.lora_runtime.engine.test_prefix_cache import (
    USES,
    check_random_requests,
    random_request,
)


class StateDriver(CacheDriver):
    """The driver of the cache's tests, with states beside the blocks."""

    def __init__(self, num_blocks=200, *, num_snapshots=6, max_num_seqs=8, **options) -> None:
        super().__init__(num_blocks, max_num_seqs=max_num_seqs, **options)
        self.blocks = StatefulBlockManager(
            num_blocks, BLOCK_SIZE, num_rows=max_num_seqs, num_snapshots=num_snapshots
        )
        config = self.scheduler._config
        self.scheduler = Scheduler(config, self.blocks, self.slots)
        self.states: list = [None] * (max_num_seqs + num_snapshots)

    def plan(self):
        plan = super().plan()
        self.run_pieces(plan.rows)
        return plan

    def run_pieces(self, rows) -> None:
        tokens = [(each.row, p) for each in rows for p in range(each.start, each.end)]
        ended = []
        loaded = [None if p.loads is None else self.states[p.loads] for p in pieces(rows)]
        for piece, before in zip(pieces(rows), loaded, strict=True):
            state = before if piece.after is None else ended[piece.after]
            state = () if state is None else state
            for row, position in tokens[piece.start : piece.start + piece.length]:
                state = (cell(row, position, 0, state, self.drawn),)
            ended.append(state)
            for slot in piece.stores:
                self.states[slot] = state
        for scheduled in rows:
            expected: tuple = ()
            for position in range(scheduled.end):
                expected = (cell(scheduled.row, position, 0, expected, self.drawn),)
            assert self.states[scheduled.row.state_slot] == expected


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from([12, 16, 27, 200]),
    num_snapshots=st.sampled_from([0, 1, 3, 20]),
    budget=st.integers(5, 40),
    max_num_seqs=st.integers(1, 5),
    steps_ahead=st.integers(0, 1),
)
def test_every_row_has_its_own_state_under_any_schedule(
    seed, num_blocks, num_snapshots, budget, max_num_seqs, steps_ahead
):
    rng = random.Random(seed)
    kinds = rng.sample(USES, 4)
    state_slots.SNAPSHOT_INTERVAL, before = 8, state_slots.SNAPSHOT_INTERVAL
    try:
        driver = StateDriver(
            num_blocks, num_snapshots=num_snapshots, budget=budget, max_num_seqs=max_num_seqs,
            max_slots=2, steps_ahead=steps_ahead,
        )  # fmt: skip
    finally:
        state_slots.SNAPSHOT_INTERVAL = before
    check_random_requests(rng, driver, kinds)


def test_the_random_schedules_resume_evict_and_preempt():
    """The test above would show nothing if its schedules did nothing of interest."""
    rng, driver = random.Random(0), StateDriver(20, budget=30, num_snapshots=6)
    for index in range(200):
        driver.add(random_request(rng, index))
    driver.finish()
    assert driver.scheduler.num_preemptions > 10
    assert driver.blocks.num_prefix_hits > 100


PROMPT = [0, 1, 2, 2] * 10  # ten whole blocks


def test_the_same_prompt_finds_all_but_its_last_block():
    driver = StateDriver()
    assert driver.serve(ask("1", PROMPT)) == [40]
    assert driver.serve(ask("2", PROMPT)) == [4]


def test_the_next_turn_finds_what_the_one_before_has_written():
    driver = StateDriver()
    assert driver.serve(ask("1", PROMPT, max_tokens=9)) == [40 + 8]
    turn = [*PROMPT, *driver.tokens["1"], 1, 1]
    assert driver.serve(ask("2", turn)) == [len(turn) - 48]


def test_a_prompts_end_that_others_began_with_stays_beside_the_outputs():
    driver = StateDriver()
    driver.add(ask("1", PROMPT, max_tokens=9))
    driver.step()
    driver.add(ask("2", PROMPT))
    driver.finish()
    assert driver.serve(ask("3", PROMPT)) == [4]


def test_where_prompts_part_is_found_by_the_third():
    driver = StateDriver()
    assert driver.serve(ask("1", [*PROMPT, *[0] * 9])) == [49]
    assert driver.serve(ask("2", [*PROMPT, *[1] * 9])) == [49], "no snapshot where the two part"
    assert driver.serve(ask("3", [*PROMPT, *[2] * 9])) == [9]


def test_what_snapshots_were_good_for_is_counted():
    driver = StateDriver(num_snapshots=3, max_num_seqs=4)
    for index in range(3):  # the third finds what the second computed again
        driver.serve(ask(str(index), [*PROMPT, *[index] * 9]))
    stats = driver.blocks.state_stats
    assert (stats.num_rows, stats.num_rows_free) == (0, 4)
    assert (stats.num_snapshots, stats.num_snapshots_free) == (3, 0)
    assert (stats.num_snapshot_hits, stats.num_recomputed_tokens) == (1, len(PROMPT))
    assert stats.num_snapshot_evictions == 1, "ends of three prompts, and where they part"
    driver.add(ask("running", PROMPT, max_tokens=30))
    driver.step()
    assert driver.blocks.state_stats.num_rows == 1


def test_long_prompts_share_all_but_less_than_an_interval():
    driver = StateDriver(budget=500)
    stem = [0, 1, 2, 2] * 50
    driver.serve(ask("1", [*stem, *[0] * 30]))
    assert driver.serve(ask("2", [*stem, *[1] * 30])) == [230 - 128]


def test_others_under_an_adapter_a_salt_or_late_activation_share_no_state():
    a, late = AdapterUse(digest="a"), AdapterUse(digest="a", start_position=20)
    driver = StateDriver()
    driver.serve(ask("base", PROMPT))
    assert driver.serve(ask("a", PROMPT, a)) == [40]
    assert driver.serve(ask("a again", PROMPT, a)) == [4]
    assert driver.serve(ask("salted", PROMPT, salt="tenant")) == [40]
    # Its blocks up to the start are the base's; a snapshot there is made by the first that wants it
    assert driver.serve(ask("late", PROMPT, late)) == [40]
    driver.serve(ask("late with another end", [*PROMPT[:30], *[0] * 9], late))
    driver.blocks.forget_adapter("a")
    driver.scheduler.check_integrity()
    assert driver.serve(ask("late again", PROMPT, late)) == [20]


def test_a_prefix_that_is_shared_outlives_many_that_are_not():
    driver = StateDriver(num_blocks=400, num_snapshots=4)
    driver.serve(ask("first", PROMPT))
    assert driver.serve(ask("second", [*PROMPT, 1]), ask("third", [*PROMPT, 0])) == [5, 1]
    assert driver.serve(ask("fourth", [*PROMPT, 0])) == [1]
    rng = random.Random(0)
    for n in range(20):
        driver.serve(ask(f"other {n}", rng.choices(range(3), k=30)))
    assert driver.serve(ask("last", [*PROMPT, 2])) == [1]


def test_without_slots_for_snapshots_everything_is_computed():
    driver = StateDriver(num_snapshots=0)
    assert driver.serve(ask("1", PROMPT), ask("2", PROMPT)) == [40, 40]
