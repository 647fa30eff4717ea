"""A server that is started again: the same names, by content, or an error that says what is not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    AdapterSourceRefused,
    ConfigError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from lora_runtime.temporary_folder import temporary_folder
from loramux.server import app
from loramux.server.adapters.loads import Loads
from loramux.server.adapters.names import NameStore
from loramux.server.app import Ports
from loramux.server.client import AsyncClient
from loramux.server.config import load_config
from loramux.v1.adapters_pb2 import AdapterState
from tests.fakes import ScriptedEngine
from tests.server.world import until
from tests.tiny_tokenizer import write_tokenizer


class LocalEngine(ScriptedEngine):
    """A scripted engine that a server can start and close."""

    base_folder: Path


class Host:
    """What stays while servers come and go: folders of adapters and the state folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.roots = folder, folder / "adapters"
        self.roots.mkdir()
        write_tokenizer(folder)

    def write(self, name: str, content: str, **facts: object) -> str:
        path = self.roots / name
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps(facts))
        (path / "adapter_model.safetensors").write_text(content)
        return name

    @contextlib.asynccontextmanager
    async def serving(self, engine: LocalEngine | None = None, **flags) -> AsyncIterator:
        """A server as long as the context lasts; then it is gone without a word, as if killed."""
        engine = engine or LocalEngine()
        engine.base_folder = self.folder
        ports: asyncio.Future[Ports] = asyncio.get_running_loop().create_future()
        listen = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}
        state = {"adapter_roots": [self.roots], "adapter_store": self.folder / "store"}
        config = load_config(flags={**listen, **state, **flags})
        starting = app.serve(config, start=lambda *_, **__: engine, on_ready=ports.set_result)
        task = asyncio.create_task(starting)
        try:
            await asyncio.wait([task, ports], return_when=asyncio.FIRST_COMPLETED)
            if not ports.done():
                await task
            async with AsyncClient(f"127.0.0.1:{ports.result().grpc}") as client:
                yield client
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


async def known(client: AsyncClient) -> list[tuple[str, str, str, int]]:
    return [
        (info.name, info.digest, info.former_digest, info.state)
        for info in await client.list_adapters()
    ]


async def ask(client: AsyncClient, name: str) -> list[int]:
    stream = client.generate(token_ids=[5], adapter=name, max_tokens=2, ignore_eos=True)
    return [token async for event in stream for token in event.delta.token_ids]


async def test_names_contents_and_former_contents_come_back(host):
    async with host.serving() as client:
        await client.load_adapter("x", host.write("one", "a1"))
        await client.load_adapter("x", host.write("two", "b2"), replace=True)
        await client.load_adapter("y", "one")
        await client.load_adapter("gone", "one")
        await client.unload_adapter("gone")
        await client.upload_adapter("sent", host.roots / "two")
        before = await known(client)
        answers = [await ask(client, name) for name in ("x", "y", "sent")]
    assert [name for name, *_ in before] == ["sent", "x", "y"]
    async with host.serving() as client:
        assert await known(client) == before
        assert [await ask(client, name) for name in ("x", "y", "sent")] == answers
        back = await client.rollback_adapter("x")
        assert back.former_digest == before[1][1] and await ask(client, "x") == answers[1]
    async with host.serving() as client:
        assert (await client.get_adapter("x")).digest == back.digest, "a rollback is kept too"
        await client.rollback_adapter("x")
        assert await known(client) == before


