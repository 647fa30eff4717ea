"""The scheduler and its prefix cache: what is shared, and that rows never read another's tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.core import AdapterUse, FinishReason, Request, Row
from tests.lora_runtime.engine.cache_driver import (
    BAD,
    BLOCK_SIZE,
    LAYER_MAPS,
    CacheDriver,
    ask,
    without_cache,
)

STEMS = [[0] * 30, [0, 1] * 15, [2, 0, 1] * 10]
USES = [
    (),
    (),
    (AdapterUse(digest="a"),),
    (AdapterUse(digest="a", weight=0.5),),
    (AdapterUse(digest="a", weight=0.0),),
    (AdapterUse(digest="a reloaded"),),
    (AdapterUse(digest="a"), AdapterUse(digest="b")),
    (AdapterUse(digest="b"), AdapterUse(digest="a")),
    (AdapterUse(digest="a", start_position=6),),
    (AdapterUse(digest="a", start_position=8),),
    (AdapterUse(digest="b"), AdapterUse(digest="a", start_position=9)),
    (AdapterUse(digest=BAD),),
    (AdapterUse(digest=BAD, start_position=9),),
]


def random_request(rng: random.Random, index: int, kinds=USES) -> Request:
    prompt = rng.choice(STEMS)[: rng.randint(1, 18)] + rng.choices(range(3), k=rng.randint(0, 3))
    return ask(
        str(index),
        prompt,
        *rng.choice(kinds),
        salt=rng.choice(["", "", "", "tenant"]),
        max_tokens=rng.randint(1, 12),
    )


def check_random_requests(rng: random.Random, driver: CacheDriver, kinds, planes=(1,)) -> None:
    """Requests that come at any time, some of which are cancelled: each gets what it would get
    without a cache.
    """
    expected, cancelled = {}, set()
    for index in range(25):
        request, num_planes = random_request(rng, index, kinds), rng.choice(planes)
        alone = Row.of(request, LAYER_MAPS[num_planes], num_planes)
        expected[request.request_id] = without_cache(alone)
        driver.add(request, num_planes)
        for _ in range(rng.randint(0, 4)):
            driver.step()
        if rng.random() < 0.15 and not driver.scheduler.is_idle:
            victim = rng.choice(driver.scheduler.rows())
            driver.record(driver.scheduler.end(victim, FinishReason.CANCELLED))
            cancelled.add(victim.request.request_id)
    driver.finish()
    for request_id, (tokens, end) in expected.items():
        if request_id in cancelled:
            tokens, end = tokens[: len(driver.tokens[request_id])], FinishReason.CANCELLED
        assert driver.ends[request_id] == [end]
        assert driver.tokens[request_id] == tokens


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from([27, 30, 45, 200]),
    budget=st.integers(5, 40),
    max_num_seqs=st.integers(1, 5),
    load_steps=st.sampled_from([None, 1, 2, 5]),
    steps_ahead=st.integers(0, 1),
)
def test_every_row_reads_its_own_history_under_any_schedule(
    seed, num_blocks, budget, max_num_seqs, load_steps, steps_ahead
):
    rng = random.Random(seed)
    kinds = rng.sample(USES, 4)
    driver = CacheDriver(
        num_blocks, budget=budget, max_num_seqs=max_num_seqs, max_slots=2, load_steps=load_steps,
        steps_ahead=steps_ahead,
    )  # fmt: skip
    check_random_requests(rng, driver, kinds, [1, 1, 1, 2, 3])


def test_the_random_schedules_share_evict_and_preempt():
    """The test above would show nothing if its schedules did nothing of interest."""
    rng, driver = random.Random(0), CacheDriver(40, budget=30, max_num_seqs=8)
    for index in range(150):
        driver.add(random_request(rng, index), rng.choice([1, 1, 1, 2, 3]))
    driver.finish()
    assert driver.scheduler.num_preemptions > 10
    assert driver.blocks.num_prefix_hits > 100
    assert sum(driver.num_computed.values()) > 10 * 40 * BLOCK_SIZE, "the cache was not filled"


PROMPT = [0, 1, 2] * 6 + [1]  # 19 tokens: four whole blocks and three tokens
A, B = AdapterUse(digest="a"), AdapterUse(digest="b")


def late(start, digest="a"):
    return AdapterUse(digest=digest, start_position=start)


@pytest.mark.parametrize(
    ("first", "second", "num_shared"),
    [
        ((), (), 16),
        ((A,), (A,), 16),
        ((), (A,), 0),
        ((A,), (), 0),
        ((A,), (B,), 0),
        ((A,), (AdapterUse(digest="a", weight=0.5),), 0),
        ((), (AdapterUse(digest="a", weight=0.0),), 0),
        ((A,), (AdapterUse(digest="a reloaded"),), 0),
        ((A,), (A, B), 0),
        ((A, B), (B, A), 16),
        ((), (late(10),), 8),
        ((late(10),), (), 8),
        ((), (late(8),), 8),
        ((), (late(7),), 4),
        ((), (late(16),), 16),
        ((late(10),), (late(10),), 16),
        ((late(10),), (late(11),), 8),
        ((late(10),), (late(12),), 8),
        ((late(10),), (late(10, "b"),), 8),
        ((late(0),), (A,), 16),
        ((A,), (A, late(9, "b")), 8),
        ((late(10),), (A,), 0),
    ],
)
def test_what_is_shared(first, second, num_shared):
    requests = ask("1", PROMPT, *first), ask("2", PROMPT, *second)
    assert CacheDriver().serve(*requests) == [19, 19 - num_shared]


def test_salts_and_layer_maps_share_nothing():
    driver = CacheDriver()
    salted = [ask(salt, PROMPT, salt=salt) for salt in ("", "x", "y")]
    assert driver.serve(*salted) == [19, 19, 19]
    assert driver.serve(ask("deep", PROMPT), num_planes=2) == [19]
    assert driver.serve(ask("deeper", PROMPT), num_planes=3) == [19]
    assert driver.serve(ask("deeper again", PROMPT), num_planes=3) == [3]
    assert driver.serve(ask("plain", PROMPT), ask("x2", PROMPT, salt="x")) == [3, 3]


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_conversation_goes_on_from_its_own_output(steps_ahead):
    driver = CacheDriver(steps_ahead=steps_ahead)
    first = ask("1", PROMPT, A, max_tokens=6)
    driver.serve(first)
    longer = [*PROMPT, *driver.tokens["1"], 2, 2]  # 24 of 25 tokens have keys and values
    assert driver.serve(ask("2", longer, A)) == [len(longer) - 24]


def test_a_whole_prompt_in_the_cache_still_computes_a_token():
    prompt = PROMPT[:16]
    assert CacheDriver().serve(ask("1", prompt), ask("2", prompt)) == [16, 4]


def test_blocks_are_shared_only_after_the_step_that_computed_them():
    driver = CacheDriver(budget=38)
    first, second = driver.add(ask("1", PROMPT)), driver.add(ask("2", PROMPT))
    driver.step()
    assert driver.num_computed == {"1": 19, "2": 19}, "both ran in one step"
    driver = CacheDriver(budget=10)
    first, second = (driver.add(ask(i, PROMPT, max_tokens=2)) for i in "12")
    driver.step()
    assert first.num_computed_tokens == 10 and not second.block_table
    driver.step()
    assert second.block_table[:2] == first.block_table[:2], "shared while the first still runs"
    driver.finish()
    assert driver.num_computed == {"1": 20, "2": 20 - 8}


def test_a_preempted_row_resumes_from_what_is_cached():
    driver = CacheDriver(num_blocks=9)
    driver.add(ask("old", [0] * 12, max_tokens=12))
    young = driver.add(ask("young", [1] * 14, max_tokens=10))
    driver.finish()
    assert young.num_preemptions == 1
    num_lost = driver.num_computed["young"] - (14 + 10 - 1)
    assert 0 < num_lost < 2 * BLOCK_SIZE, "the old row took one of its blocks"


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_row_with_non_finite_logits_leaves_nothing_behind(steps_ahead):
    bad = AdapterUse(digest=BAD, start_position=8)
    driver = CacheDriver(budget=8, steps_ahead=steps_ahead)
    for request_id in "12":
        assert driver.serve(ask(request_id, PROMPT, bad)) == [19]
        assert driver.ends[request_id] == [FinishReason.ERROR]
    assert driver.serve(ask("3", PROMPT), ask("4", PROMPT)) == [19, 3]
    assert driver.serve(ask("5", PROMPT, bad), ask("6", PROMPT)) == [11, 19], "not even its start"


def test_a_hit_on_an_unused_block_takes_it_out_of_the_free_ones():
    driver = CacheDriver(num_blocks=6, max_num_seqs=2)
    driver.serve(ask("warm", [0] * 8))
    driver.add(ask("runs", [1] * 11, max_tokens=2))  # three of six blocks, two are cached
    waits = driver.add(ask("waits", [0] * 15, max_tokens=1))  # the two cached and two more
    driver.step()
    assert driver.blocks.num_free == 3 and not waits.block_table
    driver.finish()
    assert driver.num_computed["waits"] == 15 - 8
    assert driver.scheduler.num_preemptions == 0


def test_without_the_cache_every_token_is_computed():
    driver = CacheDriver(is_caching=False)
    assert driver.serve(*(ask(i, PROMPT) for i in "123")) == [19, 19, 19]
    assert driver.blocks.num_prefix_hits == 0
