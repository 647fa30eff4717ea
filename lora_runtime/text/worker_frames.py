"""The child's side of `worker_processes.py`: frames of JSON, and the limits of a process.

Memory, processor time, files and open descriptors are limited, so that no foreign text can take
more, whatever it makes the process do.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LENGTH_BYTES = 4
"""Bytes of a frame's length, before it."""
Answer = Callable[[Mapping[str, Any]], dict[str, Any]]


def limit_process(extra_bytes: int, written_bytes: int = 0) -> None:
    """Limit what this process may take beyond the memory it has, and write to any one file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (written_bytes, written_bytes))
    if sys.platform == "linux":  # elsewhere the kernel does not count this
        data = next(
            int(line.split()[1]) << 10
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmData")
        )
        resource.setrlimit(resource.RLIMIT_DATA, (data + extra_bytes,) * 2)


def _allow_time(seconds: int) -> None:
    """Let the kernel end the process when the next piece of work takes longer on a processor."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _receive() -> dict[str, Any] | None:
    header = sys.stdin.buffer.read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    request: dict[str, Any] = json.loads(sys.stdin.buffer.read(int.from_bytes(header, "little")))
    return request


def answer_frames(answer: Answer, seconds: int) -> None:
    """Answer until the sender goes away, each request within processor time of `seconds`.

    What the work prints goes nowhere.
    """
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    while (request := _receive()) is not None:
        _allow_time(seconds)
        content = json.dumps(answer(request)).encode()
        output.write(len(content).to_bytes(LENGTH_BYTES, "little") + content)
        output.flush()
