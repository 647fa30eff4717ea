"""Hostile and broken files are refused before a tensor is made; what we write reads back whole."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from lora_runtime.adapters.files import folder as files
from lora_runtime.adapters.files.folder import (
    CONFIG_FILE,
    TENSORS_FILE,
    read_adapter,
    write_adapter,
)
from lora_runtime.errors import AdapterRefused, AdapterSourceRefused

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones(3, 2, dtype=torch.bfloat16),
    "c": torch.full((4,), -0.5, dtype=torch.float16),
}
GOOD = save(TENSORS, {"format": "pt"})


def write_raw(folder: Path, tensors: bytes = GOOD, config: bytes | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / TENSORS_FILE).write_bytes(tensors)
    (folder / CONFIG_FILE).write_bytes(json.dumps(CONFIG).encode() if config is None else config)
    return folder


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(folder: Path, **options: int) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as raised:
        read_adapter(folder, **options)
    error = raised.value
    assert error.field
    assert str(folder.parent) not in error.message, "messages must not hold host paths"
    assert len(error.message) < 1000
    return error


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_adapter(tmp_path / "new" / "folder", CONFIG, TENSORS, {"loramux.x": "1"})
    found = read_adapter(tmp_path / "new" / "folder")
    assert found.config == CONFIG
    assert found.metadata == {"format": "pt", "loramux.x": "1"}
    assert found.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(found.tensors[name], TENSORS[name]) for name in TENSORS)
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {
        CONFIG_FILE, TENSORS_FILE,
    }  # fmt: skip


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, {"t": torch.randn(5, 4).T}, {"z": "é", "a": "2"})
    assert load_file(tmp_path / TENSORS_FILE)["t"].shape == (4, 5)
    with safe_open(tmp_path / TENSORS_FILE, "pt") as file:
        assert file.metadata() == {"a": "2", "format": "pt", "z": "é"}


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    """safetensors alone writes its metadata in random order."""
    metadata = {str(key): str(key) for key in range(20)}
    written = set()
    for number in range(5):
        write_adapter(tmp_path / str(number), CONFIG, TENSORS, metadata)
        written.add((tmp_path / str(number) / TENSORS_FILE).read_bytes())
    assert len(written) == 1


def test_a_failed_write_leaves_the_old_adapter(tmp_path: Path, monkeypatch) -> None:
    write_adapter(tmp_path, CONFIG, TENSORS, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_adapter(tmp_path, {**CONFIG, "r": 9}, {"a": TENSORS["a"]}, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_written_adapter_is_as_readable_as_other_files(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, TENSORS, {})
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def remove(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder / name


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
@pytest.mark.parametrize("kind", ["missing", "link", "folder", "pipe"])
def test_only_plain_files_are_read(name: str, kind: str, tmp_path: Path) -> None:
    path = remove(write_raw(tmp_path / "adapter"), name)
    if kind == "link":
        (tmp_path / "target").write_bytes(GOOD)
        path.symlink_to(tmp_path / "target")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    error = refusal(path.parent)
    assert isinstance(error, AdapterSourceRefused)
    assert error.field == name


def test_the_folder_must_exist(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nothing", "file", "nul\0"):
        assert isinstance(refusal(tmp_path / name), AdapterSourceRefused)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.pt"])
def test_pickle_files_are_named_and_never_loaded(name: str, tmp_path: Path) -> None:
    remove(write_raw(tmp_path / "adapter"), TENSORS_FILE)
    (tmp_path / "adapter" / name).write_bytes(Bomb.armed(tmp_path / "exploded"))
    error = refusal(tmp_path / "adapter")
    assert error.field == name
    assert "convert" in error.message
    assert not (tmp_path / "exploded").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))

    @classmethod
    def armed(cls, path: Path) -> bytes:
        return pickle.dumps(cls(path))


def test_a_pickle_beside_safetensors_is_not_looked_at(tmp_path: Path) -> None:
    write_raw(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(Bomb.armed(tmp_path / "exploded"))
    assert read_adapter(tmp_path).config == CONFIG
    assert not (tmp_path / "exploded").exists()


CONFIGS = {
    "no JSON": b"r: 8",
    "empty": b"",
    "not an object": b"[1]",
    "a key twice": b'{"r": 8, "r": 4}',
    "a key twice, deep": b'{"rank_pattern": {"q": 8, "q": 4}}',
    "NaN": b'{"lora_alpha": NaN}',
    "infinity": b'{"lora_alpha": -Infinity}',
    "overflowing float": b'{"lora_alpha": 1e999}',
    "number of many digits": b'{"r": ' + b"9" * 5000 + b"}",
    "deep nesting": b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not UTF-8": b'{"r": "\xff"}',
    "lone surrogate": rb'{"\ud800": 1}',
    "trailing text": b"{} {}",
    "too large": b'{"r": "' + b"x" * (1 << 20) + b'"}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_configs_are_refused(name: str, tmp_path: Path) -> None:
    assert refusal(write_raw(tmp_path / "a", config=CONFIGS[name])).field == CONFIG_FILE


HEADERS = {
    "empty file": (b"", TENSORS_FILE, "not a safetensors file"),
    "pickle": (pickle.dumps({"a": 1}), TENSORS_FILE, "not a safetensors file"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, TENSORS_FILE, None),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", TENSORS_FILE, "not a safetensors file"),
    "header cut": (struct.pack("<Q", 50) + b"{}", TENSORS_FILE, "48 bytes of its header"),
    "header not JSON": (with_header(b"nothing"), TENSORS_FILE, "JSON"),
    "header a list": (with_header([]), TENSORS_FILE, "object"),
    "no tensors": (with_header({}), TENSORS_FILE, "0 tensors"),
    "tensor twice": (
        with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        TENSORS_FILE, "twice",
    ),
    "too many tensors": (
        with_header({str(i): entry(shape=[1], offsets=[4 * i, 4 * i + 4]) for i in range(16385)}),
        TENSORS_FILE, "16385 tensors",
    ),
    "metadata not strings": (
        with_header({"__metadata__": {"a": 1}, "a": entry()}, b"\0" * 8), "__metadata__", "strings"
    ),
    "metadata a list": (
        with_header({"__metadata__": [], "a": entry()}, b"\0" * 8), "__metadata__", "strings"
    ),
    "entry no object": (with_header({"a": [1]}), "a", "header entry"),
    "entry incomplete": (with_header({"a": {"dtype": "F32"}}), "a", "header entry"),
    "long name": (with_header({"n" * 600: entry()}, b"\0" * 8), "n" * 120, "600 characters"),
    "integers": (with_header({"a": entry("I64", [1])}, b"\0" * 8), "a", "dtype"),
    "dtype a list": (with_header({"a": entry(["F32"])}, b"\0" * 8), "a", "dtype"),
    "scalar": (with_header({"a": entry(shape=[], offsets=[0, 4])}, b"\0" * 4), "a", "shape"),
    "3-D": (with_header({"a": entry(shape=[1, 2, 1])}, b"\0" * 8), "a", "shape"),
    "experts saved whole": (
        with_header({"base_model.model.experts.down_proj": entry(shape=[1, 2, 1])}, b"\0" * 8),
        "modules_to_save", r"experts.down_proj' has the shape \[1, 2, 1\].*whole weight",
    ),
    "a convolution adapted": (
        with_header({"base_model.model.conv1d.lora_A.weight": entry(shape=[1, 2, 1])}, b"\0" * 8),
        "target_modules", "adapts a convolution",
    ),
    "empty tensor": (with_header({"a": entry(shape=[0], offsets=[0, 0])}), "a", "shape"),
    "negative size": (with_header({"a": entry(shape=[-2, -1])}, b"\0" * 8), "a", "shape"),
    "boolean size": (with_header({"a": entry(shape=[True, 2])}, b"\0" * 8), "a", "shape"),
    "float size": (with_header({"a": entry(shape=[2.0])}, b"\0" * 8), "a", "shape"),
    "astronomic size": (with_header({"a": entry(shape=[2**62, 2**62])}), "a", "shape"),
    "shape and bytes differ": (with_header({"a": entry(shape=[3])}, b"\0" * 8), "a", "cannot hold"),
    "negative offset": (with_header({"a": entry(offsets=[-8, 0])}, b"\0" * 8), "a", "data_offsets"),
    "one offset": (with_header({"a": entry(offsets=[0])}, b"\0" * 8), "a", "data_offsets"),
    "gap": (with_header({"a": entry(offsets=[4, 12])}, b"\0" * 12), "a", "starts at byte 4"),
    "overlap": (
        with_header({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "b", "at byte 4"
    ),
    "data cut": (with_header({"a": entry()}, b"\0" * 7), "a", "ends at byte 8 .* has 7"),
    "data left over": (with_header({"a": entry()}, b"\0" * 9), TENSORS_FILE, "1 bytes after"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_malformed_tensor_files_are_refused(name: str, tmp_path: Path) -> None:
    data, field, message = HEADERS[name]
    folder = write_raw(tmp_path / "a", data)
    assert refusal(folder).field == field
    with pytest.raises(AdapterRefused, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_tensors_are_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    bad = torch.zeros(3, 5, dtype=dtype)
    bad[2, 4] = value
    write_raw(tmp_path / "a", save({**TENSORS, "bad.tensor": bad}))
    error = refusal(tmp_path / "a")
    assert error.field == "bad.tensor"
    assert "NaN, infinity" in error.message


def test_float64_is_rounded_to_float32_as_peft_does(tmp_path: Path) -> None:
    wide = torch.tensor([[1 / 3, 1e-30]], dtype=torch.float64)
    write_raw(tmp_path / "a", save({**TENSORS, "wide": wide}))
    found = read_adapter(tmp_path / "a").tensors["wide"]
    assert found.dtype == torch.float32 and torch.equal(found, wide.float())
    write_raw(tmp_path / "b", save({**TENSORS, "wide": wide * 1e300}))
    assert refusal(tmp_path / "b").field == "wide"


def test_the_size_limit_is_the_callers(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "a")
    assert read_adapter(folder, max_bytes=len(GOOD)).tensors
    assert str(len(GOOD) - 1) in refusal(folder, max_bytes=len(GOOD) - 1).message


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=9),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
            st.lists(st.integers(1, 150), min_size=1, max_size=2),
        ),
        min_size=1,
        max_size=9,
    ),
    st.integers(0, 9),
)
@settings(max_examples=40)
def test_tensors_are_read_as_safetensors_reads_them(tmp_path_factory, sizes, seed) -> None:
    """Of every dtype and size, in whatever order they lie; with the SHA-256 of the file."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (dtype, shape) in sizes.items()
    }
    data = save(tensors, {"format": "pt"})
    found = read_adapter(write_raw(tmp_path_factory.getbasetemp() / "read", data))
    expected = load(data)
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        narrow = tensor.float() if tensor.dtype == torch.float64 else tensor
        assert found.tensors[name].dtype == narrow.dtype
        assert torch.equal(found.tensors[name], narrow)
    assert found.tensors_sha256 == hashlib.sha256(data).hexdigest()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        refusal(write_raw(tmp_path / "a", GOOD[:length]))


