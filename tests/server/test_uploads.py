"""Uploads over a real socket: whole and checked, or refused by name and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import save_file

from lora_runtime.adapters.files.file_names import OPTIONAL_FILES, REQUIRED_FILES
from lora_runtime.adapters.files.folder import CONFIG_FILE, TENSORS_FILE, read_folder
from lora_runtime.adapters.parity import PARITY_FILE
from lora_runtime.core import ANY_FOLDER, FolderRules
from lora_runtime.engine.client import LoadedAdapter
from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    AdapterSourceRefused,
    BaseMismatch,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    Unavailable,
)
from lora_runtime.text.text_files import TEMPLATE_FILE, TEXT_FILES
from loramux.server.adapters.uploads import Upload
from loramux.server.client import AsyncClient
from loramux.server.client.channel import typed_errors
from loramux.server.client.uploads import Outgoing
from loramux.server.errors import grpc_status
from loramux.v1 import adapters_pb2, adapters_pb2_grpc
from tests.fakes import PLAIN
from tests.server.uploading import (
    CONFIG,
    WEIGHTS,
    chunk,
    files,
    left_behind,
    local_adapter,
    send,
    start,
)
from tests.server.world import MAX_UPLOAD_BYTES, World, in_thread, stubs_of, until


def test_the_files_that_are_sent_are_all_that_a_server_reads():
    assert REQUIRED_FILES == (CONFIG_FILE, TENSORS_FILE)
    assert set(OPTIONAL_FILES) == {PARITY_FILE, *TEXT_FILES}


async def test_an_upload_is_loaded_answers_and_is_kept_by_content(serve, tmp_path) -> None:
    folder = local_adapter(tmp_path / "local", chat_template="{content}")
    (folder / TEMPLATE_FILE).write_text("{content}")
    (folder / "README.md").write_text("not sent")
    async with serve() as world:
        info = await world.client.upload_adapter("x", folder)
        assert info.state == adapters_pb2.ADAPTER_STATE_LOADED and info.has_chat_template
        assert await world.client.generate("q", adapter="x", max_tokens=3).text() == "aaa"
        names = (CONFIG_FILE, TENSORS_FILE, TEMPLATE_FILE)
        assert left_behind(world) == sorted(f"adapters/{info.source}/{name}" for name in names)
        stored = world.service.adapters._store.root / info.source
        assert all((stored / n).read_bytes() == (folder / n).read_bytes() for n in names)
        again = await world.client.load_adapter("y", info.source)
        assert again.adapter.digest == info.digest
        assert (await world.client.upload_adapter("x", folder)).digest == info.digest
        assert world.engine.references == {info.digest: 2}


async def test_the_blocking_client_tells_its_progress(serve, tmp_path) -> None:
    folder, seen = local_adapter(tmp_path / "local", "b" * 3_000_000), []
    total = sum(path.stat().st_size for path in folder.iterdir())

    def use(client) -> None:
        info = client.upload_adapter("x", folder, on_progress=lambda *counts: seen.append(counts))
        assert client.generate("q", adapter="x", max_tokens=2).text() == "bb"
        with pytest.raises(AdapterExists):
            client.upload_adapter("x", local_adapter(tmp_path / "other", "c"))
        other = client.upload_adapter("x", str(tmp_path / "other"), replace=True)
        assert other.former_digest == info.digest
        assert client.rollback_adapter("x").digest == info.digest

    async with serve() as world:
        await in_thread(world, use)
        assert len(seen) >= 4 and seen[-1] == (total, total) and seen == sorted(seen)
        assert len(left_behind(world)) == 4, "what was refused for its name is not kept"


CONFIG_SHA = hashlib.sha256(CONFIG).hexdigest()
WRONG_SHA = {"name": CONFIG_FILE, "num_bytes": len(CONFIG), "sha256": "0" * 64}
BAD_UPLOADS = {
    "nothing": ([], "start"),
    "no start": ([chunk(CONFIG)], "start"),
    "two starts": ([start(), start()], "start"),
    "a part of nothing": ([start(), adapters_pb2.UploadAdapterRequest()], "part"),
    "no name": ([start(name="")], "start.name"),
    "a path as name": ([start(name="../x")], "start.name"),
    "the base's name": ([start(name="tiny")], "name"),
    "a file of another name": (
        [start(files=files((CONFIG_FILE, b""), (TENSORS_FILE, b""), ("model.py", b"")))],
        "start.files[2].name",
    ),
    "a path": (
        [start(files=files((f"../{CONFIG_FILE}", b""), (TENSORS_FILE, b"")))],
        "start.files[0].name",
    ),
    "a file twice": (
        [start(files=files((CONFIG_FILE, b""), (TENSORS_FILE, b""), (CONFIG_FILE, b"")))],
        "start.files[2].name",
    ),
    "no weights": ([start(files=files((CONFIG_FILE, CONFIG))), chunk(CONFIG)], "start.files"),
    "no size": ([start(files=[{"name": CONFIG_FILE}])], "start.files[0].num_bytes"),
    "too large": (
        [start(files=[*files()[:1], {"name": TENSORS_FILE, "num_bytes": MAX_UPLOAD_BYTES}])],
        "start.files",
    ),
    "larger than a disk": (
        [start(files=[*files()[:1], {"name": TENSORS_FILE, "num_bytes": 2**64 - 1}])],
        "start.files",
    ),
    "no hash": (
        [start(files=[{"name": CONFIG_FILE, "num_bytes": 1, "sha256": "abc"}])],
        "start.files[0].sha256",
    ),
    "another hash": (
        [start(files=[WRONG_SHA, *files()[1:]]), chunk(CONFIG), chunk(WEIGHTS)],
        "start.files[0].sha256",
    ),
    "no chunks": ([start()], "chunk.data"),
    "too short": ([start(), chunk(CONFIG), chunk(WEIGHTS[:-1])], "chunk.data"),
    "too long": ([start(), chunk(CONFIG), chunk(WEIGHTS), chunk(b"x")], "chunk.data"),
    "a chunk over two files": ([start(), chunk(CONFIG + WEIGHTS)], "chunk.data"),
    "the other file first": ([start(), chunk(WEIGHTS), chunk(CONFIG)], "chunk.data"),
}


@pytest.mark.parametrize("case", BAD_UPLOADS)
async def test_a_bad_upload_names_its_field_and_leaves_nothing(serve, case) -> None:
    parts, field = BAD_UPLOADS[case]
    async with serve() as world:
        with pytest.raises(InvalidRequest) as caught:
            await send(world, *parts)
        assert caught.value.field == field and field.rpartition(".")[2] in str(caught.value) + field
        assert left_behind(world) == [] and world.registry.records() == []
        assert (await send(world, start(), chunk(CONFIG), chunk(WEIGHTS))).variant == "dora"


async def test_any_cut_of_the_files_into_chunks_is_the_same_upload(serve) -> None:
    sizes = {"sha256": CONFIG_SHA.upper(), **files()[0]}
    async with serve() as world:
        parts = [*(chunk(bytes([b])) for b in CONFIG), chunk(b""), chunk(WEIGHTS[:3])]
        one = await send(world, start(files=[sizes, files()[1]]), *parts, chunk(WEIGHTS[3:]))
        other = await send(world, start(name="y"), chunk(CONFIG), chunk(WEIGHTS))
        assert (one.digest, one.source) == (other.digest, other.source)
        assert len(left_behind(world)) == 2


@pytest.mark.parametrize(
    ("content", "kind"), [("!BaseMismatch", BaseMismatch), ("!AdapterRefused", AdapterRefused)]
)
async def test_what_cannot_be_loaded_is_not_kept(serve, tmp_path, content, kind) -> None:
    async with serve() as world:
        with pytest.raises(kind) as caught:
            await world.client.upload_adapter("x", local_adapter(tmp_path / "local", content))
        assert str(world.root.parents[1]) not in str(caught.value), "no path of the server"
        assert left_behind(world) == [] and world.engine.references == {}
        (record,) = await world.client.list_adapters()
        assert record.state == adapters_pb2.ADAPTER_STATE_FAILED and record.error
        with pytest.raises(AdapterNotFound):
            await world.client.generate("q", adapter="x").text()


async def test_a_cancelled_upload_leaves_nothing(serve) -> None:
    async def parts():
        yield start()
        yield chunk(CONFIG)
        await asyncio.sleep(60)

    async with serve() as world, stubs_of(world) as stubs:
        call = stubs.adapters.UploadAdapter(parts())
        await until(lambda: any(name.endswith(CONFIG_FILE) for name in left_behind(world)))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        incoming = world.root.parents[1] / "store" / "incoming"
        await until(lambda: not any(incoming.iterdir()))
        assert left_behind(world) == [] and world.registry.records() == []


async def test_an_upload_cancelled_while_it_loads_is_loaded_and_kept(serve, tmp_path) -> None:
    async with serve() as world, stubs_of(world) as stubs:
        world.engine.load_gate.clear()
        call = stubs.adapters.UploadAdapter(
            Outgoing("x", local_adapter(tmp_path / "l"), False).parts()
        )
        await until(lambda: bool(world.registry.records()))
        (record,) = world.registry.records()
        assert record.state == "verifying"
        call.cancel()
        await asyncio.sleep(0.05)
        world.engine.load_gate.set()
        await until(lambda: len([n for n in left_behind(world) if n.startswith("adapters")]) == 2)
        await until(lambda: world.registry.get("x").state == "loaded")  # it is stored just before
        assert world.registry.resolve("x").digest[0] == "a"


class Refusing(adapters_pb2_grpc.AdapterServiceServicer):
    """A server that answers an upload early, after so many of its messages."""

    def __init__(self, num_messages: int, error: LoramuxError | None, wait_s: float) -> None:
        self._num_messages, self._error, self._wait_s = num_messages, error, wait_s
        self.has_begun = asyncio.Event()

    async def UploadAdapter(self, request_iterator, context):
        for _ in range(self._num_messages):
            await anext(request_iterator)
        self.has_begun.set()
        await asyncio.sleep(self._wait_s)
        if self._error is not None:
            await context.abort_with_status(grpc_status(self._error))
        return adapters_pb2.UploadAdapterResponse(adapter={"name": "early"})


@contextlib.asynccontextmanager
async def refusing(num_messages: int, error: LoramuxError | None, wait_s: float):
    server, servicer = grpc.aio.server(), Refusing(num_messages, error, wait_s)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            yield server, servicer, client
    finally:
        await server.stop(0)


@pytest.mark.parametrize("wait_s", [0, 0.2], ids=["at once", "while all stands still"])
@pytest.mark.parametrize("num_messages", [0, 1, 3, 9])
async def test_a_server_may_answer_an_upload_at_any_time(tmp_path, num_messages, wait_s):
    """A refusal while the client writes was lost, and a server that said nothing waited for."""
    folder = local_adapter(tmp_path / "l", "a" * (24 << 20))
    for error in (Overloaded("no room", field="files"), None):
        async with refusing(num_messages, error, wait_s) as (_, _, client):
            sending = client.upload_adapter("x", folder)
            if error is None:
                assert (await asyncio.wait_for(sending, 20)).name == "early"
                continue
            with pytest.raises(Overloaded, match="no room") as refusal:
                await asyncio.wait_for(sending, 20)
            assert refusal.value.field == "files"


async def test_a_server_that_goes_away_ends_its_uploads_and_so_does_their_client(tmp_path):
    folder = local_adapter(tmp_path / "l", "a" * (24 << 20))
    for end in ("server", "client", "caller"):
        async with refusing(3, None, 60) as (server, servicer, client):
            sending = asyncio.create_task(client.upload_adapter("x", folder))
            await asyncio.wait_for(servicer.has_begun.wait(), 20)
            if end == "server":
                await server.stop(0)
                with pytest.raises(Unavailable):
                    await asyncio.wait_for(sending, 20)
            elif end == "client":
                await client.close()
                with pytest.raises(CancelledError):
                    await asyncio.wait_for(sending, 20)
            else:
                sending.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await sending


async def test_uploads_in_parallel_do_not_disturb_streams(serve, tmp_path) -> None:
    letters = "bcdefgh"
    folders = {c: local_adapter(tmp_path / c, c + "z" * 2_500_000) for c in letters}

    async def answer(world: World, index: int) -> None:
        text = await world.client.generate("q", adapter="x", max_tokens=50).text()
        assert text == "a" * 50, index

    async with serve() as world:
        await world.load("x", "a")
        uploads = [world.client.upload_adapter(c, path) for c, path in folders.items()]
        same = [world.client.upload_adapter(f"b{i}", folders["b"]) for i in range(4)]
        answers = (answer(world, index) for index in range(100))
        infos, *_ = await asyncio.gather(asyncio.gather(*uploads, *same), *answers)
        assert [info.digest[0] for info in infos] == [*letters, *"bbbb"]
        assert len(left_behind(world)) == 2 * len(letters)
        assert world.engine.aborted == []


@pytest.mark.parametrize("missing", REQUIRED_FILES)
def test_a_client_sends_whole_adapters_only(tmp_path, missing):
    folder = local_adapter(tmp_path / "a")
    (folder / missing).unlink()
    with pytest.raises(AdapterSourceRefused, match=missing) as caught:
        Outgoing("x", folder, False)
    assert caught.value.field == "folder"


@pytest.mark.parametrize(
    ("folder", "why"),
    [("run", "its folder 'adapter' is one"), ("empty", "it is no adapter"), ("none", "it is no")],
)
def test_a_client_says_where_a_run_has_its_adapter(tmp_path, folder, why):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    local_adapter(tmp_path / "run" / "adapter")
    with pytest.raises(AdapterSourceRefused, match=why):
        Outgoing("x", tmp_path / folder, replace=False)


def test_a_client_does_not_drop_the_start_of_a_mutated_base(tmp_path):
    (local_adapter(tmp_path / "a") / "pissa_init").mkdir()
    with pytest.raises(AdapterSourceRefused, match="pissa_init"):
        Outgoing("x", tmp_path / "a", False)


async def test_a_part_that_cannot_be_parsed_is_typed(serve) -> None:
    async with serve() as world, grpc.aio.insecure_channel(world.target) as channel:
        upload = channel.stream_unary("/loramux.v1.AdapterService/UploadAdapter")
        with pytest.raises(InvalidRequest, match="UTF-8"), typed_errors():
            await upload(iter([b"\x0a\x04\x0a\x02\xff\xfe"]))


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, Overloaded), (errno.EIO, LoramuxError)]
)
async def test_a_full_disk_is_typed_and_leaves_nothing(serve, monkeypatch, number, kind) -> None:
    def fail(self, data):
        raise OSError(number, "/srv/secret")

    async with serve() as world:
        monkeypatch.setattr(Upload, "write", fail)
        with pytest.raises(kind) as caught:
            await send(world, start(), chunk(CONFIG), chunk(WEIGHTS))
        assert type(caught.value) is kind and "secret" not in str(caught.value)
        assert left_behind(world) == [] and world.registry.records() == []


def real_adapter(folder: Path, fill: float = 0.5) -> Path:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({"a": torch.full((2, 2), fill)}, folder / TENSORS_FILE)
    return folder


@pytest.mark.parametrize("change", ["a byte", "a file more", "a file less", "another's file"])
async def test_a_stored_adapter_is_checked_when_it_is_used(serve, tmp_path, change) -> None:
    """What the store holds is named by its content, and is what its name says when it is read."""
    folder = real_adapter(tmp_path / "local")
    (folder / TEMPLATE_FILE).write_text("{{ messages }}")
    async with serve() as world:

        async def load(folder: Path, rules: FolderRules = ANY_FOLDER) -> LoadedAdapter:
            content = await asyncio.to_thread(read_folder, folder, rules)
            digest = content.adapter.tensors_sha256
            world.engine.references[digest] += 1
            return replace(PLAIN, facts=replace(PLAIN.facts, digest=digest))

        world.engine.load_adapter = load
        info = await world.client.upload_adapter("x", folder)
        await world.client.unload_adapter("x", wait=True)
        assert (await world.client.load_adapter("x", info.source)).adapter.digest == info.digest
        await world.client.unload_adapter("x", wait=True)
        stored = world.service.adapters._store.root / info.source
        if change == "a byte":
            save_file({"a": torch.full((2, 2), 0.25)}, stored / TENSORS_FILE)
        elif change == "a file more":
            (stored / "generation_config.json").write_text("{}")
        elif change == "a file less":
            (stored / TEMPLATE_FILE).unlink()
        else:
            (stored / TEMPLATE_FILE).write_text("{{ 1 }}")
        with pytest.raises(AdapterRefused, match="not those that were stored"):
            await world.client.load_adapter("x", info.source)
        again = await world.client.upload_adapter("x", folder)
        assert (again.source, again.digest) == (info.source, info.digest)
        await world.client.unload_adapter("x", wait=True)
        assert (await world.client.load_adapter("x", info.source)).adapter.digest == info.digest


def test_a_client_announces_one_state_of_a_folder(tmp_path, monkeypatch) -> None:
    """A folder that is written to between two hashes is hashed anew."""
    folder = tmp_path / "x"
    folder.mkdir()

    def write(content: bytes) -> None:
        for name in (CONFIG_FILE, TENSORS_FILE, TEMPLATE_FILE):
            (folder / name).write_bytes(content)

    hash_of = hashlib.file_digest
    hashes_of_old = []

    def written_to_after_the_first_hash(file, algorithm):
        digest = hash_of(file, algorithm)
        if not hashes_of_old:
            hashes_of_old.append(digest.hexdigest())
            write(b"new")
        return digest

    write(b"old")
    monkeypatch.setattr(hashlib, "file_digest", written_to_after_the_first_hash)
    start = next(Outgoing("x", folder, False).parts()).start
    assert hashes_of_old == [hashlib.sha256(b"old").hexdigest()]
    assert [file.sha256 for file in start.files] == [hashlib.sha256(b"new").hexdigest()] * 3
