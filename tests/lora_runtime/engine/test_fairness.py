"""Clients share the engine: by what they were served, not by how much they ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_runtime.core import AdapterUse, FinishReason, Row
from lora_runtime.errors import Overloaded
from tests.driver import greedy, run, tiny_engine
from tests.lora_runtime.engine.cache_driver import CacheDriver, ask
from tests.lora_runtime.engine.mixed_batch import prompt, tokens, with_adapters

OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 32}


def asked(request, client, priority=0):
    return replace(request, client=client, priority=priority)


def steps_to_first_token(engine, request):
    """Adds a request; the number of steps until its first token."""
    engine.add_request(request)
    for step in range(1, 5000):
        outputs = [o for o in engine.step() if o.request_id == request.request_id]
        engine.check_integrity()
        if any(output.token_ids for output in outputs):
            return step
    raise AssertionError("never served")


def finish(engine):
    outputs = {}
    while not engine.is_idle:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check_integrity()
    return outputs


@pytest.mark.parametrize("num_tokens", [4, 90])
@pytest.mark.parametrize("long_prompt", [5, 150])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 90}], ids=["roomy", "short of blocks"])
@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_short_request_does_not_wait_for_200_long_ones(
    base, num_tokens, long_prompt, options, steps_ahead
):
    options = OPTIONS | options | {"steps_ahead": steps_ahead, "prefix_cache": False}
    short = asked(greedy("short", prompt(num_tokens), None, 4), "modest")
    alone = steps_to_first_token(tiny_engine(base, **options), short)
    engine = tiny_engine(base, **options)
    for i in range(200):
        long = greedy(f"long {i}", prompt(long_prompt, seed=i), None, 100)
        engine.add_request(asked(long, "greedy"))
    for _ in range(30):
        engine.step()
    assert len(engine.scheduler.running) > 1
    assert steps_to_first_token(engine, short) <= 3 * alone + 1


def test_a_newcomer_waits_for_no_prompts_of_clients_that_run():
    """A step's time is that of its tokens: those of others in it are waited for too."""
    driver = CacheDriver(num_blocks=400, budget=32, max_num_seqs=16)
    for i in range(8):
        driver.add(asked(ask(f"long {i}", [1 + i] * 100), "greedy"))
    driver.step()
    for name in ("one", "two"):
        driver.add(asked(ask(name, [1, 2, 1, 2]), name))
    before = driver.num_prompt_served("greedy")
    driver.step()
    assert driver.num_output("one") == driver.num_output("two") == 1
    assert driver.num_prompt_served("greedy") == before
    driver.add(asked(ask("three", [2, 2, 1]), "three"))
    driver.step()  # newcomers that never end hold up nobody: every second step is for all
    assert driver.num_output("three") == 1
    assert driver.num_prompt_served("greedy") > before
    driver.finish()


def test_a_client_of_most_rows_gives_a_newcomer_every_second_step():
    driver = CacheDriver(num_blocks=400, budget=32, max_num_seqs=20)
    longs = [f"long {i}" for i in range(12)]
    for i, name in enumerate(longs):
        driver.add(asked(ask(name, [1 + i, 2], max_tokens=60), "greedy"))
    other = asked(ask("other", [1, 1, 2], max_tokens=60), "other")
    driver.add(other)
    for _ in range(6):
        driver.step()
    for newcomer in ("one", "two", "three", "four"):
        before, of_other = driver.num_output("greedy"), driver.num_output("other")
        driver.add(asked(ask(newcomer, [2, 2, 1], max_tokens=20), newcomer))
        driver.step()
        assert driver.num_output(newcomer) == 1
        is_alone = newcomer in ("one", "three")
        assert driver.num_output("greedy") - before == (0 if is_alone else len(longs))
        assert driver.num_output("other") - of_other == 1
    driver.finish()


def test_rows_are_held_back_for_no_newcomer_that_cannot_begin():
    driver = CacheDriver(num_blocks=400, budget=32, max_num_seqs=16, max_slots=1)
    for i in range(8):
        long = ask(f"long {i}", [1 + i, 2], AdapterUse(digest="a"), max_tokens=60)
        driver.add(asked(long, "greedy"))
    for _ in range(4):
        driver.step()
    driver.add(asked(ask("waits for a slot", [1], AdapterUse(digest="b")), "other"))
    for _ in range(4):
        before = driver.num_output("greedy")
        driver.step()
        assert driver.num_output("greedy") - before == 8
    driver.finish()


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("num_tokens", [1, 5, 30])
def test_a_short_prompt_waits_for_no_long_ones_of_its_own_client(num_tokens, steps_ahead):
    driver = CacheDriver(num_blocks=800, budget=32, max_num_seqs=16, steps_ahead=steps_ahead)
    for i in range(6):
        driver.add(asked(ask(f"long {i}", [i % 3, 1, 2] * 60, salt=str(i)), "one"))
    for _ in range(3):
        driver.step()
    for i in range(4):
        driver.add(asked(ask(f"short {i}", [1 + i % 2] * num_tokens, salt=f"s{i}"), "one"))
        for _ in range(3 + steps_ahead):
            driver.step()
        assert driver.tokens[f"short {i}"]
    driver.finish()


