"""A folder that is swapped or written to while it is read gives one whole version, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_runtime.adapters.files.file_names import (
    CONFIG_FILE,
    PARITY_FILE,
    TENSORS_FILE,
)
from lora_runtime.adapters.files.folder import FolderContent, read_folder
from lora_runtime.adapters.files.open_folder import SETTLE_S
from lora_runtime.core import FolderRules
from lora_runtime.errors import AdapterRefused, AdapterSourceRefused, LoramuxError
from lora_runtime.text.text_files import GENERATION_FILE, TEMPLATE_FILE

LOADS_S = 1.5

pytestmark = pytest.mark.usefixtures("settles_as_in_a_server")


def write_version(folder: Path, version: int, *, pause: Callable[[], None] = lambda: None) -> None:
    """An adapter whose every file says which version it is of."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        CONFIG_FILE: {"r": version, "init_lora_weights": "pissa"},
        PARITY_FILE: {"version": version},
        GENERATION_FILE: {"eos_token_id": version},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
        pause()
    (folder / TEMPLATE_FILE).write_text(str(version))
    pause()
    start = folder / "pissa_init"
    start.mkdir(exist_ok=True)
    for place in (folder, start):
        save_file({"a": torch.full((2, 2), float(version))}, place / TENSORS_FILE)
        pause()
    (start / CONFIG_FILE).write_text(json.dumps({"r": version}))


def versions(content: FolderContent) -> set[int]:
    assert content.parity_record is not None
    return {
        content.adapter.config["r"],
        int(content.adapter.tensors["a"][0, 0]),
        json.loads(content.parity_record)["version"],
        json.loads(content.text[GENERATION_FILE])["eos_token_id"],
        int(content.text[TEMPLATE_FILE]),
        content.initial["pissa_init"].config["r"],
        int(content.initial["pissa_init"].tensors["a"][0, 0]),
    }


def by_renames(top: Path, number: int) -> None:
    """The whole folder is replaced by another: two renames, between which there is none."""
    fresh = top / f"fresh{number}"
    write_version(fresh, number)
    time.sleep(0.02)
    os.rename(top / "adapter", top / f"old{number}")
    os.rename(fresh, top / "adapter")
    shutil.rmtree(top / f"old{number - 20}", ignore_errors=True)


def by_a_link(top: Path, number: int) -> None:
    """The folder is a link that is pointed to another, at once."""
    write_version(top / f"v{number}", number)
    (top / "link").symlink_to(top / f"v{number}")
    if not (top / "adapter").is_symlink():
        shutil.rmtree(top / "adapter")
    os.replace(top / "link", top / "adapter")
    time.sleep(0.02)


class InPlace:
    """File by file, `pause_s` after each; then it rests, if it does."""

    def __init__(self, pause_s: float, rest_s: float) -> None:
        self.pause_s, self.rest_s = pause_s, rest_s
        self._longest_s = 0.0
        self._moved_at: float | None = None

    @property
    def longest_pause_s(self) -> float:
        """Also of the pause that lasts, and not of a rest: on a busy machine the writer waits long
        for its turn.
        """
        moved_at = self._moved_at
        lasting = 0.0 if moved_at is None else time.monotonic() - moved_at
        return max(self._longest_s, lasting)

    def __call__(self, top: Path, number: int) -> None:
        self._moved_at = time.monotonic()

        def pause() -> None:
            time.sleep(self.pause_s)
            self._longest_s = self.longest_pause_s
            self._moved_at = time.monotonic()

        write_version(top / "adapter", number, pause=pause)
        self._longest_s = self.longest_pause_s
        self._moved_at = None
        time.sleep(self.rest_s)


slower_than_reads = InPlace(pause_s=0.004, rest_s=0.3)
without_rest = InPlace(pause_s=0, rest_s=0)


