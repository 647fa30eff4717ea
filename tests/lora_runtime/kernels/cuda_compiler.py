"""A compiler for CUDA, nvcc or NVRTC, where this machine has one; neither needs a GPU."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

Compile = Callable[[str, list[str], str], tuple[bytes, str]]
"""(source, options, "sm_90" for a binary or "compute_80" for PTX) → (result, ptxas's report).
Raises RuntimeError with the compiler's words."""


@cache
def find() -> Compile | None:
    """nvcc from PATH or the usual place, else NVRTC from Python's packages or the system."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is not None:
        return lambda source, options, target: _by_nvcc(nvcc, source, options, target)
    packages = Path(sysconfig.get_paths()["purelib"])
    places = [*map(str, packages.glob("nvidia/*/lib/libnvrtc.so.*")), *_system_libraries()]
    if places:
        library = ctypes.CDLL(places[0])
        return lambda source, options, target: _by_nvrtc(library, source, options, target)
    return None


def resources(report: str) -> dict[str, tuple[int, int]]:
    """(registers, bytes spilled) of each kernel in ptxas's report."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, report, re.DOTALL)
    return {
        name: (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found
    }


def _system_libraries() -> list[str]:
    name = ctypes.util.find_library("nvrtc")
    return ([name] if name else []) + [
        str(path) for path in Path("/usr/local/cuda/lib64").glob("libnvrtc.so.*")
    ]


def _by_nvcc(nvcc: str, source: str, options: list[str], target: str) -> tuple[bytes, str]:
    kind = "-cubin" if target.startswith("sm_") else "-ptx"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "source.cu")
        place.write_text(source, encoding="utf-8")
        command = [nvcc, kind, f"-arch={target}", "-Xptxas=-v", *options, "-o", "result", place]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr)
        return Path(folder, "result").read_bytes(), run.stderr


def _by_nvrtc(
    library: ctypes.CDLL, source: str, options: list[str], target: str
) -> tuple[bytes, str]:
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"source.cu", 0, None, None)
    words = [f"--gpu-architecture={target}", "--ptxas-options=-v", *options]
    array = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    status = library.nvrtcCompileProgram(program, len(words), array)
    report = _text(library, "ProgramLog", program).decode()
    if status:
        raise RuntimeError(report)
    return _text(library, "CUBIN" if target.startswith("sm_") else "PTX", program), report


def _text(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw.rstrip(b"\0") if what != "CUBIN" else buffer.raw