def test_short_prompts_that_never_end_leave_half_of_the_steps_to_a_long_one():
    driver = CacheDriver(num_blocks=800, budget=32, max_num_seqs=16)
    driver.add(asked(ask("long", [1, 2, 0] * 80), "one"))
    for i in range(40):
        for k in range(6):
            driver.add(asked(ask(f"{i} {k}", [k % 3] * 8, salt=f"{i} {k}"), "one"))
        driver.step()
        if driver.tokens["long"]:
            break
    assert i <= 2 * 240 // 32 + 1
    driver.finish()


def test_a_short_prompt_of_a_lower_priority_waits():
    driver = CacheDriver(num_blocks=800, budget=32, max_num_seqs=16)
    driver.add(asked(ask("long", [1, 2, 0] * 50), "one", priority=1))
    for name, priority in (("lower", 2), ("equal", 1), ("higher", 0)):
        driver.add(asked(ask(name, [1, 2], salt=name), "one", priority))
    driver.step()
    driver.step()
    assert [bool(driver.tokens[name]) for name in ("lower", "equal", "higher")] == [0, 1, 1]
    driver.finish()


def test_prompts_of_one_client_share_its_first_step():
    driver = CacheDriver(budget=32)
    for i in range(4):
        driver.add(asked(ask(str(i), [1 + i] * 6), "alone"))
    driver.step()
    assert driver.num_output("alone") == 4


def test_rows_that_gave_way_give_the_tokens_they_give_alone(base, forms):
    """Preempted for another client, and served to the end."""
    digests = [None, *(form.digest for form in forms)]
    requests = [
        asked(greedy(str(i), prompt(5 + i, seed=i), digests[i % 5], 24), f"client {i // 6}")
        for i in range(18)
    ]
    alone = {}
    for request in requests:
        alone |= tokens(run(with_adapters(base, forms), [request]))
    engine = with_adapters(base, forms, max_num_seqs=6)
    arrivals = {str(i): 4 * (i // 6) for i in range(18)}
    assert tokens(run(engine, requests, arrivals=arrivals)) == alone
    assert engine.scheduler.num_preemptions > 0


def test_one_client_leaves_places_in_the_queue_to_the_others():
    driver = CacheDriver(max_queued_requests=8)
    for i in range(6):
        driver.add(asked(ask(f"greedy {i}", [1, 2]), "greedy"))
    with pytest.raises(Overloaded, match="6 requests of this client"):
        driver.scheduler.add(Row.of(asked(ask("one more", [1]), "greedy")))
    for i in range(2):
        driver.add(asked(ask(f"modest {i}", [1, 2]), "modest"))
    with pytest.raises(Overloaded, match="8 requests are waiting"):
        driver.scheduler.add(Row.of(asked(ask("too many", [1]), "third")))
    driver.scheduler.check_integrity()
    driver.finish()


def test_clients_that_always_wait_get_equal_service():
    """Within the price of one request each, however unlike their requests are."""
    driver = CacheDriver(num_blocks=400, budget=32, max_num_seqs=4)
    sizes = {"many short": (3, 6), "long prompts": (60, 2), "long outputs": (2, 40)}
    for client, (num_prompt, max_tokens) in sizes.items():
        for i in range(60):
            tokens_ = [hash((client, i, k)) % 3 for k in range(num_prompt)]
            request = ask(f"{client} {i}", tokens_, salt=f"{client}{i}", max_tokens=max_tokens)
            driver.add(replace(request, client=client))
    for _ in range(150):
        driver.step()
    assert all(s in {q.request.client for q in driver.scheduler.waiting} for s in sizes)
    served = {
        client: driver.num_prompt_served(client) + 2 * driver.num_output(client) for client in sizes
    }
    assert max(served.values()) - min(served.values()) <= 2 * (60 + 2 * 40), served


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.5, 3.5, 1.0)])
def test_clients_that_always_wait_get_service_by_their_weights(weights):
    """Within the price of a request each, whatever their requests are like."""
    driver = CacheDriver(num_blocks=400, budget=32, max_num_seqs=4)
    names = {f"client {weight}": weight for weight in weights}
    for number, (client, weight) in enumerate(names.items()):
        for i in range(120):
            size, max_tokens = (3, 6) if number % 2 else (20, 4)
            tokens_ = [hash((client, i, k)) % 3 for k in range(size)]
            request = ask(f"{client} {i}", tokens_, salt=f"{client}{i}", max_tokens=max_tokens)
            driver.add(replace(request, client=client, weight=weight))
    for _ in range(150):
        driver.step()
    assert all(name in {q.request.client for q in driver.scheduler.waiting} for name in names)
    served = [
        (driver.num_prompt_served(client) + 2 * driver.num_output(client)) / weight
        for client, weight in names.items()
    ]
    assert max(served) - min(served) <= 2 * (20 + 2 * 6) / min(weights), served
    assert min(served) > 200


