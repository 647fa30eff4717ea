"""Keeps on disk which content every adapter name holds, so that a restarted server has the names.

Each base has one SQLite database in the server's state folder. A change is one row in one
transaction and is flushed to the disk before the call is answered: a process that is killed leaves
the state before the change or after it. Only one server at a time may use a database.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from lora_runtime.engine.client import LoadedAdapter
from lora_runtime.errors import ConfigError, Overloaded

VERSION = 2
"""Version of the table; one of version 1 gets what it lacks, one of another version is refused."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS names (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL, text_sha256 TEXT NOT NULL, source TEXT NOT NULL,
    former_digest TEXT, former_text_sha256 TEXT, former_source TEXT,
    is_pinned INTEGER NOT NULL DEFAULT 0
)
"""
SINCE_VERSION_1 = "ALTER TABLE names ADD COLUMN is_pinned INTEGER NOT NULL DEFAULT 0"


@dataclass(frozen=True, slots=True)
class Content:
    """One content of an adapter, and where it can be read again."""

    digest: str
    """The adapter's digest: over its settings and tensors."""
    text_sha256: str
    """Over its own text files, which the digest does not cover; "" where its text is the base's."""
    source: str
    """The source as the caller wrote it; for an upload, its name in the store."""

    @classmethod
    def of(cls, loaded: LoadedAdapter, source: str) -> Content:
        """The content that was loaded from `source`."""
        return cls(loaded.digest, loaded.facts.text_sha256, source)

    def is_of(self, loaded: LoadedAdapter) -> bool:
        """Tell whether `loaded` is this content."""
        return self == Content.of(loaded, self.source)


@dataclass(frozen=True, slots=True)
class KeptName:
    """A name, what it holds, and what it held before."""

    name: str
    content: Content
    former: Content | None
    is_pinned: bool = False
    """What it holds keeps its place in the device pool."""


@contextmanager
def claimed(folder: Path, base: str) -> Iterator[None]:
    """Keep other servers of that base out of a folder while the context lasts.

    The lock ends with the process, however that ends. The database is locked too, but its name
    holds the base's fingerprint, which is known only when the base has been loaded.

    Raises ConfigError (field `adapter_store`): the folder cannot be used, or is used already.
    """
    path = folder / f"serving-{hashlib.sha256(base.encode()).hexdigest()[:16]}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _refused(f"{folder} cannot be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _in_use(folder) from None
        yield
    finally:
        os.close(lock)


class NameStore:
    """The names of one server. Every method blocks on the disk; one thread at a time."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Open or begin the database of the base with that fingerprint.

        Raises ConfigError (field `adapter_store`): it cannot be made, is in use, or is damaged.
        """
        path = folder / f"names-{fingerprint[:16]}.sqlite3"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = _opened(path)
        except OSError as error:
            raise _refused(f"{folder} cannot be used: {error.strerror}") from None
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise _in_use(path) from None
            raise _refused(f"{path} fails: {error}") from None
        except sqlite3.DatabaseError as error:
            raise _refused(f"{path} is damaged ({error}); move it away to begin anew") from None

    def all(self) -> list[KeptName]:
        """Return every name."""
        rows = self._database.execute("SELECT * FROM names ORDER BY name")
        kept = []
        for name, *content, is_pinned in rows:
            former = None if content[3] is None else Content(*content[3:])
            kept.append(KeptName(name, Content(*content[:3]), former, bool(is_pinned)))
        return kept

    def put(self, kept: KeptName) -> None:
        """Keep a name with what it holds now. Raises Overloaded when the disk is full."""
        former = (None, None, None) if kept.former is None else astuple(kept.former)
        self._write(
            "INSERT OR REPLACE INTO names VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (kept.name, *astuple(kept.content), *former, kept.is_pinned),
        )

    def delete(self, name: str) -> None:
        """Forget a name. Raises Overloaded when the disk is full."""
        self._write("DELETE FROM names WHERE name = ?", (name,))

    def close(self) -> None:
        """Close the database; another server may open it now."""
        self._database.close()

    def _write(self, statement: str, values: tuple[str | bool | None, ...]) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise Overloaded(
                f"the name cannot be kept on this server's disk ({error}); try again later"
            ) from error


def _opened(path: Path) -> sqlite3.Connection:
    """Open or begin the database, for this process alone; every statement is a transaction."""
    # Nobody else may have it open, so waiting for a lock (`timeout`) has no use.
    database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
            database.execute(f"PRAGMA {pragma}").fetchall()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, 1, VERSION):
            raise sqlite3.DatabaseError(f"version {version}, not {VERSION}")
        database.execute("BEGIN EXCLUSIVE")
        database.execute(SINCE_VERSION_1 if version == 1 else SCHEMA)
        database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("COMMIT")
    except BaseException:
        database.close()
        raise
    return database


def _in_use(path: Path) -> ConfigError:
    return _refused(
        f"{path} is in use by another server; give each server a folder of its own with "
        "--adapter-store"
    )


def _refused(why: str) -> ConfigError:
    return ConfigError(f"adapter_store: {why}", field="adapter_store")
