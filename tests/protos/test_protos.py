"""The wire contract: lint, generated code, and presence of every scalar a client may send."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from loramux.v1 import adapters_pb2, generation_pb2, server_pb2, types_pb2

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "protos" / "loramux" / "v1"
SENT_BY_CLIENTS = (
    types_pb2.SamplingParams,
    types_pb2.AdapterSelection,
    types_pb2.ChatMessage,
    generation_pb2.GenerateRequest,
    generation_pb2.TokenizeRequest,
    adapters_pb2.LoadAdapterRequest,
    adapters_pb2.UploadStart,
    adapters_pb2.UploadFile,
    adapters_pb2.UploadChunk,
    adapters_pb2.UnloadAdapterRequest,
    adapters_pb2.RollbackAdapterRequest,
    adapters_pb2.GetAdapterRequest,
    server_pb2.GetServerInfoRequest,
)


def test_buf_lint_is_clean() -> None:
    buf = Path(sys.executable).with_name("buf")
    found = subprocess.run([buf, "lint", "protos"], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_generated_code_is_what_the_protos_give(tmp_path: Path) -> None:
    protos = sorted(path.relative_to(ROOT / "protos") for path in FOLDER.glob("*.proto"))
    services = [p for p in protos if "\nservice " in (ROOT / "protos" / p).read_text()]
    outputs = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    _protoc(*outputs, *protos)
    _protoc(f"--grpc_python_out={tmp_path}", *services)
    fresh = {path.name: path.read_text() for path in tmp_path.rglob("*_pb2*")}
    committed = {path.name: path.read_text() for path in FOLDER.glob("*_pb2*.py*")}
    assert fresh == committed, "run `make protos`"


@pytest.mark.parametrize("message", SENT_BY_CLIENTS, ids=lambda m: m.DESCRIPTOR.name)
def test_every_scalar_a_client_sends_tells_absent_from_zero(message: type) -> None:
    for field in message.DESCRIPTOR.fields:
        assert field.is_repeated or field.has_presence, field.full_name


def test_every_request_scalar_says_its_default_or_that_it_is_required() -> None:
    for message in SENT_BY_CLIENTS:
        text = _definition(message.DESCRIPTOR.name)
        for field in message.DESCRIPTOR.fields:
            if field.type == FieldDescriptor.TYPE_MESSAGE or _in_real_oneof(field):
                continue
            comment = re.search(rf"((?: *//[^\n]*\n)+)[^\n]*\b{field.name} = {field.number};", text)
            assert comment and re.search(r"Default|Required", comment[1]), field.full_name


def _in_real_oneof(field: FieldDescriptor) -> bool:
    oneof = field.containing_oneof
    return oneof is not None and not oneof.name.startswith("_")


def _definition(message: str) -> str:
    everything = "".join(path.read_text() for path in FOLDER.glob("*.proto"))
    return everything.split(f"\nmessage {message} {{", 1)[1].split("\n}\n", 1)[0]


def _protoc(*arguments: object) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "protos", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
