from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest
from starlette.applications import Starlette

from lora_runtime.errors import AdapterNotFound
from loramux.server.access.caller import ANONYMOUS, Role
from loramux.server.page.history import COLUMNS, History
from loramux.server.page.routes import read_files, routes
from loramux.server.service import Service
from tests.server.test_app import LocalEngine, running
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture
def engine(tmp_path):
    write_tokenizer(tmp_path)
    return LocalEngine(tmp_path)


@pytest.fixture
def root(tmp_path):
    """An adapter root with two adapters of different contents, `old` and `new`."""
    for name in ("old", "new"):
        folder = tmp_path / "root" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text('{"variant": "dora"}')
        (folder / "adapter_model.safetensors").write_text(name)
    return tmp_path / "root"


class Loaded:
    """A server's condition as the page sees it, without the server."""

    def __init__(self, service: Service | None = None, history: History | None = None) -> None:
        self.service, self.history = service, history
        self.alive = self.ready = True

    def is_alive(self) -> bool:
        return self.alive

    def is_ready(self) -> bool:
        return self.ready


async def ask(condition, path: str, caller=ANONYMOUS, method: str = "GET", **options):
    """Ask the routes as a caller that some gate let in."""
    app = Starlette(routes=routes(condition))

    async def let_in(scope, receive, send):
        scope.setdefault("state", {})["caller"] = caller
        await app(scope, receive, send)

    transport = httpx.ASGITransport(let_in)
    async with httpx.AsyncClient(transport=transport, base_url="http://loramux") as client:
        return await client.request(method, path, **options)


@pytest.mark.parametrize("name", ["", *(f"page/{name}" for name in sorted(read_files()))])
async def test_files_come_with_strict_headers_and_once(name):
    response = await ask(Loaded(), f"/{name}")
    assert response.status_code == 200 and response.content
    policy = dict(
        part.split(" ", 1) for part in response.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'" and "unsafe" not in str(policy)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert response.headers["content-type"].startswith(
        kind.get(name.rpartition(".")[2], "text/html")
    )
    etag = response.headers["etag"]
    again = await ask(Loaded(), f"/{name}", headers={"if-none-match": f'"old", {etag}'})
    assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == etag
    changed = await ask(Loaded(), f"/{name}", headers={"if-none-match": '"old"'})
    assert changed.content == response.content


@pytest.mark.parametrize(
    "name", ["routes.py", "..%2froutes.py", "%2e%2e/routes.py", "", "INDEX.HTML"]
)
async def test_nothing_but_the_files_is_served(name):
    assert (await ask(Loaded(), f"/page/{name}")).status_code == 404


async def test_while_the_base_is_loaded_the_page_says_so():
    response = await ask(Loaded(), "/api/status")
    assert response.json() == {"state": "loading"}
    assert response.headers["cache-control"] == "no-store"
    refused = await ask(Loaded(), "/api/adapters/a")
    assert refused.status_code == 503 and "being loaded" in refused.json()["error"]["message"]


@pytest.mark.parametrize("since", ["-1", "x", "1.5", "9" * 16, "", "٣"])
async def test_a_count_that_is_none_is_refused(since):
    response = await ask(Loaded(), "/api/status", params={"since": since})
    assert response.status_code == 400 and response.json()["error"]["param"] == "since"


async def test_the_status_follows_a_server(engine, root):
    """Everything over real sockets: adapters, traffic, samples, details and a rollback."""
    async with running(engine, adapter_roots=[root]) as server:
        status = (await server.http.get("/api/status")).json()
        assert status["state"] == "ready" and status["server"]["base"] == "tiny"
        assert status["adapters"] == [] and status["load"]["base"]["num_requests"] == 0
        await server.client.load_adapter("a", "old")
        await server.client.generate(token_ids=[70], max_tokens=5, adapter="a").text()
        await server.client.generate(token_ids=[70], max_tokens=7).text()
        async with asyncio.timeout(5):
            while not (load := await loaded(server))["num_samples_taken"]:
                await asyncio.sleep(0.05)
        status = (await server.http.get("/api/status")).json()
        (row,) = status["adapters"]
        expected = {"name": "a", "source": "old", "state": "loaded", "variant": "dora",
                    "ranks": [4, 8], "tier": "device", "num_requests": 1, "num_output_tokens": 5,
                    "num_in_flight": 0, "has_former": False, "is_pinned": False}  # fmt: skip
        assert row == {**row, **expected}
        assert load["base"] == {"num_requests": 1, "num_output_tokens": 7}
        assert load["samples"].keys() == set(COLUMNS)
        assert load["samples"]["output_tokens_per_s"][0] == pytest.approx(12, rel=0.3)
        assert load["samples"]["ttft_p50_s"][0] > 0
        await rolls_back(server)