def assert_refused_or_sound(folder: Path) -> None:
    try:
        found = read_adapter(folder)
    except AdapterRefused:
        return
    assert all(tensor.isfinite().all() for tensor in found.tensors.values())


@given(st.binary(max_size=200) | st.binary(max_size=200).map(with_header))
@settings(max_examples=150)
def test_any_bytes_as_tensors(tmp_path_factory, data: bytes) -> None:
    assert_refused_or_sound(write_raw(tmp_path_factory.getbasetemp() / "any", data))


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8))
@settings(max_examples=300)
def test_any_change_of_a_good_file(tmp_path_factory, position: int, change: bytes) -> None:
    data = GOOD[:position] + change + GOOD[position + len(change) :]
    assert_refused_or_sound(write_raw(tmp_path_factory.getbasetemp() / "any", data))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(st.dictionaries(
    st.text(max_size=5) | st.just("__metadata__"),
    JSON_VALUES | st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-4, 40), min_size=2, max_size=2) | JSON_VALUES,
    }),
    max_size=4,
))  # fmt: skip
@settings(max_examples=100)
def test_any_header(tmp_path_factory, header: dict) -> None:
    data = with_header(header, b"\0" * 32)
    assert_refused_or_sound(write_raw(tmp_path_factory.getbasetemp() / "any", data))


@given(st.binary(max_size=100) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=150)
def test_any_bytes_as_config(tmp_path_factory, config: bytes) -> None:
    assert_refused_or_sound(write_raw(tmp_path_factory.getbasetemp() / "any", config=config))
