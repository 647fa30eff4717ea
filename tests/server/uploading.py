"""Uploads made frame by frame, and what they leave behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc

from lora_runtime.adapters.files.folder import CONFIG_FILE, TENSORS_FILE
from loramux.server.client.channel import Stubs, typed_errors
from loramux.v1 import adapters_pb2
from tests.server.world import World

CONFIG, WEIGHTS = b'{"variant": "dora"}', b"abcdefgh"


def files(*contents: tuple[str, bytes]) -> list[dict]:
    named = contents or ((CONFIG_FILE, CONFIG), (TENSORS_FILE, WEIGHTS))
    return [{"name": name, "num_bytes": len(content)} for name, content in named]


def start(**fields):
    given = {"name": "x", "files": files(), **fields}
    return adapters_pb2.UploadAdapterRequest(start=given)


def chunk(data: bytes):
    return adapters_pb2.UploadAdapterRequest(chunk={"data": data})


async def send(world: World, *parts) -> adapters_pb2.AdapterInfo:
    """Through blocking stubs: grpc.aio loses a refusal that arrives while it writes."""

    def upload() -> adapters_pb2.AdapterInfo:
        with grpc.insecure_channel(world.target) as channel, typed_errors():
            return Stubs(channel).adapters.UploadAdapter(iter(parts), timeout=60).adapter

    return await asyncio.to_thread(upload)


def local_adapter(folder: Path, content: str = "a", **facts) -> Path:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(facts))
    (folder / TENSORS_FILE).write_text(content)
    return folder


def left_behind(world: World) -> list[str]:
    """Every file below the server's store."""
    store = world.root.parents[1] / "store"
    return sorted(str(p.relative_to(store)) for p in store.rglob("*") if p.is_file())