async def test_pins_and_downloads_are_shown(serve):
    async with serve() as world:
        condition = Loaded(world.service, History(world.engine))
        source = world.write_adapter("kept", "content")
        await world.client.load_adapter("kept", source, pin=True)
        registry = world.service.adapters._registry
        with registry.downloading("coming", "hf:acme/coming") as note:
            for done, total in ((0, 0), (42, 102)):
                note(done, total)
                rows = (await ask(condition, "/api/status")).json()["adapters"]
                rows = {row["name"]: row for row in rows}
                coming = rows["coming"]
                assert (coming["state"], coming["tier"]) == ("downloading", "")
                shown = coming["num_downloaded_bytes"], coming["num_bytes_to_download"]
                assert shown == (done, total)
        assert rows["kept"]["is_pinned"] and rows["kept"]["tier"] == "device"
        assert not coming["is_pinned"] and rows["kept"]["num_bytes_to_download"] == 0


async def loaded(server) -> dict:
    return (await server.http.get("/api/status", params={"since": 0})).json()["load"]


async def rolls_back(server) -> None:
    path, json = "/api/adapters/a/rollback", {"content-type": "application/json; charset=utf-8"}
    refused = await server.http.post(path, headers=json)
    assert refused.status_code == 404 and "former" in refused.json()["error"]["message"]
    first = (await server.http.get("/api/adapters/a")).json()
    await server.client.load_adapter("a", "new", replace=True)
    second = (await server.http.get("/api/adapters/a")).json()
    assert second["former_digest"] == first["digest"] and second["source"] == "new"
    form = await server.http.post(path, headers={"content-type": "text/plain"})
    assert form.status_code == 415
    back = (await server.http.post(path, headers=json)).json()
    assert back["digest"] == first["digest"] and back["former_digest"] == second["digest"]
    assert (await server.client.get_adapter("a")).digest == first["digest"]


async def test_a_caller_sees_its_own_adapters_and_not_the_load_of_others(serve):
    async with serve() as world:
        condition = Loaded(world.service, History(world.engine))
        for name in ("acme-a", "other"):
            await world.load(name, "content")
        user = replace(ANONYMOUS, key_id="k", role=Role.USER, adapters=("acme-*",))
        status = (await ask(condition, "/api/status", user)).json()
        assert [row["name"] for row in status["adapters"]] == ["acme-a"] and status["load"] is None
        hidden = await ask(condition, "/api/adapters/other", user)
        unknown = await ask(condition, "/api/adapters/nobody", user)
        assert hidden.status_code == unknown.status_code == 404
        assert hidden.text.replace("other", "nobody") == unknown.text
        await world.load("acme-a", "other content", replace=True)
        json = {"content-type": "application/json"}
        path = "/api/adapters/acme-a/rollback"
        denied = await ask(condition, path, user, "POST", headers=json)
        assert denied.status_code == 403 and world.service.adapters.get(user, "acme-a").former
        operator = replace(user, role=Role.OPERATOR)
        assert (await ask(condition, path, operator, "POST", headers=json)).status_code == 200
        everything = (await ask(condition, "/api/status")).json()
        assert len(everything["adapters"]) == 2 and everything["load"] is not None
        condition.ready = False
        assert (await ask(condition, "/api/status")).json()["state"] == "not ready"
        condition.alive = False
        assert (await ask(condition, "/api/status")).json()["state"] == "dead"
        await world.client.unload_adapter("other")
        with pytest.raises(AdapterNotFound):
            await world.client.get_adapter("other")
