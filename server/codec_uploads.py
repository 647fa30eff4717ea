"""Between the parts of an upload and the service's words: pure functions, no I/O."""

from __future__ import annotations

import re

from lora_runtime.adapters.files.file_names import OPTIONAL_FILES, REQUIRED_FILES
from lora_runtime.errors import InvalidRequest
from protos.loramux.v1 import adapters_pb2
from server.calls import UploadCall, UploadFile
from server.codec import adapter_name

MAX_FILES = len(REQUIRED_FILES) + len(OPTIONAL_FILES)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def decode_upload(start: adapters_pb2.UploadStart) -> UploadCall:
    """Translate what an upload announces. Raises InvalidRequest naming the field."""
    if len(start.files) > MAX_FILES:
        raise InvalidRequest(
            f"start.files has {len(start.files)} files; an adapter has {MAX_FILES} at most",
            field="start.files",
        )
    return UploadCall(
        name=adapter_name(start.name, "start.name"),
        files=tuple(_upload_file(file, f"start.files[{i}]") for i, file in enumerate(start.files)),
        replace=start.replace,
    )


def upload_data(part: adapters_pb2.UploadAdapterRequest) -> bytes:
    """Return the bytes of a part after the first. Raises InvalidRequest for any other part."""
    if part.WhichOneof("part") != "chunk":
        field = part.WhichOneof("part") or "part"
        raise InvalidRequest(f"{field}: after start only chunks may follow", field=field)
    return part.chunk.data


def _upload_file(file: adapters_pb2.UploadFile, field: str) -> UploadFile:
    if not file.HasField("num_bytes"):
        raise InvalidRequest(
            f"{field}.num_bytes is missing; announce the size", field=f"{field}.num_bytes"
        )
    sha256 = file.sha256.lower()
    if file.HasField("sha256") and not _SHA256.fullmatch(sha256):
        raise InvalidRequest(
            f"{field}.sha256 must be 64 hexadecimal digits", field=f"{field}.sha256"
        )
    return UploadFile(file.name, file.num_bytes, sha256)
