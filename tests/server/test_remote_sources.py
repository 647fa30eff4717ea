"""Adapters fetched from elsewhere: whole and as they are there, or a named error and no trace."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import subprocess
import sys
import time
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.adapters.files.file_names import content_digest
from lora_runtime.errors import AdapterSourceRefused, Overloaded, Unavailable
from loramux.server.adapters.sources import hub as hub_module
from loramux.server.adapters.sources.https import WebServers
from loramux.server.adapters.sources.location import (
    check_allowed,
    check_prefix,
    parse,
    pinned,
    stored_digest,
)
from loramux.server.adapters.sources.remote import FetchLimits, RemoteSources
from loramux.server.adapters.uploads import AdapterStore
from tests.server.places import (
    CONFIG,
    WEIGHTS,
    GoogleStorage,
    Hub,
    adapter,
    breaks_off,
    lies,
    s3,
    status,
)
from tests.server.world import until

REPO = Path(__file__).parents[2]
MAX_BYTES = 1 << 20
CALM = FetchLimits(idle_s=20.0, total_s=60.0, pause_s=0.01)
HASTY = FetchLimits(idle_s=0.35, total_s=20.0, pause_s=0.01)


@pytest.fixture
def hub(monkeypatch):
    with Hub() as place:
        monkeypatch.setattr(hub_module.constants, "ENDPOINT", place.url)
        template = f"{place.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub_module.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_module.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "token-of-the-server")
        yield place


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "store", MAX_BYTES)


def remote(store: AdapterStore, *prefixes: str, limits=CALM, **options) -> RemoteSources:
    return RemoteSources(store, prefixes, limits=limits, **options)


def digest(files: dict[str, bytes]) -> str:
    return content_digest({n: hashlib.sha256(c).hexdigest() for n, c in files.items()})


def left(store: AdapterStore) -> list[str]:
    top = store.root.parent
    return sorted(str(p.relative_to(top)) for p in top.rglob("*") if p.is_file())


async def fetch(sources: RemoteSources, source: str, keep: bool = True) -> dict[str, bytes]:
    """The files of a source; the store keeps them."""
    async with sources.fetch(sources.check(source)) as fetched:
        if fetched.upload is None:
            folder = sources._store.root / fetched.digest
        else:
            folder = fetched.upload.folder
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert digest(files) == fetched.digest
        if keep and fetched.upload is not None:
            await sources._store.keep(fetched.upload)
        return files


async def failure(sources: RemoteSources, source: str, kind=AdapterSourceRefused) -> str:
    """The message of what is raised; nothing is left of it."""
    before = left(sources._store)
    with pytest.raises(kind) as caught:
        await fetch(sources, source)
    assert type(caught.value) is kind and caught.value.field == "source"
    assert left(sources._store) == before
    for secret in ("secret-of", "key-of", "token-of"):
        assert secret not in caught.value.message
    return caught.value.message


# What is written, and what is allowed.


@pytest.mark.parametrize(
    "source",
    [
        "hf:acme", "hf:acme/../x", "hf:acme/x@../y", "hf:/acme/x", "hf:acme/x@", "hf:acme//x",
        "hf:acme/x/..", "hf:acme/x?y", "hf:acme/%2e%2e/x", "s3://bucket", "s3:/bucket/x",
        "s3://bucket/a/../b", "s3://bucket/./b", "gs://bucket//x", "https://host",
        "https://user:word@host/x", "https://host/x?y=1", "https://host/x#y", "https://host/..",
        "https://host/a/../b", "https://host/a\\b", "https://host:1:2/x", "https://host/%2e%2e/x",
        "https://HOST/x", "https://host/x#sha256=12", "https://host@elsewhere/x", "hf:acme/x\n",
        "https://h\u043est/x", "s3://bucket/\0", "s3://bucket/" + "x" * 2000,
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused(source):
    with pytest.raises(AdapterSourceRefused) as caught:
        parse(source)
    assert caught.value.field == "source"


def test_sources_are_taken_apart():
    found = parse("hf:acme/x/sub/folder@refs/pr/1")
    assert (found.path, found.revision) == ("acme/x/sub/folder", "refs/pr/1")
    found = parse(f"https://host:8443/a/b/#sha256={'a' * 64}")
    assert (found.host, found.path, found.pin) == ("host:8443", "a/b", "a" * 64)
    assert found.text == "https://host:8443/a/b"
    again = pinned(f"{found.text}#sha256={'a' * 64}", "b" * 64)
    assert again == f"{found.text}#sha256={'b' * 64}" and stored_digest(again) == "b" * 64
    assert stored_digest("/srv/adapters/x") == "x" and stored_digest("hf:acme/x") == ""


@pytest.mark.parametrize(
    ("prefix", "allowed", "refused"),
    [
        ("hf:acme/", ["hf:acme/x", "hf:acme/x/sub@main"], ["hf:acme-evil/x", "s3://acme/x"]),
        ("hf:acme", ["hf:acme/x"], ["hf:acme-evil/x"]),
        ("hf:acme/x", ["hf:acme/x", "hf:acme/x@v2", "hf:acme/x/sub"], ["hf:acme/xy"]),
        ("hf:acme/x@v2", ["hf:acme/x@v2"], ["hf:acme/x", "hf:acme/x@v22"]),
        ("hf:", ["hf:any/thing"], ["gs://hf/x"]),
        ("s3://bucket/team/", ["s3://bucket/team/x"], ["s3://bucket/team2/x", "gs://bucket/team/x"]),
        ("https://host/a", ["https://host/a/b", "https://host/a"], ["https://host/ab",
         "https://host.evil/a", "https://host:444/a/b"]),
    ],
)  # fmt: skip
def test_prefixes_end_where_a_name_ends(prefix, allowed, refused):
    assert check_prefix(prefix) == prefix
    for source in allowed:
        check_allowed(parse(source), [prefix])
    for source in refused:
        with pytest.raises(AdapterSourceRefused, match="--adapter-sources"):
            check_allowed(parse(source), [prefix])


@pytest.mark.parametrize(
    "prefix", ["", "acme/", "hf", "http://host/", "https://", "https:///x", "https://host",
               "https://u:p@host/", "s3:bucket", "file:///etc/", "https://host/a?b"]
)  # fmt: skip
def test_a_prefix_that_allows_what_nobody_meant_is_refused(prefix):
    with pytest.raises(ValueError):
        check_prefix(prefix)


@given(
    st.text(alphabet="abAB./@#:-_ %?\\\0é", max_size=30),
    st.sampled_from(["hf:", "s3://", "gs://", "https://"]),
)
def test_no_text_leads_out_of_its_prefix(text, scheme):
    try:
        location = parse(f"{scheme}{text}")
    except AdapterSourceRefused:
        return
    assert not {"", ".", ".."} & set(location.path.split("/"))
    assert set(location.path) <= set("abAB./-_") and "@" not in location.host


async def test_without_the_operator_nothing_is_fetched(store, hub):
    hub.push("acme/x", adapter())
    message = await failure(remote(store, "hf:other/"), "hf:acme/x")
    assert "--adapter-sources" in message and not hub.seen


# The hub.


async def test_a_hub_is_asked_for_the_commit_of_a_branch_each_time(store, hub):
    first = hub.push("acme/x", adapter("a") | {"README.md": b"r", "../evil": b"e"})
    sources = remote(store, "hf:acme/")
    assert await fetch(sources, "hf:acme/x") == adapter("a")
    assert await fetch(sources, f"hf:acme/x@{first}") == adapter("a")
    num_seen = len(hub.seen)
    hub.push("acme/x", adapter("b"))
    assert await fetch(sources, "hf:acme/x@main") == adapter("b")
    assert len(hub.seen) > num_seen + 2
    assert await fetch(sources, f"hf:acme/x@{first}") == adapter("a")
    assert not any("README" in path or "evil" in path for _, path, _ in hub.seen)


async def test_content_that_is_here_is_not_fetched_again(store, hub):
    hub.push("acme/x", adapter("a"))
    sources = remote(store, "hf:acme/")
    await fetch(sources, "hf:acme/x")
    hub.seen.clear()
    assert await fetch(sources, "hf:acme/x") == adapter("a")
    assert [path.split("?")[0] for _, path, _ in hub.seen] == ["/api/models/acme/x"]
    hub.seen.clear()
    pin = digest(adapter("a"))
    assert await fetch(sources, f"hf:acme/x#sha256={pin}") == adapter("a")
    assert not hub.seen, "a digest that is here needs no network"


async def test_a_folder_of_a_repository(store, hub):
    inner = {f"deep/er/{name}": content for name, content in adapter("c").items()}
    hub.push("acme/x", adapter("a") | inner, branch="v2")
    assert await fetch(remote(store, "hf:acme/"), "hf:acme/x/deep/er@v2") == adapter("c")


async def test_what_a_hub_lacks_is_named(store, hub, monkeypatch):
    sources = remote(store, "hf:acme/")
    hub.push("acme/x", adapter())
    hub.push("acme/empty", {"adapter_model.bin": b"pickle"})
    assert "is not on the hub" in await failure(sources, "hf:acme/missing")
    assert "its revision is not" in await failure(sources, "hf:acme/x@none")
    assert "has no adapter_config.json" in await failure(sources, "hf:acme/empty")
    path = "/api/models/acme/x"
    hub.bent[path] = [status(403, X_Error_Code="GatedRepo")]
    assert "is gated" in await failure(sources, "hf:acme/x")
    monkeypatch.setattr(hub_module.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in await failure(sources, "hf:acme/x")


async def test_a_hub_s_token_stays_with_the_hub(store, hub):
    hub.push("acme/x", adapter())
    await fetch(remote(store, "hf:acme/"), "hf:acme/x")
    for _, path, headers in hub.seen:
        assert headers.get("authorization") == "Bearer token-of-the-server", path


@pytest.mark.parametrize(
    "elsewhere", ["http://169.254.169.254/latest/meta-data", "https://169.254.169.254/x",
                  "https://[::ffff:10.0.0.1]/x", "file:///etc/passwd", "https://u:p@example.com/"]
)  # fmt: skip
async def test_a_hub_that_leads_into_the_network_behind_is_refused(store, hub, elsewhere):
    hub.push("acme/x", adapter())
    hub.elsewhere = elsewhere
    message = await failure(remote(store, "hf:acme/"), "hf:acme/x")
    assert "not public" in message or "not by https" in message


@pytest.mark.parametrize("target", ["https://[", "https://x:99999/", "https://x:port/", "//[::1"])
async def test_a_hub_that_leads_nowhere_is_refused(store, hub, target):
    hub.push("acme/x", adapter())
    hub.elsewhere = target
    assert "nowhere" in await failure(remote(store, "hf:acme/"), "hf:acme/x")


async def test_a_large_file_that_is_not_what_the_hub_says(store, hub):
    hub.push("acme/x", adapter("right"))
    hub.bent[f"/large/{hashlib.sha256(b'right').hexdigest()}"] = [
        lies(5, b"wrong") for _ in range(3)
    ]
    message = await failure(remote(store, "hf:acme/"), "hf:acme/x", Unavailable)
    assert "another SHA-256" in message
    assert await fetch(remote(store, "hf:acme/"), "hf:acme/x") == adapter("right")


# Web servers.


async def test_a_web_server(store, web):
    files = adapter("a") | {"chat_template.jinja": b"{{ messages }}"}
    source = web.put("some/x", files | {"other.txt": b"never asked for"})
    assert await fetch(remote(store, f"{web.url}/some/"), source) == files
    assert not any("Authorization" in headers for _, _, headers in web.seen)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    "trouble", [status(429), status(503), status(500), breaks_off, lies(9, b"12345")]
)
async def test_what_passes_is_tried_again(store, web, trouble, times):
    source = web.put("x", adapter("123456789"))
    web.bent[("GET", f"/x/{WEIGHTS}")] = [trouble] * times
    assert await fetch(remote(store, f"{web.url}/"), source) == adapter("123456789")


async def test_what_does_not_pass_is_given_up_after_three_attempts(store, web):
    source = web.put("x", adapter())
    web.bent[f"/x/{CONFIG}"] = [status(503) for _ in range(9)]
    message = await failure(remote(store, f"{web.url}/"), source, Unavailable)
    assert "3 attempts" in message and "status 503" in message
    assert len(web.bent[f"/x/{CONFIG}"]) == 6


@pytest.mark.parametrize(
    ("bent", "why"),
    [
        (status(302, Location="http://169.254.169.254/latest/meta-data"), "leads elsewhere"),
        (status(307, Location="/y"), "leads elsewhere"),
        (status(404), "has no adapter_model.safetensors"),
        (status(403), "may not be read"),
        (status(400), "status 400"),
        (lambda h: h.send(b"x" * 5, Content_Encoding="gzip"), "encoded"),
        (lambda h: h.send(b"", Content_Length=str(1 << 40)), f"{(1 << 40) + 2} bytes"),
        (lambda h: h.send(b"", Content_Length="-1"), "how large"),
        (lambda h: h.send(b"", Content_Length="many"), "how large"),
        (lambda h: h.send(b"", Content_Length="9" * 5000), "how large"),
    ],
)
async def test_what_a_web_server_says_that_cannot_be_used(store, web, bent, why):
    source = web.put("x", adapter())
    web.bent[("HEAD", f"/x/{WEIGHTS}")] = [bent]
    assert why in await failure(remote(store, f"{web.url}/"), source)
    assert not any(method == "GET" for method, _, _ in web.seen), "refused before a byte came"


@pytest.mark.parametrize("hangs", ["at once", "after the head", "in the middle"])
async def test_a_server_that_hangs_costs_a_bounded_time_and_nobody_else(store, web, hangs):
    web.put("x", adapter("123456789"))
    other = web.put("y", adapter("b"))
    trouble = {
        "at once": web.hang_at_once,
        "after the head": web.hang(),
        "in the middle": web.hang(4),
    }[hangs]
    web.bent[("GET", f"/x/{WEIGHTS}")] = [trouble] * 3
    sources, calm = remote(store, f"{web.url}/", limits=HASTY), remote(store, f"{web.url}/")
    begun = time.monotonic()
    hung = asyncio.create_task(failure(sources, f"{web.url}/x", Unavailable))
    await asyncio.sleep(0.1)
    assert await fetch(calm, other, keep=False) == adapter("b")
    assert not hung.done()
    assert "attempts" in await hung
    assert time.monotonic() - begun < 10


def drip_head(handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
    while not handler.server.place.held.wait(0.05):
        handler.wfile.write(b"a")


def continue_for_ever(handler) -> None:
    while not handler.server.place.held.wait(0.01):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("head", [drip_head, continue_for_ever])
async def test_a_head_without_an_end_holds_no_thread(store, web, head, method):
    """The threads are few; each byte that comes would begin a timeout anew."""
    source = web.put("x", adapter())
    web.bent[(method, f"/x/{WEIGHTS}")] = [head] * 3
    sources = remote(store, f"{web.url}/", limits=HASTY)
    assert "3 attempts" in await failure(sources, source, Unavailable)
    await until(lambda: sources._threads[""]._num_running == 0)
    assert await fetch(sources, source) == adapter()


async def test_a_fetch_ends_after_its_time_however_it_trickles(store, web):
    source = web.put("x", adapter("a" * 1000))

    def trickle(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        while not web.held.wait(0.05):
            handler.wfile.write(b"a")

    web.bent[("GET", f"/x/{WEIGHTS}")] = [trickle]
    limits = FetchLimits(idle_s=1, total_s=0.6, pause_s=0.01)
    message = await failure(remote(store, f"{web.url}/", limits=limits), source, Unavailable)
    assert "--adapter-fetch-timeout-s" in message


async def test_a_caller_who_goes_away_ends_the_fetch(store, web):
    source = web.put("x", adapter("a" * 1000))
    web.bent[("GET", f"/x/{WEIGHTS}")] = [web.hang(10)]
    sources = remote(store, f"{web.url}/", limits=FetchLimits(idle_s=60))
    progress: list[tuple[int, int]] = []

    async def wait() -> None:
        async with sources.fetch(sources.check(source), lambda *seen: progress.append(seen)):
            pass

    task = asyncio.create_task(wait())
    await until(lambda: bool(progress) and progress[-1][0] >= 12)
    assert progress[-1] == (12, 1002)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left(store) == []
    await until(lambda: sources._threads[""]._num_running == 0)  # the read was ended too


async def test_an_adapter_that_changes_while_it_is_fetched_is_one_or_the_other(store, web):
    source = web.put("x", adapter("a"))

    def swap(handler) -> None:
        handler.send(web.files[f"/x/{WEIGHTS}"])
        web.put("x", adapter("b", variant="dora"))

    web.bent[("GET", f"/x/{WEIGHTS}")] = [swap]
    found = await fetch(remote(store, f"{web.url}/"), source)
    assert found == adapter("b", variant="dora")


async def test_a_pin_takes_one_content_only(store, web):
    source, pin = web.put("x", adapter("a")), digest(adapter("a"))
    sources = remote(store, f"{web.url}/")
    assert await fetch(sources, f"{source}#sha256={pin}", keep=False) == adapter("a")
    web.put("x", adapter("b"))
    assert "not the" in await failure(sources, f"{source}#sha256={pin}")
    await fetch(sources, source)
    assert "not the" in await failure(sources, f"{source}#sha256={pin}")


async def test_who_vouches_for_a_server_must_be_trusted(store, web, monkeypatch):
    source = web.put("x", adapter())
    monkeypatch.delenv("SSL_CERT_FILE")
    assert "not trusted" in await failure(remote(store, f"{web.url}/"), source)


async def test_a_name_that_leads_to_this_machine_is_refused(store, web, monkeypatch):
    """Names resolve to what their owner likes; the address counts, and only once."""
    port = web.url.rpartition(":")[2]
    prefix = f"https://adapters.example.com:{port}/"
    web.put("x", adapter())
    asked: list[str] = []

    def resolve(host, port, **_):
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1" if len(asked) % 2 else "10.1.1.1", port))]

    monkeypatch.setattr("loramux.server.adapters.sources.https.socket.getaddrinfo", resolve)
    message = await failure(remote(store, prefix), f"{prefix}x")
    assert "--adapter-source-networks" in message and not web.seen
    sources = remote(store, prefix, networks=[ip_network("127.0.0.0/8")])
    await failure(sources, f"{prefix}x")  # the second look-up leads elsewhere
    monkeypatch.setattr(
        "loramux.server.adapters.sources.https.socket.getaddrinfo",
        lambda host, port, **_: [(2, 1, 6, "", ("127.0.0.1", port))],
    )
    monkeypatch.setattr(
        "loramux.server.adapters.sources.https.socket.create_connection",
        lambda address, timeout: plain_connection(address, timeout),
    )
    assert await fetch(sources, f"{prefix}x") == adapter()


def plain_connection(address, timeout):
    import socket

    made = socket.socket()
    made.settimeout(timeout)
    made.connect(address)
    return made


@pytest.mark.parametrize(
    ("address", "is_allowed"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("192.168.0.1", False), ("172.16.0.1", False), ("169.254.169.254", False),
        ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("::1", False),
        ("fe80::1", False), ("fd00::1", False), ("::ffff:10.0.0.1", False), ("::", False),
        ("64:ff9b::a9fe:a9fe", False), ("2002:a00:1::", False), ("ff02::1", False),
        ("255.255.255.255", False), ("::127.0.0.1", False), ("64:ff9b:1::7f00:1", False),
        ("fec0::1", False),
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address, is_allowed):
    assert WebServers(1.0)._is_allowed(ip_address(address)) is is_allowed


async def test_too_many_fetches_wait_no_longer(store, web):
    source = web.put("x", adapter())
    sources = remote(store, f"{web.url}/", limits=FetchLimits(idle_s=30))
    web.bent[("HEAD", f"/x/{CONFIG}")] = [web.hang_at_once] * 100
    waiting = [asyncio.create_task(fetch(sources, source)) for _ in range(72)]
    await until(lambda: len(web.seen) == 8)
    with pytest.raises(Overloaded, match="72 adapters are being fetched"):
        await fetch(sources, source)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert left(store) == [] and sources._fetches.num_held == 0


# Object stores.


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as patch, s3(patch) as client:
        yield client


def put_s3(client, folder: str, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        client.put_object(Bucket="adapters", Key=f"{folder}/{name}", Body=content)
    return f"s3://adapters/{folder}"


async def test_an_s3_server(store, bucket):
    sources = remote(store, "s3://adapters/team/")
    files = adapter("a" * (9 << 16)) | {"tokenizer_config.json": b"{}"}
    source = put_s3(bucket, "team/x", files | {"more/adapter_config.json": b"?"})
    assert await fetch(sources, source) == files
    put_s3(bucket, "team/x", adapter("b"))
    assert (await fetch(sources, source))[WEIGHTS] == b"b"
    put_s3(bucket, "team/none", {"x": b"x"})
    assert "has no adapter_config.json" in await failure(sources, "s3://adapters/team/none")
    assert "has no adapter_config.json" in await failure(sources, "s3://adapters/team/nothing")
    put_s3(bucket, "team/huge", adapter("a" * MAX_BYTES))
    assert "at most" in await failure(sources, "s3://adapters/team/huge")
    assert "--adapter-sources" in await failure(sources, "s3://adapters/others/x")


async def test_an_s3_server_that_is_away(store, bucket, monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own, each with a longer pause
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    message = await failure(remote(store, "s3://adapters/"), "s3://adapters/x", Unavailable)
    assert "3 attempts" in message
    S3FileSystem.clear_instance_cache()


async def test_google_s_store(store, monkeypatch):
    from gcsfs import GCSFileSystem

    with GoogleStorage() as place:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", place.url)
        GCSFileSystem.clear_instance_cache()
        place.put("adapters/team/x", adapter("a" * 1000))
        sources = remote(store, "gs://adapters/")
        assert await fetch(sources, "gs://adapters/team/x") == adapter("a" * 1000)
        assert "has no adapter_config" in await failure(sources, "gs://adapters/team/y")
    GCSFileSystem.clear_instance_cache()


async def test_without_the_extra_the_error_names_it(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for source in ("s3://adapters/x", "gs://adapters/x"):
        assert "loramux[cloud]" in await failure(remote(store, "s3://", "gs://"), source)


# kill -9.

CHILD = """
import asyncio, sys
from pathlib import Path
from loramux.server.adapters.sources.remote import RemoteSources
from loramux.server.adapters.uploads import AdapterStore

async def main():
    store = AdapterStore(Path(sys.argv[1]), 1 << 20)
    sources = RemoteSources(store, [sys.argv[2]])
    location = sources.check(sys.argv[2] + "x")
    async with sources.fetch(location, lambda *seen: print(*seen, flush=True)):
        pass

asyncio.run(main())
"""


def test_kill_9_in_a_download_leaves_nothing_half(tmp_path, web):
    web.put("x", adapter("a" * 1000))
    web.bent[("GET", f"/x/{WEIGHTS}")] = [web.hang(500)]
    command = [sys.executable, "-c", CHILD, str(tmp_path / "store"), f"{web.url}/"]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        while (line := child.stdout.readline().split()) != ["502", "1002"]:
            assert line, "the child ended"
        child.send_signal(signal.SIGKILL)
    assert list((tmp_path / "store" / "incoming").iterdir()), "it was in the middle"
    store = AdapterStore(tmp_path / "store", MAX_BYTES)
    assert left(store) == [] and not list((tmp_path / "store" / "incoming").iterdir())