CHANGES = {
    "other weights": lambda host: host.write("one", "changed"),
    "another template": lambda host: host.write("one", "a1", chat_template="{role}"),
    "gone": lambda host: shutil.rmtree(host.roots / "one"),
    "unreadable": lambda host: host.write("one", "!AdapterRefused"),
    "an error of the disk": lambda host: host.write("one", "!OSError"),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_source_that_changed_is_named_and_never_served_as_the_old(host, change):
    async with host.serving() as client:
        await client.load_adapter("x", host.write("one", "a1"))
        await client.load_adapter("y", host.write("two", "b2"))
        digest = (await client.get_adapter("x")).digest
    CHANGES[change](host)
    async with host.serving() as client:
        info = await client.get_adapter("x")
        assert info.state == AdapterState.ADAPTER_STATE_FAILED and info.error
        assert str(host.folder) not in info.error
        with pytest.raises(AdapterNotFound, match="could not be loaded again"):
            await ask(client, "x")
        assert await ask(client, "y"), "the others are served"
        host.write("one", "c3")
        with pytest.raises(AdapterExists, match=digest[:12]):
            await client.load_adapter("x", "one")
        host.write("one", "a1")
        assert (await client.load_adapter("x", "one")).adapter.digest == digest
    async with host.serving() as client:
        assert (await client.get_adapter("x")).digest == digest
        await client.unload_adapter("x")
    async with host.serving() as client:
        assert [name for name, *_ in await known(client)] == ["y"]


async def test_a_name_that_could_not_be_loaded_can_be_replaced_or_forgotten(host):
    async with host.serving() as client:
        for name in ("x", "y"):
            await client.load_adapter(name, host.write("one", "a1"))
    host.write("one", "c3")
    async with host.serving() as client:
        new = (await client.load_adapter("x", "one", replace=True)).adapter.digest
        await client.unload_adapter("y")
        with pytest.raises(AdapterNotFound):
            await client.get_adapter("y")
    async with host.serving() as client:
        assert await known(client) == [("x", new, "", AdapterState.ADAPTER_STATE_LOADED)]


async def test_a_former_content_that_is_lost_is_a_note(host):
    async with host.serving() as client:
        await client.load_adapter("x", host.write("one", "a1"))
        await client.load_adapter("x", host.write("one", "b2"), replace=True)
    async with host.serving() as client:
        info = await client.get_adapter("x")
        assert info.digest[0] == "b" and info.former_digest == ""
        assert any("former content cannot be brought back" in note for note in info.notes)
        with pytest.raises(AdapterNotFound):
            await client.rollback_adapter("x")


async def test_ready_only_when_all_are_loaded(host):
    async with host.serving() as client:
        await client.load_adapter("x", host.write("one", "a1"))
    engine = LocalEngine()
    engine.load_gate.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5), host.serving(engine):
            pass
    engine = LocalEngine()
    engine.load_gate.clear()
    async with host.serving(engine, wait_for_adapters=False) as client:
        with pytest.raises(Unavailable, match="being loaded again"):
            await ask(client, "x")
        engine.load_gate.set()
        async with asyncio.timeout(5):
            while (await client.get_adapter("x")).state != AdapterState.ADAPTER_STATE_LOADED:
                await asyncio.sleep(0.01)
        assert await ask(client, "x")


async def test_adapters_named_at_the_start(host, tmp_path):
    outside = host.folder / "elsewhere"
    shutil.copytree(host.roots / host.write("one", "a1"), outside)
    async with host.serving(adapter=[f"x={outside}", f"y={host.roots / 'one'}"]) as client:
        assert await ask(client, "x") == await ask(client, "y")
        (first, *_), (second, *_) = await known(client)
        assert (first, second) == ("x", "y")
    (outside / "adapter_model.safetensors").write_text("b2")
    async with host.serving(adapter=[f"x={outside}"]) as client:
        assert (await client.get_adapter("x")).digest[0] == "b"


@pytest.mark.parametrize("is_upload", [False, True])
async def test_a_name_comes_back_from_the_newest_source_of_its_content(host, is_upload):
    async def move(client, name, copy):
        if is_upload:
            await client.upload_adapter(name, host.roots / copy)
        else:
            await client.load_adapter(name, copy, replace=True)

    async with host.serving() as client:
        await client.load_adapter("x", host.write("old", "a1"))
        await move(client, "x", host.write("copy", "a1"))
        await client.load_adapter("y", "old")
        await move(client, "y", "copy")
        await client.load_adapter("y", host.write("two", "b2"), replace=True)
        sources = {info.source for info in await client.list_adapters()}
        before = await known(client)
    assert "old" not in sources
    shutil.rmtree(host.roots / "old")
    async with host.serving() as client:
        assert await known(client) == before
        assert (await client.rollback_adapter("y")).digest[0] == "a", "the former content too"


