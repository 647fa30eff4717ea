"""Files that an operator names: settings, keys, certificates, training data."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MAX_BYTES = 16 << 20


def check_plain_file(path: Path) -> None:
    """Raise OSError, with what is wrong as its `strerror`, for what is not there or no file. A
    pipe, a device or a socket is none: whoever reads it could wait, or read, for ever.
    """
    open(path, "rb", opener=_opened).close()


def read_plain_file(path: Path) -> bytes:
    """Return what a small file holds. Raises as `check_plain_file`, and for more than MAX_BYTES."""
    with open(path, "rb", opener=_opened) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(0, f"it has more than {MAX_BYTES} bytes", str(path))
    return content


def _opened(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(0, "it is no regular file", path)
