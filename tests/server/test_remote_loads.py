"""A server that fetches adapters, from a client's call to a restart; and pins."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3

import pytest
import structlog

from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    AdapterSourceRefused,
    AdapterTooLarge,
    ConfigError,
    InvalidRequest,
    Unavailable,
)
from loramux.server.adapters.names import NameStore
from loramux.server.adapters.sources import hub as hub_module
from loramux.server.adapters.sources import remote as remote_module
from loramux.server.client import AsyncClient
from loramux.server.config import load_config
from loramux.v1.adapters_pb2 import AdapterState
from tests.server.access.keyring import ACME as ACME_KEY
from tests.server.access.keyring import write_keys
from tests.server.places import WEIGHTS, Hub, adapter, status
from tests.server.test_restart import Host, LocalEngine, ask
from tests.server.world import until

DOWNLOADING, LOADED = AdapterState.ADAPTER_STATE_DOWNLOADING, AdapterState.ADAPTER_STATE_LOADED
FAILED = AdapterState.ADAPTER_STATE_FAILED


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module.FetchLimits, "__init__", hasty(remote_module.FetchLimits))
    return Host(tmp_path)


def hasty(limits):
    usual = limits.__init__

    def build(self, **given):
        usual(self, **{"pause_s": 0.01, **given})

    return build


@pytest.fixture
def hub(monkeypatch):
    with Hub() as place:
        template = f"{place.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub_module.constants, "ENDPOINT", place.url)
        monkeypatch.setattr(hub_module.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_module.constants, "HF_HUB_OFFLINE", False)
        yield place


def stored(host) -> list[str]:
    folder = host.folder / "store"
    return sorted(p.name for part in ("adapters", "incoming") for p in (folder / part).glob("*"))


ACME = {"adapter_sources": ["hf:acme/"]}


async def test_a_hub_s_adapter_answers_and_comes_back_without_the_hub(host, hub):
    hub.push("acme/x", adapter("a1"))
    async with host.serving(**ACME) as client:
        with pytest.raises(AdapterSourceRefused, match="--adapter-sources"):
            await client.load_adapter("x", "hf:other/x")
        info = (await client.load_adapter("x", "hf:acme/x@main")).adapter
        (digest,) = stored(host)
        assert info.source == f"hf:acme/x@main#sha256={digest}" and info.state == LOADED
        assert await ask(client, "x") == [ord("a")] * 2
        assert (await client.load_adapter("x", "hf:acme/x@main")).already_loaded
        assert [s.adapters[:] for s in (await client.list_stored_adapters()).stored] == [["x"]]
        hub.push("acme/x", adapter("b2"))
        with pytest.raises(AdapterExists, match="with replace"):
            await client.load_adapter("x", "hf:acme/x@main")
        await client.load_adapter("x", "hf:acme/x@main", replace=True)
        assert await ask(client, "x") == [ord("b")] * 2
    hub.seen.clear()
    async with host.serving() as client:  # it may fetch nothing now
        assert await ask(client, "x") == [ord("b")] * 2
        await client.rollback_adapter("x")
        assert await ask(client, "x") == [ord("a")] * 2
        assert len(stored(host)) == 2 and not hub.seen
        assert (await client.get_adapter("x")).source.endswith(digest)


async def test_what_the_store_lost_is_fetched_again_if_it_is_the_same(host, hub):
    hub.push("acme/x", adapter("a1"))
    async with host.serving(**ACME) as client:
        await client.load_adapter("x", "hf:acme/x")
    shutil.rmtree(host.folder / "store" / "adapters")
    async with host.serving(**ACME) as client:
        assert await ask(client, "x") == [ord("a")] * 2 and len(stored(host)) == 1
    shutil.rmtree(host.folder / "store" / "adapters")
    hub.push("acme/x", adapter("b2"))
    async with host.serving(**ACME) as client:
        with pytest.raises(AdapterNotFound, match="by now, not the"):
            await ask(client, "x")


async def test_a_download_is_seen_and_other_loads_go_on(host, web):
    source = web.put("x", adapter("a" * 100))
    web.bent[("GET", f"/x/{WEIGHTS}")] = [web.hang(40)]
    async with host.serving(adapter_sources=[f"{web.url}/"], adapter_fetch_idle_s=30) as client:
        loading = asyncio.create_task(client.load_adapter("x", source))
        async with asyncio.timeout(10):
            while True:
                infos = {info.name: info for info in await client.list_adapters()}
                if "x" in infos and infos["x"].num_downloaded_bytes == 42:
                    break
                await asyncio.sleep(0.01)
        assert infos["x"].state == DOWNLOADING and infos["x"].num_bytes_to_download == 102
        assert infos["x"].source == source
        with pytest.raises(AdapterNotFound):
            await ask(client, "x")
        await client.load_adapter("y", host.write("y", "b"))
        assert await ask(client, "y") == [ord("b")] * 2
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        async with asyncio.timeout(10):
            while len(await client.list_adapters()) > 1:
                await asyncio.sleep(0.01)
        assert stored(host) == []
        assert (await client.load_adapter("x", source)).adapter.num_bytes_to_download == 0


async def test_an_unload_ends_a_download(host, web):
    source = web.put("x", adapter("a" * 100))
    web.bent[("GET", f"/x/{WEIGHTS}")] = [web.hang(40)]
    async with host.serving(adapter_sources=[f"{web.url}/"]) as client:
        loading = asyncio.create_task(client.load_adapter("x", source))
        await until(lambda: ("GET", f"/x/{WEIGHTS}") in [seen[:2] for seen in web.seen])
        assert (await client.unload_adapter("x")).state == DOWNLOADING
        with pytest.raises(AdapterNotFound, match="unloaded while it was being fetched"):
            await loading
        assert list(await client.list_adapters()) == [] and stored(host) == []


async def test_what_cannot_be_loaded_is_shown_and_not_stored(host, hub):
    hub.push("acme/bad", adapter("!AdapterRefused"))
    async with host.serving(**ACME) as client:
        with pytest.raises(AdapterRefused):
            await client.load_adapter("bad", "hf:acme/bad")
        with pytest.raises(AdapterSourceRefused, match="not on the hub"):
            await client.load_adapter("none", "hf:acme/none")
        infos = await client.list_adapters()
        assert [(info.name, info.state) for info in infos] == [("bad", FAILED), ("none", FAILED)]
        assert stored(host) == []


async def test_an_adapter_named_at_the_start_needs_no_allowance_and_no_hub_later(host, hub):
    hub.push("acme/x", adapter("a"))
    async with host.serving(adapter={"x": "hf:acme/x"}) as client:
        assert await ask(client, "x") == [ord("a")] * 2
    hub.bent["/api/models/acme/x"] = [status(503) for _ in range(3)]
    async with host.serving(adapter={"x": "hf:acme/x"}) as client:
        assert await ask(client, "x") == [ord("a")] * 2
    hub.push("acme/x", adapter("b"))
    async with host.serving(adapter={"x": "hf:acme/x"}) as client:
        assert await ask(client, "x") == [ord("b")] * 2
    hub.bent["/api/models/acme/y"] = [status(503) for _ in range(3)]
    with pytest.raises(Unavailable, match="3 attempts"):
        async with host.serving(adapter={"y": "hf:acme/y"}):
            pass


# On demand.


async def test_the_first_requests_load_an_adapter_once(host, hub):
    hub.push("acme/team-x", adapter("a"))
    flags = {"adapter_on_demand": ["team-*=hf:acme/{name}"]}
    async with host.serving(**flags) as client:
        answers = await asyncio.gather(*(ask(client, "team-x") for _ in range(8)))
        assert answers == [[ord("a")] * 2] * 8
        assert sum("/resolve/" in path for _, path, _ in hub.seen) == 2, "two files, once"
        with pytest.raises(AdapterNotFound, match="'other' is not loaded"):
            await ask(client, "other")
        assert [info.name for info in await client.list_adapters()] == ["team-x"]
    hub.seen.clear()
    async with host.serving(**flags) as client:
        assert list(await client.list_adapters()) == []
        assert await ask(client, "team-x") == [ord("a")] * 2


async def test_names_without_an_adapter_cost_little(host, hub):
    hub.push("acme/bad", adapter("!BaseMismatch"))
    async with host.serving(adapter_on_demand=["*=hf:acme/{name}"]) as client:
        for _ in range(5):
            with pytest.raises(AdapterNotFound, match="cannot be on demand.*not on the hub") as no:
                await ask(client, "none")
            with pytest.raises(AdapterRefused):
                await ask(client, "bad")
        assert no.value.field == "adapters[0].name"
        asked = [path for _, path, _ in hub.seen if path.startswith("/api/models/acme/none")]
        assert len(asked) == 1
        assert "none" not in [info.name for info in await client.list_adapters()]
        hub.push("acme/none", adapter("n"))
        with pytest.raises(AdapterSourceRefused, match="--adapter-sources"):
            await client.load_adapter("none", "hf:acme/none")  # clients may name no source
        assert await ask(client, "none") == [ord("n")] * 2, "a load by hand ends the waiting"


async def test_a_revision_is_the_operator_s_to_choose(host, hub):
    hub.push("acme/x", adapter("p"), branch="refs/pr/1")
    hub.push("acme/x", adapter("v"), branch="v2")
    async with host.serving(adapter_on_demand=["*=hf:acme/{name}"]) as client:
        for name in ("x@refs/pr/1", "x@v2", "x/sub"):
            with pytest.raises((AdapterNotFound, InvalidRequest)):
                await ask(client, name)
        assert not hub.seen
    async with host.serving(adapter_on_demand=["*@v?=hf:acme/{name}"]) as client:
        assert await ask(client, "x@v2") == [ord("v")] * 2


async def test_folders_are_loaded_on_demand_too(host):
    host.write("here", "h")
    async with host.serving(adapter_on_demand=["*={name}"]) as client:
        assert await ask(client, "here") == [ord("h")] * 2
        with pytest.raises(AdapterNotFound, match="does not exist"):
            await ask(client, "gone")


async def test_the_audit_log_says_whose_request_began_a_load(host, web):
    web.put("acme-x", adapter("a"))
    host.write("acme-bad", "!BaseMismatch")
    flags = {
        "adapter_on_demand": ["acme-bad={name}", f"*={web.url}/{{name}}"],
        "keys": write_keys(host.folder),
    }
    options = {"token_ids": [5], "max_tokens": 1}
    with structlog.testing.capture_logs() as logs:
        async with (
            host.serving(**flags) as anyone,
            AsyncClient(anyone.target, api_key=ACME_KEY) as acme,
        ):
            for _ in range(2):
                await acme.generate(adapter="acme-x", **options).text()
                for name in ("acme-bad", "acme-none", "rival-x"):
                    with pytest.raises((AdapterRefused, AdapterNotFound)):
                        await acme.generate(adapter=name, **options).text()
    lines = [log for log in logs if log["event"] == "audit" and log["action"] == "load on demand"]
    assert [(log["adapter"], log["source"], log["outcome"]) for log in lines] == [
        ("acme-x", f"{web.url}/acme-x", "done"),
        ("acme-bad", "acme-bad", "BaseMismatch"),
        ("acme-none", f"{web.url}/acme-none", "AdapterSourceRefused"),
    ]
    assert {(log["key"], log["tenant"]) for log in lines} == {("acme", "acme")}
    assert all(log["peer"].startswith("ipv4:127.0.0.1:") for log in lines)


async def test_a_deadline_ends_the_waiting_and_not_the_load(host, web):
    web.put("x", adapter("a"))
    web.bent[("GET", f"/x/{WEIGHTS}")] = [web.hang()]
    flags = {"adapter_on_demand": [f"*={web.url}/{{name}}"], "adapter_fetch_idle_s": 20}
    async with host.serving(**flags) as client:
        stream = client.generate(token_ids=[5], adapter="x", max_tokens=1, timeout_s=0.5)
        with pytest.raises((TimeoutError, Unavailable)):
            await stream.text()
        web.held.set()
        assert await ask(client, "x") == [ord("a")] * 2


async def test_adapters_on_demand_make_room_for_each_other_and_for_operators(host):
    for name in "abcde":
        host.write(name, name)
    engine = LocalEngine()
    engine.max_loaded = 3
    async with host.serving(engine, adapter_on_demand=["*={name}"]) as client:
        await client.load_adapter("a", "a")
        for name in "bc":
            await ask(client, name)
        engine.gate.clear()
        held = asyncio.create_task(ask(client, "b"))
        await until(lambda: bool(engine.running))
        loading = asyncio.create_task(ask(client, "d"))  # c goes: b is in use, a an operator's
        await until(lambda: len(engine.running) == 2)
        names = {info.name for info in await client.list_adapters()}
        assert names == {"a", "b", "d"}
        engine.gate.set()
        assert await held == [ord("b")] * 2 and await loading == [ord("d")] * 2
        await client.load_adapter("e", "e")
        names = {info.name for info in await client.list_adapters()}
        assert names == {"a", "d", "e"}, "b was used longest ago"
        assert await ask(client, "c") == [ord("c")] * 2
        assert {info.name for info in await client.list_adapters()} == {"a", "c", "e"}


# Pins.


async def test_pins_are_kept_over_a_restart_and_end_with_their_content(host):
    engine = LocalEngine()
    async with host.serving(engine) as client:
        info = (await client.load_adapter("x", host.write("x", "a"), pin=True)).adapter
        assert info.is_pinned and info.is_resident and engine.pinned == {info.digest}
        await client.load_adapter("twin", "x", pin=True)
        assert not (await client.load_adapter("twin", "x")).adapter.is_pinned
        assert engine.pinned == {info.digest}, "x still pins it"
        await client.load_adapter("y", host.write("y", "b"), pin=True)
        with pytest.raises(AdapterTooLarge, match="no place") as refused:
            await client.load_adapter("z", host.write("z", "c"), pin=True)
        assert refused.value.field == "pin"
        assert (await client.get_adapter("z")).state == FAILED
        assert set(engine.references) == {
            d.digest for d in await client.list_adapters() if d.digest
        }
        await client.load_adapter("y", host.write("y2", "d"), replace=True)
        assert engine.pinned == {info.digest}
    engine = LocalEngine()
    async with host.serving(engine) as client:
        pinned = {info.name for info in await client.list_adapters() if info.is_pinned}
        assert pinned == {"x"} and engine.pinned == {info.digest}
        await client.load_adapter("x", host.write("x2", "e"), replace=True, pin=True)
        assert not (await client.rollback_adapter("x")).is_pinned and not engine.pinned
        await client.load_adapter("x", "x", pin=True)
        await client.unload_adapter("twin")
        await client.unload_adapter("x")
        assert not engine.pinned


def test_names_of_the_first_version_are_taken_over(tmp_path):
    path = tmp_path / f"names-{'f' * 16}.sqlite3"
    database = sqlite3.connect(path)
    database.execute(
        "CREATE TABLE names (name TEXT PRIMARY KEY, digest TEXT NOT NULL, text_sha256 TEXT NOT "
        "NULL, source TEXT NOT NULL, former_digest TEXT, former_text_sha256 TEXT, "
        "former_source TEXT)"
    )
    database.execute("INSERT INTO names VALUES ('x', 'd', '', 's', NULL, NULL, NULL)")
    database.execute("PRAGMA user_version = 1")
    database.commit()
    database.close()
    for _ in range(2):
        store = NameStore(tmp_path, "f" * 64)
        (kept,) = store.all()
        assert (kept.name, kept.content.source, kept.former, kept.is_pinned) == (
            "x",
            "s",
            None,
            False,
        )
        store.close()


# Settings.


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("adapter_sources", "acme/"),
        ("adapter_sources", "hf:acme/,http://host/"),
        ("adapter_source_networks", "10.0.0.1/8"),
        ("adapter_on_demand", ["*=hf:acme/x"]),
        ("adapter_on_demand", ["hf:acme/{name}"]),
        ("adapter_on_demand", ["*=s3://{name}"]),
        ("adapter_on_demand", ["*=https://u:p@host/{name}"]),
        ("adapter", ["x=hf:acme"]),
        ("adapter", ["x=/does/not/exist"]),
        ("adapter_fetch_timeout_s", 0),
    ],
)
def test_settings_that_cannot_be_used_are_named(setting, value):
    with pytest.raises(ConfigError, match=setting) as caught:
        load_config(flags={setting: value})
    assert caught.value.field.startswith(setting)


def test_settings_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "LORAMUX_ADAPTER", f"a={tmp_path}:b=hf:acme/x@v:c=https://h:1/c:o/d@1={tmp_path}"
    )
    monkeypatch.setenv("LORAMUX_ADAPTER_SOURCES", "hf:acme/,s3://bucket/")
    monkeypatch.setenv("LORAMUX_ADAPTER_ON_DEMAND", "t-*=hf:acme/{name},*=/srv/{name}")
    config = load_config()
    named = {"a": tmp_path, "b": "hf:acme/x@v", "c": "https://h:1/c", "o/d@1": tmp_path}
    assert config.adapter == named
    assert config.adapter_sources == ("hf:acme/", "s3://bucket/")
    assert list(config.adapter_on_demand.items()) == [
        ("t-*", "hf:acme/{name}"),
        ("*", "/srv/{name}"),
    ]