def test_a_client_that_comes_back_has_saved_nothing_up():
    driver = CacheDriver(budget=16, max_num_seqs=2)
    first = driver.add(replace(ask("seldom", [1], max_tokens=1), client="seldom"))
    for i in range(40):
        driver.add(replace(ask(f"busy {i}", [1, 2], max_tokens=20), client="busy"))
    for _ in range(60):
        driver.step()
    assert driver.ends["seldom"] and first.num_output_tokens == 1
    for i in range(40):
        driver.add(replace(ask(f"back {i}", [1, 2], max_tokens=20), client="seldom"))
    before = {client: driver.num_output(client) for client in ("seldom", "busy")}
    for _ in range(100):
        driver.step()
    gained = {client: driver.num_output(client) - before[client] for client in before}
    assert abs(gained["seldom"] - gained["busy"]) <= 0.2 * sum(gained.values()), gained


def test_requests_of_one_client_run_by_priority_then_arrival(base):
    engine = tiny_engine(base, max_num_seqs=1)
    priorities = [0, 5, -3, 0, -3, 2**31 - 1, -(2**31)]
    for i, priority in enumerate(priorities):
        engine.add_request(asked(greedy(str(i), prompt(4), None, 2), "one", priority))
    assert list(finish(engine)) == ["6", "2", "4", "0", "3", "1", "5"]


def test_a_priority_takes_nothing_from_other_clients(base):
    engine = tiny_engine(base, **OPTIONS)
    for i in range(60):
        engine.add_request(asked(greedy(str(i), prompt(5), None, 60), "pushing", -1000))
    for _ in range(20):
        engine.step()
    assert steps_to_first_token(engine, asked(greedy("s", prompt(4), None, 2), "other", 9)) <= 4


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_an_adapter_without_room_holds_nobody_and_is_served(base, forms, steps_ahead):
    """One slot, taken for as long as there are new requests for its adapter."""
    engine = with_adapters(base, forms[:2], max_slots=1, steps_ahead=steps_ahead, **OPTIONS)
    resident, other = forms[0].digest, forms[1].digest
    for i in range(4):
        engine.add_request(greedy(f"a{i}", prompt(5, seed=i), resident, 40))
    engine.step()
    engine.add_request(greedy("other", prompt(6), other, 3))
    assert steps_to_first_token(engine, greedy("base", prompt(4), None, 3)) <= 2
    assert steps_to_first_token(engine, greedy("same", prompt(4), resident, 3)) <= 2
    served, i = {}, 4
    while "other" not in served:
        assert i < 400, "starved by those that came later"
        engine.add_request(greedy(f"a{i}", prompt(5, seed=i), resident, 8))
        i += 1
        for output in engine.step():
            if output.finish_reason is not None:
                served[output.request_id] = output.finish_reason
    assert served["other"] is FinishReason.LENGTH
    finish(engine)


def test_no_adapter_is_evicted_for_one_that_finds_no_room(base, forms):
    """The device has room for two: a third waits, and costs those that are there nothing."""
    engine = with_adapters(base, forms[:3], max_slots=2)
    engine.slots._sizes[forms[2].digest] = engine.pool.nbytes  # beside a pinned one: never
    engine.add_request(greedy("b", prompt(5), forms[1].digest, 2))
    finish(engine)
    for request_id, form in (("a", forms[0]), ("c", forms[2])):
        engine.add_request(greedy(request_id, prompt(5), form.digest, 30))
    for _ in range(5):
        engine.step()
    assert set(engine.slots.resident) == {forms[0].digest, forms[1].digest}


def test_depth_is_priced():
    """A row of three times the base's layers costs its client three times as much."""
    driver = CacheDriver(num_blocks=600, budget=32, max_num_seqs=4)
    for i in range(60):
        for client, num_planes in (("deep", 3), ("plain", 1)):
            request = ask(f"{client} {i}", [1, 2], salt=f"{i}{client}", max_tokens=12)
            driver.add(replace(request, client=client), num_planes)
    for _ in range(120):
        driver.step()
    ratio = driver.num_output("plain") / driver.num_output("deep")
    assert 1.3 <= ratio, ratio
