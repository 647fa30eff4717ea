"""Names on disk: whole after a kill at any moment, and one server's at a time."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_runtime.errors import ConfigError, Overloaded
from loramux.server.adapters.names import Content, KeptName, NameStore

REPO = Path(__file__).parents[2]
FINGERPRINT = "f" * 64

CHILD = """
import sys
from pathlib import Path
from tests.server.test_names import changes
from loramux.server.adapters.names import NameStore
store = NameStore(Path(sys.argv[1]), "f" * 64)
for index, change in enumerate(changes(int(sys.argv[2]))):
    change(store)
    print(index + 1, flush=True)
"""


def content(mark: object) -> Content:
    return Content(f"digest {mark}", f"text {mark}", f"source {mark}")


def changes(seed: int, count: int = 100_000):
    """Random puts and deletes, the same for the same seed; each acts on a store or on a dict."""
    rng = random.Random(seed)
    for index in range(count):
        name = rng.choice("abc")
        former = content(index - 1) if rng.random() < 0.5 else None
        kept = KeptName(name, content(index), former)
        is_put = rng.random() < 0.7

        def change(store, name=name, kept=kept, is_put=is_put) -> None:
            if isinstance(store, NameStore):
                store.put(kept) if is_put else store.delete(name)
            elif is_put:
                store[name] = kept
            else:
                store.pop(name, None)

        yield change


def state_after(seed: int, count: int) -> list[KeptName]:
    state: dict[str, KeptName] = {}
    for change, _ in zip(changes(seed), range(count), strict=False):
        change(state)
    return [state[name] for name in sorted(state)]


def test_what_was_put_is_there_after_opening_again(tmp_path):
    for part in range(3):
        store = NameStore(tmp_path, FINGERPRINT)
        assert store.all() == state_after(7, 20 * part)
        for change in list(changes(7, 60))[20 * part : 20 * part + 20]:
            change(store)
        store.close()


@pytest.mark.parametrize("seed", range(6))
def test_kill_9_leaves_the_state_before_a_change_or_after_it(tmp_path, seed):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), str(seed)],
        cwd=REPO, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "1\n"
    time.sleep(random.Random(seed).uniform(0, 0.1))
    child.kill()
    num_answered = max([1, *map(int, child.stdout.read().split())])
    child.stdout.close()
    child.wait()
    store = NameStore(tmp_path, FINGERPRINT)
    found = store.all()
    store.close()
    assert found in (state_after(seed, num_answered), state_after(seed, num_answered + 1))


def test_every_base_has_names_of_its_own(tmp_path):
    store, other = NameStore(tmp_path, "a" * 64), NameStore(tmp_path, "b" * 64)
    store.put(KeptName("x", content(1), None))
    assert other.all() == []
    store.close()
    other.close()


def test_a_second_server_is_refused_and_the_first_goes_on(tmp_path):
    store = NameStore(tmp_path, FINGERPRINT)
    with pytest.raises(ConfigError, match="in use by another server") as caught:
        NameStore(tmp_path, FINGERPRINT)
    assert caught.value.field == "adapter_store"
    store.put(KeptName("x", content(1), None))
    store.close()
    again = NameStore(tmp_path, FINGERPRINT)
    assert [kept.name for kept in again.all()] == ["x"]
    again.close()


@pytest.mark.parametrize("damage", ["garbage", "later version", "a file in the way"])
def test_what_cannot_be_used_is_named(tmp_path, damage):
    folder = tmp_path / "store"
    if damage == "a file in the way":
        folder.write_text("")
    else:
        NameStore(folder, FINGERPRINT).close()
        (file,) = folder.glob("*.sqlite3")
        if damage == "garbage":
            file.write_bytes(b"no database" * 1000)
        else:
            database = sqlite3.connect(file)
            database.execute("PRAGMA user_version = 99")
            database.close()
    with pytest.raises(ConfigError) as caught:
        NameStore(folder, FINGERPRINT)
    assert caught.value.field == "adapter_store"


def test_a_full_disk_is_an_overload_that_changes_nothing(tmp_path):
    store = NameStore(tmp_path, FINGERPRINT)
    store.put(KeptName("x", content(1), None))
    (pages,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    big = Content("d" * 100_000, "", "")
    with pytest.raises(Overloaded, match="disk"):
        store.put(KeptName("x", big, None))
    assert store.all() == [KeptName("x", content(1), None)]
    store.put(KeptName("x", content(2), None))
    store.close()