@contextmanager
def writing(top: Path, write: Callable[[Path, int], None]) -> Iterator[None]:
    stop = threading.Event()

    def work() -> None:
        number = 1
        while not stop.is_set():
            number += 1
            write(top, number)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def loads_while(write: Callable[[Path, int], None], top: Path) -> Counter[str]:
    """How many loads were of one version and how many were refused; there are no others."""
    write_version(top / "adapter", 1)
    seen: Counter[str] = Counter()
    with writing(top, write):
        end = time.monotonic() + LOADS_S
        while time.monotonic() < end:
            try:
                found = versions(read_folder(top / "adapter"))
            except LoramuxError:
                seen["refused"] += 1
                continue
            if len(found) > 1 and isinstance(write, InPlace):
                # Who rests so long between two files cannot be told from one who has finished.
                assert write.longest_pause_s >= SETTLE_S, found
                continue
            assert len(found) == 1, found
            seen["whole"] += 1
    return seen


@pytest.mark.parametrize("write", [by_renames, by_a_link, slower_than_reads, without_rest])
def test_a_load_is_of_one_version_or_refused(
    write: Callable[[Path, int], None], tmp_path: Path
) -> None:
    """One way after the other: a writer that waits long for its turn looks as if it had ended."""
    seen = loads_while(write, tmp_path)
    assert write is without_rest or seen["whole"] > 5, seen


def test_a_folder_at_rest_is_read_without_waiting(tmp_path: Path) -> None:
    write_version(tmp_path / "adapter", 1)
    read_folder(tmp_path / "adapter")
    time.sleep(0.15)
    begun = time.monotonic()
    read_folder(tmp_path / "adapter")
    assert time.monotonic() - begun < 0.05


def hub_cache(top: Path) -> Path:
    """A folder as huggingface_hub keeps it: links into a store of contents."""
    write_version(top / "plain", 7)
    blobs, snapshot = top / "models--a--b" / "blobs", top / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    for path in sorted((top / "plain").rglob("*")):
        if path.is_file():
            name = path.relative_to(top / "plain")
            blob = blobs / str(name).replace("/", "-")
            shutil.copy(path, blob)
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_links_of_a_hub_cache_are_read(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    for roots in ((), (tmp_path,), (tmp_path / "models--a--b",)):
        assert versions(read_folder(snapshot, FolderRules(roots=roots))) == {7}
    inner = snapshot / "pissa_init"
    assert read_folder(inner).adapter.config["r"] == 7
    (tmp_path / "current").symlink_to(snapshot)
    assert versions(read_folder(tmp_path / "current", FolderRules(roots=(tmp_path,)))) == {7}


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE, PARITY_FILE, TEMPLATE_FILE])
def test_links_out_of_the_roots_are_refused_by_name(name: str, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    with pytest.raises(AdapterSourceRefused, match="link that leads out") as refusal:
        read_folder(snapshot, FolderRules(roots=(snapshot.parent,)))
    assert str(tmp_path) not in refusal.value.message
    write_version(tmp_path / "root" / "x", 1)
    (tmp_path / "root" / "x" / name).unlink()
    for target in (tmp_path / "plain" / name, f"../../plain/{name}", "chain"):
        (tmp_path / "root" / "x" / "chain").unlink(missing_ok=True)
        (tmp_path / "root" / "x" / "chain").symlink_to(tmp_path / "plain" / name)
        (tmp_path / "root" / "x" / name).symlink_to(target)
        with pytest.raises(AdapterSourceRefused, match="link that leads out") as refusal:
            read_folder(tmp_path / "root" / "x", FolderRules(roots=(tmp_path / "root",)))
        assert refusal.value.field == name
        (tmp_path / "root" / "x" / name).unlink()


def test_a_folder_outside_of_the_roots_is_not_opened(tmp_path: Path) -> None:
    write_version(tmp_path / "outside", 1)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "x").symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterSourceRefused):
        read_folder(tmp_path / "root" / "x", FolderRules(roots=(tmp_path / "root",)))


def test_another_digest_is_refused(tmp_path: Path) -> None:
    write_version(tmp_path / "x", 1)
    with pytest.raises(AdapterRefused, match="not those that were stored"):
        read_folder(tmp_path / "x", FolderRules(sha256="0" * 64))