async def test_an_adapter_named_at_the_start_keeps_what_its_name_held_before(host):
    outside = host.folder / "elsewhere"
    shutil.copytree(host.roots / host.write("two", "b2"), outside)
    async with host.serving() as client:
        await client.load_adapter("x", host.write("one", "a1"))
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            async with host.serving(adapter=[f"x={outside}"]) as client:
                info = await client.get_adapter("x")
                assert info.digest[0] == "b" and info.former_digest[0] == "a"
    assert [line for line in lines if line["log_level"] == "error"] == []
    engine = LocalEngine()
    async with host.serving(engine) as client:
        assert (await client.get_adapter("x")).state == AdapterState.ADAPTER_STATE_FAILED
        await client.load_adapter("x", "two")
        assert (await client.rollback_adapter("x")).digest[0] == "a"
        await client.unload_adapter("x", wait=True)
        assert not +engine.references


async def test_the_operators_folder_does_not_take_the_place_of_a_source_that_lasts(host):
    outside = host.folder / "elsewhere"
    shutil.copytree(host.roots / host.write("one", "a1"), outside)
    async with host.serving() as client:
        await client.upload_adapter("x", outside)
    async with host.serving(adapter=[f"x={outside}"]):
        pass
    async with host.serving() as client:
        assert (await client.get_adapter("x")).state == AdapterState.ADAPTER_STATE_LOADED


async def test_a_folder_named_at_the_start_may_change_without_an_error(host):
    outside = host.folder / "elsewhere"
    shutil.copytree(host.roots / host.write("two", "b2"), outside)
    async with host.serving() as client:
        await client.load_adapter("x", host.write("one", "a1"))
    async with host.serving(adapter=[f"x={outside}"]):
        pass
    (outside / "adapter_model.safetensors").write_text("c3")
    with structlog.testing.capture_logs() as lines:
        async with host.serving(adapter=[f"x={outside}"]) as client:
            info = await client.get_adapter("x")
            assert info.digest[0] == "c" and info.former_digest[0] == "a"
    assert [line for line in lines if line["log_level"] == "error"] == []


@pytest.mark.parametrize("again", ["the same", "another"])
async def test_a_name_that_failed_at_a_restart_keeps_its_former_content(host, again):
    async with host.serving() as client:
        await client.load_adapter("x", host.write("one", "a1"))
        await client.load_adapter("x", host.write("two", "b2"), replace=True)
    shutil.rmtree(host.roots / "two")
    engine = LocalEngine()
    async with host.serving(engine) as client:
        with pytest.raises(AdapterSourceRefused):
            await client.load_adapter("x", "two")
        host.write("two", "b2" if again == "the same" else "c3")
        await client.load_adapter("x", "two", replace=True)
        assert (await client.get_adapter("x")).former_digest[0] == "a"
        before = await known(client)
    async with host.serving() as client:
        assert await known(client) == before
        assert (await client.rollback_adapter("x")).digest[0] == "a"
    shutil.rmtree(host.roots / "one")
    engine = LocalEngine()
    async with host.serving(engine) as client:
        await client.unload_adapter("x", wait=True)
        assert not +engine.references, "the former content of a failed name is freed too"


async def test_a_name_that_failed_at_a_restart_can_be_rolled_back(host):
    async with host.serving() as client:
        await client.load_adapter("x", host.write("one", "a1"))
        await client.load_adapter("x", host.write("two", "b2"), replace=True)
    shutil.rmtree(host.roots / "two")
    engine = LocalEngine()
    async with host.serving(engine) as client:
        assert (await client.get_adapter("x")).state == AdapterState.ADAPTER_STATE_FAILED
        info = await client.rollback_adapter("x")
        assert (info.digest[0], info.former_digest) == ("a", "")
        assert await ask(client, "x")
        with pytest.raises(AdapterNotFound, match="no former content"):
            await client.rollback_adapter("x")
        assert (await client.get_adapter("x")).digest[0] == "a"
    async with host.serving(engine := LocalEngine()) as client:
        info = await client.get_adapter("x")
        assert info.digest[0] == "a" and any("former content" in note for note in info.notes)
    host.write("two", "b2")
    async with host.serving(engine := LocalEngine()) as client:
        assert (await client.rollback_adapter("x")).digest[0] == "b", "what failed has come back"
        await client.unload_adapter("x", wait=True)
        assert not +engine.references


