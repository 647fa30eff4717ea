"""What a server listens on is found free, or named with its flag, before anything is loaded."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from contextlib import suppress

import grpc
import pytest

from lora_runtime.errors import ConfigError
from loramux.server import addresses, app
from loramux.server.adapters.names import claimed
from loramux.server.addresses import bracketed, check_free, listen
from loramux.server.config import load_config
from loramux.server.rpc.server import start_grpc
from tests.server.world import serving

HAS_IPV6 = socket.has_ipv6 and os.path.exists("/proc/net/if_inet6")


class NeverStarted:
    """An engine that no server may begin to load."""

    def __call__(self, *_: object, **__: object) -> object:
        raise AssertionError("the base was loaded")


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@pytest.mark.parametrize("setting", ["grpc_address", "http_address"])
async def test_a_taken_address_is_named_before_the_base_is_loaded(setting, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}
        address = address_of(taken)
        config = load_config(flags={**free, setting: address})
        with pytest.raises(ConfigError) as caught:
            await app.serve(config, start=NeverStarted())
    assert caught.value.field == setting
    assert address in str(caught.value)
    assert "--" + setting.replace("_", "-") in str(caught.value)
    assert "add_port" not in capfd.readouterr().err


async def test_one_address_for_both_is_named_before_the_base_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as found:
        address = address_of(found)
    config = load_config(flags={"grpc_address": address, "http_address": address})
    with pytest.raises(ConfigError) as caught:
        await app.serve(config, start=NeverStarted())
    assert caught.value.field == "grpc_address"


@pytest.mark.parametrize("host", ["192.0.2.1", "host..invalid", "\udc80", "a" * 300])
def test_what_is_no_address_of_this_machine_is_named(host):
    with pytest.raises(ConfigError, match="--grpc-address") as caught:
        check_free(f"{host}:0", "grpc_address")
    assert caught.value.field == "grpc_address"


async def test_a_folder_that_another_server_uses_is_named_before_the_base_is_loaded(tmp_path):
    free = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}
    config = load_config(flags={**free, "adapter_store": tmp_path})
    with claimed(tmp_path, f"{config.base.model} {config.base.quantization}"):
        with pytest.raises(ConfigError, match="--adapter-store") as caught:
            await app.serve(config, start=NeverStarted())
        assert caught.value.field == "adapter_store"
        with claimed(tmp_path, "another base"):
            pass
    with suppress(AssertionError):
        await app.serve(config, start=NeverStarted())


def test_a_claim_ends_with_its_process(tmp_path):
    child = os.fork()
    if child == 0:
        with claimed(tmp_path, "base"):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    with claimed(tmp_path, "base"):
        (lock,) = tmp_path.iterdir()
        with lock.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["[::1]", "::1"])
async def test_an_ipv6_address_is_served_with_and_without_brackets(tmp_path, host):
    async with serving(tmp_path) as world:
        with listen("[::1]:0", "grpc_address") as found:
            port = found.getsockname()[1]
        server = await start_grpc(world.service, f"{host}:{port}")
        try:
            assert server.port == port
            async with grpc.aio.insecure_channel(f"[::1]:{port}") as channel:
                await channel.channel_ready()
        finally:
            await server.stop(0)


@pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")
def test_a_host_of_two_addresses_is_taken_when_one_of_them_is(monkeypatch):
    """Else some of its clients would reach the other server."""
    both = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]

    def resolve(host, port, **_):
        return [(*entry[:4], (entry[4][0], port, *entry[4][2:])) for entry in both]

    with listen("[::1]:0", "x") as other:
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        with pytest.raises(ConfigError, match="in use"):
            listen(f"localhost:{other.getsockname()[1]}", "http_address")


def test_what_is_written_leaves_at_once():
    """The head and the body of an answer are two writes."""
    with listen("127.0.0.1:0", "x") as listener:
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_grpc_is_given_brackets_around_ipv6():
    assert bracketed("::1:5") == bracketed("[::1]:5") == "[::1]:5"
    assert bracketed("localhost:5") == "localhost:5"


def test_a_name_that_nobody_resolves_ends_with_a_sentence(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(30))
    monkeypatch.setattr(addresses, "MAX_LOOK_UP_S", 0.2)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="no name server said in 0.2 s what far.example is"):
        listen("far.example:1", "grpc_address")
    assert time.monotonic() - begun < 5
    answered.set()
