"""Which content every adapter name holds, on disk: a restarted server gives the names back.

One SQLite database a base, in the server's state folder. A change is one row in one transaction,
flushed to the disk before it is answered: a process that is killed leaves the state before it or
after it. Only one server at a time may use a database.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.engine.client import LoadedAdapter
from lora_runtime.errors import ConfigError, Overloaded

VERSION = 1
"""Of the table; a database of another one is refused."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS names (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL, text_sha256 TEXT NOT NULL, source TEXT NOT NULL,
    former_digest TEXT, former_text_sha256 TEXT, former_source TEXT
)
"""


@dataclass(frozen=True, slots=True)
class Content:
    """One content of an adapter, and where it can be read again."""

    digest: str
    """Of its settings and tensors."""
    text_sha256: str
    """Of its own text files, which its digest does not cover; "" where its text is the base's."""
    source: str
    """As the caller wrote it; for an upload, its name in the store."""

    @classmethod
    def of(cls, loaded: LoadedAdapter, source: str) -> Content:
        """What a source gave."""
        return cls(loaded.digest, loaded.facts.text_sha256, source)

    def is_of(self, loaded: LoadedAdapter) -> bool:
        """Tell whether this is what a folder gave."""
        return self == Content.of(loaded, self.source)


@dataclass(frozen=True, slots=True)
class KeptName:
    """A name, what it holds, and what it held before."""

    name: str
    content: Content
    former: Content | None


@contextmanager
def claimed(folder: Path, base: str) -> Iterator[None]:
    """Keep other servers of that base out of a folder while the context lasts, however the process
    ends. The database does so too, but its name is known only when the base has been read.

    Raises ConfigError (field `adapter_store`): no place for it, or another server is using it.
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

        Raises ConfigError (field `adapter_store`): no place for it, in use, damaged.
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
        return [
            KeptName(row[0], Content(*row[1:4]), Content(*row[4:7]) if row[4] is not None else None)
            for row in rows
        ]

    def put(self, kept: KeptName) -> None:
        """Keep a name in place of what it was. Raises Overloaded when the disk is full."""
        former = kept.former
        values = (
            kept.name,
            *(kept.content.digest, kept.content.text_sha256, kept.content.source),
            *((former.digest, former.text_sha256, former.source) if former else (None,) * 3),
        )
        self._write("INSERT OR REPLACE INTO names VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def delete(self, name: str) -> None:
        """Forget a name. Raises Overloaded when the disk is full."""
        self._write("DELETE FROM names WHERE name = ?", (name,))

    def close(self) -> None:
        """Let another server have it."""
        self._database.close()

    def _write(self, statement: str, values: tuple[str | None, ...]) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise Overloaded(
                f"the name cannot be kept on this server's disk ({error}); try again later"
            ) from error


def _opened(path: Path) -> sqlite3.Connection:
    """Every statement is a transaction of its own."""
    database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
            database.execute(f"PRAGMA {pragma}").fetchall()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"version {version}, not {VERSION}")
        database.execute("BEGIN EXCLUSIVE")
        database.execute(SCHEMA)
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
