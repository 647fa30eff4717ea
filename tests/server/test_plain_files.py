"""What is no file, or has no end, under a name that an operator gives: refused by name, at once."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from lora_runtime.base.catalog import check_base_name
from lora_runtime.errors import ConfigError, DataError, InvalidRequest, LoramuxError
from lora_runtime.settings import read_yaml
from lora_runtime.training.rows import read_rows
from loramux.server.access.keys import Keys
from loramux.server.access.tls import Tls, TlsFiles
from loramux.server.app import serve
from loramux.server.client import tls_credentials
from loramux.server.config import load_config
from tests.server.access.certificates import Authority
from tests.server.access.keyring import write_keys

TIMEOUT_S = 10


def pipe(place: Path) -> Path:
    os.mkfifo(place)
    return place


def unix_socket(place: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
    return place


def folder(place: Path) -> Path:
    place.mkdir()
    return place


def device(place: Path) -> Path:
    place.symlink_to("/dev/zero")
    return place


def endless(place: Path) -> Path:
    with place.open("wb") as file:
        file.truncate(1 << 40)
    return place


NO_FILES = [pipe, unix_socket, folder, device, endless]


def in_time(function: Callable[[], object]) -> BaseException | None:
    """What a call raises; a call that hangs fails the test and not the run."""
    raised: list[BaseException | None] = []

    def call() -> None:
        try:
            function()
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert raised, "it hangs"
    return raised[0]


def tls(folder: Path, **changed: Path) -> TlsFiles:
    authority = Authority(folder)
    pair = authority.issue("server")
    files = {"certificate": pair.cert, "key": pair.key, "client_ca": authority.ca}
    return TlsFiles(**files | changed)


READERS: dict[str, tuple[Callable[[Path, Path], object], type[LoramuxError]]] = {
    "settings": (lambda path, _: read_yaml(path), ConfigError),
    "keys": (lambda path, _: Keys(path), ConfigError),
    "certificate": (lambda path, other: Tls(tls(other, certificate=path)), ConfigError),
    "key": (lambda path, other: Tls(tls(other, key=path)), ConfigError),
    "roots": (lambda path, other: Tls(tls(other, client_ca=path)), ConfigError),
    "a client's roots": (lambda path, _: tls_credentials(path), InvalidRequest),
}


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_by_name(tmp_path, name, make) -> None:
    read, kind = READERS[name]
    path = make(tmp_path / "given")
    error = in_time(lambda: read(path, tmp_path))
    assert type(error) is kind and str(path) in str(error), error


@pytest.mark.parametrize("make", [pipe, unix_socket, folder, device])
def test_training_data_that_is_no_file_is_refused_by_name(tmp_path, make) -> None:
    path = make(tmp_path / "given.jsonl")
    error = in_time(lambda: next(read_rows(path), None))
    assert type(error) is DataError and str(path) in str(error), error


@pytest.mark.parametrize("make", NO_FILES)
def test_what_becomes_no_file_changes_nothing_when_it_is_read_again(tmp_path, make) -> None:
    file = write_keys(tmp_path)
    keys, files = Keys(file), tls(folder(tmp_path / "tls"))
    identity, table = Tls(files), keys.table
    for path in (file, files.certificate):
        path.unlink()
        make(path)
    with structlog.testing.capture_logs() as lines:
        assert in_time(keys.reload) is None
        assert in_time(identity.reload) is None
    assert keys.table is table
    assert [line["log_level"] for line in lines] == ["error", "error"], lines
    for path in (file, files.certificate):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("make", [pipe, unix_socket, device])
def test_a_base_that_is_no_file_is_refused_by_name(tmp_path, make) -> None:
    path = make(tmp_path / "given.gguf")
    error = in_time(lambda: check_base_name(str(path)))
    assert type(error) is ConfigError and str(path) in str(error), error


def never(*_: object, **__: object) -> None:
    raise AssertionError("a base is loaded")


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("name", ["config", "keys", "tls_cert", "adapter"])
def test_a_server_does_not_start_on_it(tmp_path, name, make) -> None:
    path = make(tmp_path / "given")
    flags = {
        "config": {},
        "adapter": {"adapter": {"a": str(path)}},
        "tls_cert": {"tls_cert": str(path), "tls_key": str(path)},
    }.get(name, {name: str(path)})
    addresses = {"http_address": "127.0.0.1:0", "grpc_address": "127.0.0.1:0"}

    def start() -> None:
        config = load_config(path if name == "config" else None, flags | addresses)
        asyncio.run(serve(config, start=never))

    error = in_time(start)
    assert isinstance(error, LoramuxError) and str(path) in str(error), error
