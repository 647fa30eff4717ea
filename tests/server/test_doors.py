"""Whole servers on real sockets: keys, TLS and certificates of clients at both ports."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median

import httpx
import openai
import pytest
import structlog
from typer.testing import CliRunner

from lora_runtime.errors import ConfigError, InvalidRequest, Unauthenticated, Unavailable
from loramux.server import app, doors
from loramux.server.app import Ports
from loramux.server.cli import app as cli
from loramux.server.client import AsyncClient, tls_credentials
from loramux.server.config import load_config
from loramux.server.doors import open_doors
from tests.server.access.certificates import Authority
from tests.server.access.keyring import (
    ACME,
    EXPIRED,
    OPERATOR,
    RIVAL_OPERATOR,
    TEXT,
    WRONG,
    write_keys,
)
from tests.server.test_app import LocalEngine
from tests.server.world import until
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(autouse=True)
def quick_reload(monkeypatch):
    monkeypatch.setattr(doors, "RELOAD_PERIOD_S", 0.02)


@dataclass
class Served:
    """A server, by its ports."""

    engine: LocalEngine
    ports: Ports

    def grpc(self, api_key=None, tls=None) -> AsyncClient:
        return AsyncClient(f"127.0.0.1:{self.ports.grpc}", api_key=api_key, credentials=tls)

    async def get(self, path, key=None, **how) -> httpx.Response:
        return await self.ask("GET", path, key, **how)

    async def ask(self, method, path, key, *, json=None, verify=None, cert=None) -> httpx.Response:
        scheme = "https" if verify else "http"
        headers = {"authorization": f"Bearer {key}"} if key else {}
        if cert is not None:
            verify.load_cert_chain(cert.cert, cert.key)
        async with httpx.AsyncClient(verify=verify or False) as client:
            url = f"{scheme}://127.0.0.1:{self.ports.http}{path}"
            return await client.request(method, url, headers=headers, json=json)


@asynccontextmanager
async def serving(folder, **flags):
    write_tokenizer(folder / "base")
    engine = LocalEngine(folder / "base")
    listen = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}
    config = load_config(flags={**listen, "adapter_store": str(folder / "store"), **flags})
    ports: asyncio.Future[Ports] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(app.serve(config, start=engine.start, on_ready=ports.set_result))
    await asyncio.wait([task, ports], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        yield Served(engine, ports.result())
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.ca)


def every_route(served_app) -> set[tuple[str, str]]:
    """(method, path) of all routes of an application, with names for what is named in a path."""
    found = set()
    for route in served_app.routes:
        path = re.sub(r"\{(\w+)(:\w+)?\}", r"\1", route.path)
        found |= {(method, path) for method in route.methods or ("GET", "POST")}
    return found


@pytest.fixture
def built(monkeypatch):
    """The applications that servers build in a test."""
    apps, build = [], app.build_http_app
    monkeypatch.setattr(
        app, "build_http_app", lambda **parts: apps.append(build(**parts)) or apps[-1]
    )
    return apps


OPEN = {"/health", "/healthz", "/readyz", "/"}
STRANGE_PATHS = (
    "/nothing", "/healthz/", "//healthz", "/healthz/../metrics", "/page/status.json", "/page/x",
    "/page/../metrics", "/page/..%2fmetrics", "/v1", "/METRICS", "/metrics?x=.css", "/.css",
    "/page/x.css/../../metrics", "/healthz%0a", "/healthz%00", "/api", "/docs",
)  # fmt: skip


async def test_every_http_route_but_probes_and_the_page_is_refused_without_a_key(tmp_path, built):
    async with serving(tmp_path, keys=str(write_keys(tmp_path))) as served:
        routes = every_route(built[0])
        assert len(routes) >= 18 and {path for _, path in routes} >= {"/metrics", "/v1/models"}
        strange = {(method, path) for path in STRANGE_PATHS for method in ("GET", "POST")}
        for method, path in sorted(routes | strange):
            for key in (None, WRONG, EXPIRED):
                response = await served.ask(method, path, key)
                if path in OPEN or path == "/page/file.css":
                    assert response.status_code in (200, 404)
                    continue
                assert response.status_code == 401, (method, path)
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert response.json()["error"]["code"] == "invalid_api_key"
        assert (await served.ask("GET", "/page/page.js", None)).status_code == 200
        assert served.engine.seen == []


async def test_what_changes_something_is_refused_to_users_over_http_too(tmp_path, built):
    async with serving(tmp_path, keys=str(write_keys(tmp_path))) as served:
        adapter = {"lora_name": "acme-x", "lora_path": "x"}
        refused = {
            "/v1/load_lora_adapter": adapter,
            "/v1/unload_lora_adapter": {"lora_name": "acme-x"},
            "/api/adapters/acme-x/rollback": {},
        }
        posts = {path for method, path in every_route(built[0]) if method == "POST"}
        assert posts - {p.replace("acme-x", "name") for p in refused} == {
            "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings",
            "/tokenize", "/detokenize", "/openapi.json",
        }  # fmt: skip
        for path, body in refused.items():
            response = await served.ask("POST", path, ACME, json=body)
            assert response.status_code == 403, path
            assert response.json()["error"]["code"] == "permission_denied"
        for key in (ACME, RIVAL_OPERATOR):
            assert (await served.get("/metrics", key)).status_code == 403
        assert (await served.get("/metrics", OPERATOR)).status_code == 200
        response = await served.ask("POST", "/v1/load_lora_adapter", RIVAL_OPERATOR, json=adapter)
        assert response.status_code == 403 and "rival-*" in response.json()["error"]["message"]


@asynccontextmanager
async def serving_tenants(folder):
    """A server with acme-a and rival-b."""
    root = folder / "adapters"
    for name in ("one", "two"):
        (root / name).mkdir(parents=True)
        (root / name / "adapter_config.json").write_text("{}")
        (root / name / "adapter_model.safetensors").write_text(name)
    flags = {"keys": str(write_keys(folder)), "adapter_roots": [str(root)]}
    async with serving(folder, **flags) as served:
        for name, path in (("acme-a", "one"), ("rival-b", "two")):
            body = {"lora_name": name, "lora_path": path}
            loaded = await served.ask("POST", "/v1/load_lora_adapter", OPERATOR, json=body)
            assert loaded.status_code == 200, loaded.text
        yield served


async def test_unknown_and_forbidden_take_one_time_over_http(tmp_path):
    """As over gRPC: the median of what one takes more than the other right after it."""
    async with serving_tenants(tmp_path) as served:
        url = f"http://127.0.0.1:{served.ports.http}/v1/completions"
        headers = {"authorization": f"Bearer {ACME}"}
        async with httpx.AsyncClient(headers=headers, verify=False) as client:

            async def seconds(name: str) -> float:
                begun = time.perf_counter()
                response = await client.post(url, json={"model": name, "prompt": "x"})
                assert response.status_code == 404
                return time.perf_counter() - begun

            unknown, excess = [], []
            for turn in range(300):
                first, second = ("rival-b", "rival-c") if turn % 2 else ("rival-c", "rival-b")
                times = {first: await seconds(first), second: await seconds(second)}
                unknown.append(times["rival-c"])
                excess.append(times["rival-b"] - times["rival-c"])
    more, usual = median(excess), median(unknown)
    print(f"HTTP: unknown {1e6 * usual:.0f} us, forbidden {1e6 * more:+.0f} us")
    assert abs(more) < 0.1 * usual


async def test_tenants_are_apart_over_http_too(tmp_path):
    async with serving_tenants(tmp_path) as served:
        models = (await served.get("/v1/models", ACME)).json()["data"]
        assert [model["id"] for model in models][1:] == ["acme-a"]
        page = (await served.get("/api/status", ACME)).json()
        assert "acme-a" in str(page) and "rival" not in str(page)

        def complete(model):
            body = {"model": model, "prompt": "hi", "max_tokens": 1}
            return served.ask("POST", "/v1/completions", ACME, json=body)

        assert (await complete("acme-a")).status_code == 200
        assert served.engine.seen[-1].client == "tenant:acme"
        asks = [
            complete,
            lambda name: served.get(f"/v1/models/{name}", ACME),
            lambda name: served.get(f"/api/adapters/{name}", ACME),
            lambda name: served.ask("POST", "/tokenize", ACME, json={"model": name, "prompt": "x"}),
        ]
        for ask in asks:
            forbidden, unknown = await ask("rival-b"), await ask("rival-c")
            assert forbidden.status_code == unknown.status_code == 404
            assert forbidden.text.replace("rival-b", "rival-c") == unknown.text
            assert len(forbidden.headers) == len(unknown.headers)


async def test_openais_client_sends_the_key_and_knows_the_refusals(tmp_path):
    async with serving(tmp_path, keys=str(write_keys(tmp_path))) as served:

        def client(key: str) -> openai.AsyncOpenAI:
            url = f"http://127.0.0.1:{served.ports.http}/v1"
            return openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0)

        async with client(ACME) as acme, client(WRONG) as stranger:
            base = (await acme.models.list()).data[0].id
            answer = await acme.completions.create(model=base, prompt="hi", max_tokens=1)
            assert answer.usage.completion_tokens == 1
            with pytest.raises(openai.AuthenticationError) as caught:
                await stranger.models.list()
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.NotFoundError):
                await acme.completions.create(model="rival-b", prompt="hi")


async def test_keys_change_under_a_running_server_and_streams_go_on(tmp_path):
    file = write_keys(tmp_path)
    async with serving(tmp_path, keys=str(file)) as served:
        async with served.grpc(ACME) as acme, served.grpc(OPERATOR) as operator:
            served.engine.gate.clear()
            stream = asyncio.create_task(acme.generate("ab", max_tokens=3).text())
            await until(lambda: len(served.engine.running) == 1)
            file.write_text("\n".join(line for line in TEXT.split("\n") if "id: acme," not in line))

            async def is_refused() -> bool:
                try:
                    await acme.tokenize("x")
                except Unauthenticated:
                    return True
                return False

            await _eventually(is_refused)
            await operator.tokenize("x")
            assert (await served.get("/v1/models", ACME)).status_code == 401
            served.engine.gate.set()
            assert await stream == "aba"


async def test_both_ports_speak_tls_and_take_a_new_certificate_while_streams_run(tmp_path):
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    pair, files = old.issue("server"), tmp_path / "files"
    files.mkdir()
    cert, key = files / "tls.crt", files / "tls.key"
    cert.write_bytes(pair.cert.read_bytes())
    key.write_bytes(pair.key.read_bytes())
    flags = {"tls_cert": str(cert), "tls_key": str(key), "keys": str(write_keys(tmp_path))}
    async with serving(tmp_path, **flags) as served:
        async with served.grpc(ACME, tls_credentials(old.ca)) as acme, served.grpc(ACME) as plain:
            assert await acme.generate("ab", max_tokens=2).text() == "ab"
            with pytest.raises(Unavailable, match="if it has TLS"):
                await plain.tokenize("x")
            with pytest.raises(httpx.HTTPError):
                await served.get("/healthz")
            assert (await served.get("/healthz", verify=trusting(old))).status_code == 200
            async with served.grpc(ACME, tls_credentials(new.ca)) as stranger:
                with pytest.raises(Unavailable, match="with its roots"):
                    await stranger.tokenize("x")

            served.engine.gate.clear()
            stream = asyncio.create_task(acme.generate("ab", max_tokens=3).text())
            await until(lambda: len(served.engine.running) == 1)
            cert.write_bytes(b"nonsense")  # half of a rotation
            await asyncio.sleep(0.1)
            assert (await served.get("/healthz", verify=trusting(old))).status_code == 200
            pair = new.issue("server")
            cert.write_bytes(pair.cert.read_bytes())
            key.write_bytes(pair.key.read_bytes())

            async def is_new() -> bool:
                try:
                    return (await served.get("/healthz", verify=trusting(new))).is_success
                except httpx.ConnectError:
                    return False

            await _eventually(is_new)
            with pytest.raises(httpx.ConnectError):
                await served.get("/healthz", verify=trusting(old))
            async with served.grpc(ACME, tls_credentials(new.ca)) as after:
                assert await after.tokenize("ab")
            served.engine.gate.set()
            assert await stream == "aba", "what runs goes on"


async def test_commands_send_their_key_and_speak_tls(tmp_path):
    root = Authority(tmp_path / "root")
    server, own = root.issue("server"), root.issue("laptop")
    flags = {
        "tls_cert": str(server.cert),
        "tls_key": str(server.key),
        "tls_client_ca": str(root.ca),
    }
    async with serving(tmp_path, keys=str(write_keys(tmp_path)), **flags) as served:

        async def run(*arguments: str, **variables: str):
            address = f"127.0.0.1:{served.ports.grpc}"
            certificate = ["--tls-cert", str(own.cert), "--tls-key", str(own.key)]
            line = [*arguments, "--address", address, *certificate]
            env = {"LORAMUX_TLS_CA": str(root.ca), **variables}
            return await asyncio.to_thread(CliRunner().invoke, cli, line, env=env)

        prompt = ("generate", "--text", "hi", "--max-tokens", "1")
        assert (await run(*prompt, LORAMUX_API_KEY=ACME)).exit_code == 0
        assert (await run("adapters", "list", "--api-key", ACME)).exit_code == 0
        refused = await run("adapters", "unload", "x", LORAMUX_API_KEY=ACME)
        assert refused.exit_code == 1 and "role user" in refused.stderr
        refused = await run(*prompt, LORAMUX_API_KEY=WRONG)
        assert refused.exit_code == 1 and "not one that this server knows" in refused.stderr
        refused = await run(*prompt)
        assert refused.exit_code == 1 and "no entry" in refused.stderr


async def test_clients_must_have_a_certificate_and_it_may_be_their_key(tmp_path):
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    server = ours.issue("server")
    box, plain = ours.issue("box", sans=("box.acme",)), ours.issue("plain")
    late, foreign = ours.issue("late", days=-1), theirs.issue("box")
    entry = "  - {id: box, tenant: acme, role: user, adapters: ['acme-*'], certificate: box.acme}\n"
    flags = {
        "tls_cert": str(server.cert),
        "tls_key": str(server.key),
        "tls_client_ca": str(ours.ca),
        "keys": str(write_keys(tmp_path, TEXT + entry)),
    }
    async with serving(tmp_path, **flags) as served:

        def grpc(pair=None, api_key=None):
            own = (pair.cert, pair.key) if pair else ()
            return served.grpc(api_key, tls_credentials(ours.ca, *own))

        async with grpc(box) as client:
            await client.generate("x", max_tokens=1).text()
            assert served.engine.seen[-1].client == "tenant:acme"
        async with grpc(plain) as client:
            with pytest.raises(Unauthenticated, match="no entry"):
                await client.tokenize("x")
        async with grpc(plain, OPERATOR) as client:
            assert await client.list_adapters() == []
        for refused in (None, foreign, late):
            async with grpc(refused, OPERATOR) as client:
                with pytest.raises(Unavailable):
                    await client.tokenize("x")

        assert (await served.get("/healthz", verify=trusting(ours))).status_code == 200
        asked = [
            (None, OPERATOR, 401),
            (plain, None, 401),
            (plain, OPERATOR, 200),
            (box, None, 403),
        ]
        for pair, key, status in asked:
            found = await served.get("/metrics", key, verify=trusting(ours), cert=pair)
            assert found.status_code == status, (pair, key)
        for pair in (foreign, late):
            with pytest.raises(httpx.HTTPError):
                await served.get("/healthz", verify=trusting(ours), cert=pair)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.7:50051"])
@pytest.mark.parametrize("setting", ["grpc_address", "http_address"])
def test_without_keys_nobody_else_reaches_the_server_unless_it_is_said(tmp_path, address, setting):
    with pytest.raises(ConfigError, match=r"--keys.*--insecure") as caught:
        open_doors(load_config(flags={setting: address}))
    assert caught.value.field == setting and address in caught.value.message
    with structlog.testing.capture_logs() as logs:
        assert open_doors(load_config(flags={setting: address, "insecure": True})).tls is None
        open_doors(load_config(flags={setting: address, "keys": str(write_keys(tmp_path))}))
    assert [log["address"] for log in logs] == [address] * 2
    assert "INSECURE" in logs[0]["event"] and "unencrypted" in logs[1]["event"]


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.5.6.7:0", "[::1]:0", "localhost:0"])
def test_this_machines_own_addresses_need_no_keys(address):
    with structlog.testing.capture_logs() as logs:
        open_doors(load_config(flags={"grpc_address": address, "http_address": address}))
    assert logs == []


async def test_what_cannot_be_used_is_named_before_the_base_is_loaded(tmp_path):
    root = Authority(tmp_path / "root")
    one, other = root.issue("one"), root.issue("other")
    good = {"tls_cert": str(one.cert), "tls_key": str(one.key)}
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nonsense")
    for flags, field, said in [
        ({"keys": str(tmp_path / "none")}, "keys", "No such file"),
        ({"keys": str(nonsense)}, "keys", "must hold"),
        ({"tls_cert": str(one.cert)}, "tls_key", "both"),
        ({"tls_key": str(one.key)}, "tls_cert", "both"),
        ({"tls_client_ca": str(root.ca)}, "tls_cert", "both"),
        ({**good, "tls_key": str(other.key)}, "tls_cert", "no certificate and its key"),
        ({**good, "tls_cert": str(nonsense)}, "tls_cert", "no certificate and its key"),
        ({**good, "tls_cert": str(tmp_path / "none")}, "tls_cert", "No such file"),
        ({**good, "tls_client_ca": str(nonsense)}, "tls_client_ca", "holds no certificates"),
        ({"grpc_address": "0.0.0.0:0"}, "grpc_address", "--insecure"),
    ]:
        with pytest.raises(ConfigError, match=said) as caught:
            async with serving(tmp_path, **flags):
                raise AssertionError("it serves")
        assert caught.value.field == field


def test_a_clients_key_and_files_are_looked_at_before_they_are_used(tmp_path):
    for key in ("", "two words", "line\nbreak", "schlüssel"):
        with pytest.raises(InvalidRequest) as caught:
            AsyncClient("127.0.0.1:1", api_key=key)
        assert caught.value.field == "api_key" and (not key or key not in caught.value.message)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        tls_credentials(tmp_path / "none.pem")
    with pytest.raises(InvalidRequest, match="takes its key"):
        tls_credentials(cert=tmp_path / "none.pem")


async def _eventually(condition) -> None:
    for _ in range(200):
        if await condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came")
