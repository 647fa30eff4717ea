"""Names come, swap and go while requests run, and the engine's references always add up."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lora_runtime.adapters.host_cache import HostMemoryFull
from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    InvalidRequest,
    Overloaded,
)
from loramux.server.adapters.changes import NameChanges
from loramux.server.adapters.registry import MAX_FAILED_RECORDS, Registry
from loramux.server.adapters.shares import givers
from loramux.server.calls import AdapterRecord, AdapterState
from tests.fakes import PLAIN, ScriptedEngine


class NoObserver:
    def on_adapter_loaded(self, name: str, digest: str, nbytes: int, seconds: float) -> None: ...

    def on_adapter_unloaded(self, name: str) -> None: ...


def make(engine: ScriptedEngine) -> tuple[Registry, NameChanges]:
    registry = Registry(engine, "tiny")
    return registry, NameChanges(engine, registry, NoObserver())


def folder(tmp_path: Path, content: str) -> Path:
    path = tmp_path / f"adapter-{content}"
    path.mkdir(exist_ok=True)
    (path / "adapter_model.safetensors").write_text(content)
    return path


async def load(changes: NameChanges, name: str, path: Path, **options: object):
    return await changes.load(name, path, source="given", **options)


async def test_loading_the_same_content_again_is_idempotent(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    registry, changes = make(engine)
    first, was_there = await load(changes, "x", folder(tmp_path, "a"))
    again, was_there_again = await load(changes, "x", folder(tmp_path, "a"))
    assert (was_there, was_there_again) == (False, True)
    assert again is first
    assert engine.references == {first.digest: 1}


async def test_other_content_needs_replace(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    registry, changes = make(engine)
    old, _ = await load(changes, "x", folder(tmp_path, "a"))
    with pytest.raises(AdapterExists) as caught:
        await load(changes, "x", folder(tmp_path, "b"))
    assert caught.value.field == "name"
    assert registry.resolve("x") is old
    assert engine.references == {old.digest: 1}
    new, was_there = await load(changes, "x", folder(tmp_path, "b"), replace=True)
    assert registry.resolve("x") is new and not was_there and new.former is old
    await asyncio.sleep(0.01)
    assert engine.references == {old.digest: 1, new.digest: 1}


def with_facts(path: Path, **facts: object) -> Path:
    (path / "adapter_config.json").write_text(json.dumps(facts))
    return path


async def test_the_same_weights_with_another_template_are_other_content(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    registry, changes = make(engine)
    old, _ = await load(changes, "x", with_facts(folder(tmp_path, "a"), chat_template="1"))
    changed = with_facts(folder(tmp_path, "a"), chat_template="2")
    with pytest.raises(AdapterExists):
        await load(changes, "x", changed)
    new, was_there = await load(changes, "x", changed, replace=True)
    assert (old.digest, was_there) == (new.digest, False)
    assert "2" in registry.resolve("x").loaded.facts.text_sha256
    await asyncio.sleep(0.01)
    assert engine.references == {new.digest: 2}


async def test_a_record_has_the_engines_notes_and_the_reviews(tmp_path: Path) -> None:
    registry, changes = make(ScriptedEngine())
    path = with_facts(folder(tmp_path, "a"), notes=["from the engine"])
    seen = []

    async def review(loaded):
        seen.append(loaded)
        return None, ("from the review",)

    record, _ = await load(changes, "x", path, review=review)
    assert record.notes == ("from the engine", "from the review")
    again, was_there = await load(changes, "x", path, review=review)
    assert again is record and was_there and seen == [record.loaded]


async def test_what_operators_keep_for_a_rollback_is_of_no_tenant(tmp_path: Path) -> None:
    _, changes = make(ScriptedEngine())
    old, _ = await load(changes, "x", folder(tmp_path, "a"), tenant="acme", is_on_demand=True)
    new, _ = await load(changes, "x", folder(tmp_path, "b"), replace=True)
    assert new.former is old and not old.tenants and not old.is_on_demand
    full = HostMemoryFull(old.num_bytes, 2 * old.num_bytes, 3 * old.num_bytes)
    of_a = AdapterRecord(name="a", source="s", state=AdapterState.LOADED, tenants={"a": 0.0})
    of_a.loaded = replace(PLAIN, facts=replace(PLAIN.facts, digest="of a"), nbytes=old.num_bytes)
    assert givers([new, of_a], full, "b", {}) == ["b", "a"], "a has all that is left"


async def test_a_request_counts_under_each_record_while_it_runs(tmp_path: Path) -> None:
    registry, changes = make(ScriptedEngine())
    records = [(await load(changes, name, folder(tmp_path, name)))[0] for name in "ab"]
    with pytest.raises(RuntimeError), registry.in_flight(records, ["1"]):
        with registry.in_flight(records[:1], ["2"]), registry.in_flight([], []):
            assert [record.num_in_flight for record in records] == [2, 1]
        raise RuntimeError
    assert [record.num_in_flight for record in records] == [0, 0]


async def test_two_names_may_share_content(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    registry, changes = make(engine)
    one, _ = await load(changes, "one", folder(tmp_path, "a"))
    two, _ = await load(changes, "two", folder(tmp_path, "a"))
    assert engine.references == {one.digest: 2}
    await changes.unload("one", wait=True)
    assert registry.resolve("two") is two
    assert engine.references == {two.digest: 1}


async def test_a_failed_replacement_leaves_the_old_one(tmp_path: Path) -> None:
    registry, changes = make(ScriptedEngine())
    old, _ = await load(changes, "x", folder(tmp_path, "a"))
    with pytest.raises(AdapterRefused):
        await load(changes, "x", folder(tmp_path, "!AdapterRefused"), replace=True)
    assert registry.resolve("x") is old
    assert [record.state for record in registry.records()] == [AdapterState.LOADED]


async def test_a_failed_load_shows_why_without_host_paths(tmp_path: Path) -> None:
    registry, changes = make(ScriptedEngine())
    with pytest.raises(AdapterRefused) as caught:
        await load(changes, "x", folder(tmp_path, "!AdapterRefused"))
    assert caught.value.message == "given/adapter_model.safetensors: header is cut short"
    assert caught.value.field == "lora_A"
    record = registry.get("x")
    assert (record.state, record.error) == (AdapterState.FAILED, caught.value.message)
    with pytest.raises(OSError):
        await load(changes, "y", folder(tmp_path, "!OSError"))
    assert str(tmp_path) not in registry.get("y").error
    with pytest.raises(AdapterNotFound):
        registry.resolve("x")
    await load(changes, "x", folder(tmp_path, "a"))
    assert registry.resolve("x").error == ""


async def test_a_failed_load_is_shown_until_its_name_is_unloaded(tmp_path: Path) -> None:
    registry, changes = make(ScriptedEngine())
    with pytest.raises(AdapterRefused):
        await load(changes, "x", folder(tmp_path, "!AdapterRefused"))
    assert (await changes.unload("x", wait=True)).state is AdapterState.FAILED
    assert registry.records() == []
    with pytest.raises(AdapterNotFound, match="not loaded"):
        await changes.unload("x")


async def test_failed_records_are_bounded(tmp_path: Path) -> None:
    registry, changes = make(ScriptedEngine())
    for index in range(MAX_FAILED_RECORDS + 10):
        with pytest.raises(AdapterRefused):
            await load(changes, f"x{index}", folder(tmp_path, "!AdapterRefused"))
    assert len(registry.records()) == MAX_FAILED_RECORDS
    with pytest.raises(AdapterNotFound):
        registry.get("x0")


async def test_the_bases_name_is_taken(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await load(make(ScriptedEngine())[1], "tiny", folder(tmp_path, "a"))
    assert caught.value.field == "name"


async def test_a_load_goes_on_when_its_caller_leaves(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    engine.load_gate.clear()
    registry, changes = make(engine)
    caller = asyncio.create_task(load(changes, "x", folder(tmp_path, "a")))
    await asyncio.sleep(0.01)
    assert registry.get("x").state is AdapterState.VERIFYING
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    engine.load_gate.set()
    await asyncio.sleep(0.01)
    assert registry.resolve("x").state is AdapterState.LOADED


async def test_calls_for_one_name_take_turns_and_others_do_not_wait(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    engine.load_gate.clear()
    registry, changes = make(engine)
    loads = [asyncio.create_task(load(changes, "x", folder(tmp_path, c))) for c in "ab"]
    unload = asyncio.create_task(changes.unload("x"))
    await asyncio.sleep(0.01)
    engine.load_gate.set()
    await load(changes, "other", folder(tmp_path, "c"))
    first, second = await asyncio.gather(*loads, return_exceptions=True)
    assert first[0].digest.startswith("a")
    assert isinstance(second, AdapterExists)
    assert (await unload) is first[0]
    with pytest.raises(AdapterNotFound):
        registry.resolve("x")


async def test_close_ends_background_work(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    engine.load_gate.clear()
    registry, changes = make(engine)
    task = asyncio.create_task(load(changes, "x", folder(tmp_path, "a")))
    await asyncio.sleep(0.01)
    await changes.close()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("seed", range(5))
async def test_references_add_up_after_any_history(tmp_path: Path, seed: int) -> None:
    """Model: a dictionary from name to its contents, the one that answers last, and the names that
    hold nothing because their load failed."""
    rng, engine = random.Random(seed), ScriptedEngine()
    registry, changes = make(engine)
    model, failed = {}, set()
    for _ in range(200):
        name, content = rng.choice("xyz"), rng.choice(["a", "b", "c", "!AdapterRefused"])
        replace, known, draw = rng.random() < 0.5, model.get(name), rng.random()
        try:
            if draw < 0.2:
                await changes.unload(name, wait=True)
                assert (model.pop(name, None) is not None) != (name in failed)
                failed.discard(name)
            elif draw < 0.4:
                await changes.rollback(name)
                model[name] = known[::-1]
                assert len(known) == 2
            else:
                await load(changes, name, folder(tmp_path, content), replace=replace)
                assert known is None or known[-1] == content or replace
                kept = [] if known is None else known[-1:]
                model[name] = known if kept == [content] else [*kept, content]
                failed.discard(name)
        except AdapterNotFound:
            assert known is None or len(known) == 1
            assert draw >= 0.2 or name not in failed
        except AdapterExists:
            assert known is not None and known[-1] != content and not replace
        except AdapterRefused:
            assert content == "!AdapterRefused"
            failed |= {name} - set(model)
    await asyncio.sleep(0.01)
    assert {name: registry.resolve(name).digest[0] for name in model} == {
        name: contents[-1] for name, contents in model.items()
    }
    held = sorted(content for contents in model.values() for content in contents)
    assert sorted(d[0] for d in engine.references.elements()) == held


async def test_rollback_swaps_a_name_with_its_former_content_and_back(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    registry, changes = make(engine)
    for content in "abc":
        await load(changes, "x", folder(tmp_path, content), replace=True)
    await asyncio.sleep(0.01)
    assert sorted(d[0] for d in engine.references) == ["b", "c"], "one former content, no more"
    record = await changes.rollback("x")
    assert (record.digest[0], record.former.digest[0]) == ("b", "c")
    assert registry.resolve("x") is record and record.state is AdapterState.LOADED
    assert (await changes.rollback("x")).digest[0] == "c"
    await changes.unload("x", wait=True)
    assert engine.references == {} and registry.records() == []


async def test_there_is_nothing_to_roll_back_to_at_first_and_after_unload(tmp_path: Path) -> None:
    registry, changes = make(ScriptedEngine())
    with pytest.raises(AdapterNotFound, match="not loaded") as unknown:
        await changes.rollback("x")
    await load(changes, "x", folder(tmp_path, "a"))
    with pytest.raises(AdapterNotFound, match="no former content") as first:
        await changes.rollback("x")
    await load(changes, "x", folder(tmp_path, "b"), replace=True)
    await changes.unload("x", wait=True)
    await load(changes, "x", folder(tmp_path, "b"))
    with pytest.raises(AdapterNotFound, match="no former content") as after:
        await changes.rollback("x")
    assert [e.value.field for e in (unknown, first, after)] == ["name"] * 3
    assert registry.resolve("x").digest[0] == "b"


async def test_names_are_bounded_also_where_all_hold_one_content(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("loramux.server.adapters.registry.MAX_NAMES", 5)
    engine = ScriptedEngine()
    registry, changes = make(engine)
    path = folder(tmp_path, "a")
    for index in range(5):
        await load(changes, f"n{index}", path)
    with pytest.raises(Overloaded, match="5 names of adapters are known") as caught:
        await load(changes, "n5", path)
    assert caught.value.field == "name" and sum(engine.references.values()) == 5
    await load(changes, "n0", path)
    await load(changes, "n1", folder(tmp_path, "b"), replace=True)
    await changes.unload("n2")
    await load(changes, "n5", path)
