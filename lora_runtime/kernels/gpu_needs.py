"""Looks for each thing that the GPU path needs of a machine, without starting a kernel.

Triton compiles a small launcher in C for every kernel, on the machine that runs it. For that it
needs a C compiler, Python's headers and the driver's library.
Source: triton, `runtime/build.py` and `backends/nvidia/driver.py`.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lora_runtime.kernels.cuda import product as cuda_product
from lora_runtime.kernels.cuda.product import OLDEST_CAPABILITY

LEAST_FREE_BYTES = 4 << 30
"""Free memory below which hardly any base, its cache and adapters have room together."""

DEBIAN_COMPILER = "apt-get install gcc libc6-dev"
WHY_A_COMPILER = "Triton compiles a launcher in C for each kernel."


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One thing that is needed: what was found, and what to change; None if nothing is."""

    name: str
    found: str
    advice: str | None = None


def gpu_needs() -> Iterator[Need]:
    """Yield all needs in the order in which to meet them; also on a machine without a GPU."""
    yield _cuda()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _capability(index)
            yield _memory(index)
    yield _triton()
    yield _nvrtc()
    yield from _compiler()
    yield _driver_library()


def _cuda() -> Need:
    """The driver's CUDA version and torch's: a driver runs builds for its own major version or for
    older ones.
    """
    name, built_for = "CUDA", torch.version.cuda
    if built_for is None:
        return Need(
            name=name,
            found=f"torch {torch.__version__} is built without CUDA",
            advice="Install torch's CUDA build: PyPI's on Linux, not that of the index /whl/cpu.",
        )
    driver = _driver_version()
    if driver is None:
        return Need(
            name=name,
            found=f"torch is built for CUDA {built_for}; no NVIDIA driver answers",
            advice="Install NVIDIA's driver; in a container, start it with access to the GPUs "
            "(docker run --gpus all, with NVIDIA's container toolkit on the host).",
        )
    found = f"torch is built for CUDA {built_for}; the driver supports up to {_dotted(driver)}"
    if driver[0] < int(built_for.partition(".")[0]):
        return Need(
            name=name,
            found=found,
            advice=f"Update the driver to one of CUDA {built_for}, or install a build of torch for "
            f"CUDA {driver[0]}.",
        )
    if not torch.cuda.is_available():
        return Need(
            name=name,
            found=f"{found}; torch sees no GPU",
            advice="Look at nvidia-smi, and at CUDA_VISIBLE_DEVICES, which may hide all GPUs.",
        )
    return Need(name=name, found=found)


def _driver_version() -> tuple[int, int] | None:
    """(major, minor) of the CUDA that the driver supports, None without a driver."""
    try:
        code: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return None
    return (code // 1000, code % 1000 // 10) if code > 0 else None


def _capability(index: int) -> Need:
    capability = torch.cuda.get_device_capability(index)
    found = f"{torch.cuda.get_device_name(index)}, compute capability {_dotted(capability)}"
    advice = None
    if capability < OLDEST_CAPABILITY:
        advice = (
            f"The kernels are written for {_dotted(OLDEST_CAPABILITY)} (Ampere) and newer; older "
            "ones compute in float32, untried. Use device: cpu or another GPU."
        )
    return Need(name=f"cuda:{index}", found=found, advice=advice)


def _memory(index: int) -> Need:
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # a full or exclusive GPU takes no further process
        return Need(
            name=f"cuda:{index} memory",
            found=f"cannot be asked: {str(error).splitlines()[0]}",
            advice="Other processes hold all of it, or it is set to serve one process alone "
            "(nvidia-smi shows which). Stop them.",
        )
    advice = None
    if free < LEAST_FREE_BYTES:
        advice = (
            "Other processes hold its memory (nvidia-smi shows which), or it is a small GPU. Stop "
            "them, or choose a small base and a small adapter_pool_bytes."
        )
    found = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
    return Need(name=f"cuda:{index} memory", found=found, advice=advice)


def _triton() -> Need:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return Need(
            name="triton",
            found=f"cannot be imported: {error}",
            advice="Install it: pip install 'loramux[gpu]'. Without it a GPU runs torch's own, "
            "much slower operations.",
        )
    try:
        return Need(name="triton", found=version("triton"))
    except PackageNotFoundError:
        return Need(name="triton", found="installed; its version is unknown")


def _nvrtc() -> Need:
    try:
        number = cuda_product.nvrtc_version()
    except (ImportError, OSError, RuntimeError) as error:
        return Need(
            name="NVRTC",
            found=f"cannot be used: {error}",
            advice="torch's CUDA builds bring it, with the package cuda-bindings: install those of "
            "one CUDA version (pip install 'loramux[gpu]'). Without it 4-bit products run in "
            "Triton, up to three times slower.",
        )
    return Need(name="NVRTC", found=_dotted(number))


def _compiler() -> Iterator[Need]:
    """The compiler that Triton chooses ($CC, else gcc, else clang), Python's headers, and whether a
    library can be built with both.
    """
    wanted = os.environ.get("CC")
    compiler = shutil.which(wanted) if wanted else shutil.which("gcc") or shutil.which("clang")
    missing = f"CC is {wanted!r}, which is no command here" if wanted else "no gcc and no clang"
    yield Need(
        name="C compiler",
        found=compiler or missing,
        advice=None if compiler else f"Install one (Debian: {DEBIAN_COMPILER}). {WHY_A_COMPILER}",
    )
    header = _python_headers() / "Python.h"
    yield Need(
        name="Python headers",
        found=str(header) if header.is_file() else f"{header} is not there",
        advice=None
        if header.is_file()
        else f"Install them (Debian: apt-get install python3-dev). {WHY_A_COMPILER}",
    )
    if compiler and header.is_file():
        yield _compilation(compiler)


def _compilation(compiler: str) -> Need:
    with tempfile.TemporaryDirectory(prefix="loramux-") as folder:
        source = Path(folder) / "launcher.c"
        source.write_text("#include <Python.h>\nint nothing(void) { return 0; }\n")
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{_python_headers()}"]
        command += ["-o", f"{folder}/launcher.so"]
        outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode == 0:
        return Need(name="C launcher", found="compiles")
    said = (outcome.stderr.strip() or "no message").splitlines()[0]
    return Need(
        name="C launcher",
        found=f"does not compile: {said}",
        advice=f"Complete the compiler (Debian: {DEBIAN_COMPILER}). {WHY_A_COMPILER}",
    )


def _python_headers() -> Path:
    """Where Triton looks for Python's headers: Debian's scheme for local packages has none."""
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    return Path(paths["include"])


def _driver_library() -> Need:
    """The driver's libcuda.so.1, in the places where Triton looks for it."""
    folders = [
        os.environ.get("TRITON_LIBCUDA_PATH"),
        *os.environ.get("LD_LIBRARY_PATH", "").split(":"),
    ]
    files = [Path(folder) / "libcuda.so.1" for folder in folders if folder]
    found = next((str(f) for f in files if f.is_file()), None) or ctypes.util.find_library("cuda")
    if found:
        return Need(name="libcuda", found=found)
    return Need(
        name="libcuda",
        found="libcuda.so.1 is not among the linker's libraries",
        advice="It comes with NVIDIA's driver; if it is there, run ldconfig or set "
        "TRITON_LIBCUDA_PATH to its folder.",
    )


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"