async def test_a_name_that_never_held_anything_cannot_be_rolled_back(host):
    async with host.serving() as client:
        for name, source in {"x": "missing", "y": host.write("one", "!AdapterRefused")}.items():
            with pytest.raises(AdapterRefused):
                await client.load_adapter(name, source)
            with pytest.raises(AdapterNotFound):
                await client.rollback_adapter(name)


async def test_a_name_of_the_operators_folder_says_what_to_do_without_the_flag(host):
    outside = host.folder / "elsewhere"
    shutil.copytree(host.roots / host.write("one", "a1"), outside)
    async with host.serving(adapter=[f"x={outside}"]):
        pass
    async with host.serving() as client:
        error = (await client.get_adapter("x")).error
        for part in (str(outside), "--adapter x=PATH", "--adapter-roots", "unload"):
            assert part in error


@pytest.mark.parametrize(
    ("adapters", "error"),
    [
        (["x=/does/not/exist"], ConfigError),
        (["x"], ConfigError),
        (["={root}/one"], ConfigError),
        (["x={root}/one", "x={root}/one"], ConfigError),
        (["../x={root}/one"], InvalidRequest),
        (["tiny={root}/one"], InvalidRequest),
        (["x={root}"], AdapterSourceRefused),
    ],
)
async def test_what_cannot_be_loaded_at_the_start_ends_it(host, adapters, error):
    host.write("one", "a1")
    with pytest.raises(error):
        async with host.serving(adapter=[text.format(root=host.roots) for text in adapters]):
            pass


async def test_a_folder_of_a_hubs_cache_is_loaded_at_the_start(host):
    blobs, snapshot = host.folder / "hub" / "blobs", host.folder / "hub" / "snapshots" / "main"
    shutil.copytree(host.roots / host.write("one", "a1"), blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    async with host.serving(adapter=[f"x={snapshot}"]) as client:
        assert (await client.get_adapter("x")).digest[0] == "a"


async def test_own_text_comes_back_with_the_content_and_with_the_former_one(host):
    host.write("one", "a1", chat_template="{{ messages[0].content | upper }}")
    host.write("two", "b2", chat_template="{{ messages[0].content }}!")

    async def prompt(client: AsyncClient, engine: LocalEngine) -> tuple[int, ...]:
        messages = [{"role": "user", "content": "hi"}]
        await client.generate(messages=messages, adapter="x", max_tokens=1).text()
        return engine.seen[-1].prompt_token_ids

    engine = LocalEngine()
    async with host.serving(engine) as client:
        await client.load_adapter("x", "one")
        upper = await prompt(client, engine)
        await client.load_adapter("x", "two", replace=True)
        exclaiming = await prompt(client, engine)
    assert upper != exclaiming
    engine = LocalEngine()
    async with host.serving(engine) as client:
        assert await prompt(client, engine) == exclaiming
        await client.rollback_adapter("x")
        assert await prompt(client, engine) == upper


async def test_a_former_content_of_another_text_is_gone(host):
    async with host.serving() as client:
        await client.load_adapter("x", host.write("one", "a1"))
        await client.load_adapter("x", host.write("two", "b2"), replace=True)
    host.write("one", "a1", chat_template="{{ messages[0].content | upper }}")
    engine = LocalEngine()
    async with host.serving(engine) as client:
        info = await client.get_adapter("x")
        assert not info.former_digest and "other text files" in "".join(info.notes)
        await until(lambda: len(+engine.references) == 1)


async def test_a_stored_upload_is_read_again_as_the_files_that_came(host):
    async with host.serving() as client:
        await client.upload_adapter("x", host.roots / host.write("one", "a1"))
        source = (await client.get_adapter("x")).source
    engine = LocalEngine()
    async with host.serving(engine):
        (rules,) = engine.rules.values()
        assert rules.sha256 == source and host.roots.resolve() in rules.roots


async def test_a_change_that_cannot_be_kept_is_not_made(host, monkeypatch):
    engine = LocalEngine()
    async with host.serving(engine) as client:
        await client.load_adapter("x", host.write("one", "a1"))
        await client.load_adapter("x", host.write("two", "b2"), replace=True)
        before, references = await known(client), dict(engine.references)

        def fail(*_):
            raise Overloaded("the disk is full")

        for name in ("put", "delete"):
            monkeypatch.setattr(NameStore, name, fail)
        host.write("three", "c3")
        for change in (
            lambda: client.load_adapter("x", "three", replace=True),
            lambda: client.load_adapter("new", "three"),
            lambda: client.upload_adapter("new", host.roots / "three"),
            lambda: client.rollback_adapter("x"),
            lambda: client.unload_adapter("x"),
        ):
            with pytest.raises(Overloaded):
                await change()
        await until(lambda: dict(engine.references) == references)
        assert [entry for entry in await known(client) if entry[0] == "x"] == before
        assert await ask(client, "x") == [ord("b")] * 2


async def test_a_review_that_raises_leaves_nothing_behind(host, monkeypatch):
    engine = LocalEngine()
    async with host.serving(engine) as client:

        async def fail(*_):
            raise TypeError("a lone surrogate")

        monkeypatch.setattr(Loads, "_review", fail)
        for _ in range(3):
            with pytest.raises(Exception, match="internal error"):
                await client.load_adapter("x", host.write("one", "a1"))
        assert not +engine.references
        (info,) = await client.list_adapters()
        assert info.state == AdapterState.ADAPTER_STATE_FAILED


async def test_a_folder_nobody_chose_may_be_in_use(host, monkeypatch):
    monkeypatch.setenv("LORAMUX_CACHE", str(host.folder / "cache"))
    (host.folder / "cache" / "uploads").mkdir(parents=True)
    taken = NameStore(host.folder / "cache" / "uploads", "f" * 64)
    async with host.serving(adapter_store=None) as client:
        await client.load_adapter("x", host.write("one", "a1"))
        assert await ask(client, "x")
    with pytest.raises(ConfigError, match="in use"):
        async with host.serving(adapter_store=host.folder / "cache" / "uploads"):
            pass
    taken.close()


async def test_every_change_is_a_line_of_the_log(host):
    with structlog.testing.capture_logs() as lines:
        async with host.serving() as client:
            await client.load_adapter("x", host.write("one", "a1"))
            await client.load_adapter("x", host.write("two", "b2"), replace=True)
            await client.upload_adapter("z", host.roots / "two")
            await client.rollback_adapter("x")
            await client.unload_adapter("x")
            for attempt in (
                client.load_adapter("y", "nowhere"),
                client.load_adapter("y", host.write("bad", "!AdapterRefused")),
            ):
                with pytest.raises(Exception, match="nowhere|bad"):
                    await attempt
        async with host.serving():
            pass
    lines = [line for line in lines if "adapter" in line and line["event"] != "audit"]
    told = [(line["event"], line["adapter"]) for line in lines]
    assert told == [
        ("adapter loaded", "x"),
        ("adapter replaced", "x"),
        ("adapter uploaded", "z"),
        ("adapter loaded", "z"),
        ("adapter rolled back", "x"),
        ("adapter unloaded", "x"),
        ("adapter refused", "y"),
        ("adapter refused", "y"),
        ("adapter restored", "z"),
    ]
    replaced = lines[[line["event"] for line in lines].index("adapter replaced")]
    assert replaced["digest"][0] == "b" and replaced["former_digest"][0] == "a"
    assert replaced["source"] == "two" and replaced["seconds"] >= 0


async def test_what_a_killed_server_was_receiving_is_removed_at_the_start(host):
    incoming = host.folder / "store" / "incoming"
    (incoming / "half").mkdir(parents=True)
    (incoming / "half" / "adapter_model.safetensors").write_text("a")
    async with host.serving():
        assert list(incoming.iterdir()) == []


async def test_another_server_may_be_receiving_into_the_same_folder(host):
    incoming = host.folder / "store" / "incoming"
    incoming.mkdir(parents=True)
    with temporary_folder(incoming) as running:
        async with host.serving() as client:
            await client.upload_adapter("x", host.roots / host.write("one", "a1"))
            assert list(incoming.iterdir()) == [running]
