"""What `loramux doctor` says about the GPU path, on machines that lack one thing each."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from lora_runtime.kernels.cuda import product as cuda_product
from lora_runtime.kernels.gpu_needs import gpu_needs

GIB = 1 << 30


class Machine:
    """A machine with everything: one H100, driver for CUDA 13.0, torch for 13.0, gcc, headers."""

    def __init__(self, monkeypatch, tmp_path: Path) -> None:
        self.monkeypatch = monkeypatch
        self.set_cuda(built_for="13.0", driver=13000, capability=(9, 0), free=70 * GIB)
        (tmp_path / "libcuda.so.1").touch()
        monkeypatch.setattr(cuda_product, "nvrtc_version", lambda: (13, 0))
        monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
        for name in ("CC", "LD_LIBRARY_PATH"):
            monkeypatch.delenv(name, raising=False)

    def set_cuda(self, *, built_for="13.0", driver=13000, capability=(9, 0), free=70 * GIB, gpus=1):
        set_to = self.monkeypatch.setattr
        set_to(torch.version, "cuda", built_for)
        set_to(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        set_to(torch.cuda, "is_available", lambda: gpus > 0)
        set_to(torch.cuda, "device_count", lambda: gpus)
        set_to(torch.cuda, "get_device_capability", lambda index: capability)
        set_to(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        set_to(torch.cuda, "mem_get_info", lambda index: (free, 80 * GIB))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def missing() -> dict[str, str]:
    """Name → what was found and what to change, of all that is not well."""
    return {n.name: f"{n.found}. {n.advice}" for n in gpu_needs() if n.advice is not None}


def test_a_machine_with_everything_needs_nothing(machine):
    assert missing() == {}
    found = {need.name: need.found for need in gpu_needs()}
    assert found["CUDA"] == "torch is built for CUDA 13.0; the driver supports up to 13.0"
    assert found["cuda:0"] == "GPU 0, compute capability 9.0"
    assert found["cuda:0 memory"] == "75.2 GB free of 85.9 GB"
    assert found["C launcher"] == "compiles"


@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        (dict(built_for=None, gpus=0), ["built without CUDA", "Install torch's CUDA build"]),
        (dict(driver=0, gpus=0), ["no NVIDIA driver answers", "docker run --gpus all"]),
        (dict(driver=12040, gpus=0), ["up to 12.4", "driver to one of CUDA 13.0", "for CUDA 12"]),
        (dict(driver=13020, gpus=0), ["sees no GPU", "CUDA_VISIBLE_DEVICES"]),
    ],
)
def test_a_driver_that_does_not_fit_torch(machine, cuda, said):
    machine.set_cuda(**cuda)
    assert list(missing()) == ["CUDA"] and all(part in missing()["CUDA"] for part in said)


@pytest.mark.parametrize(("built_for", "driver"), [("12.8", 13000), ("12.8", 12040)])
def test_a_driver_runs_older_majors_and_minors_of_its_own(machine, built_for, driver):
    machine.set_cuda(built_for=built_for, driver=driver)
    assert missing() == {}


def test_each_gpu_is_looked_at(machine):
    machine.set_cuda(capability=(7, 5), free=GIB, gpus=2)
    expected = {"cuda:0", "cuda:0 memory", "cuda:1", "cuda:1 memory"}
    assert set(missing()) == expected
    assert "7.5" in missing()["cuda:1"] and "8.0 (Ampere)" in missing()["cuda:1"]
    assert "1.1 GB free of 85.9 GB" in missing()["cuda:0 memory"]


def test_no_triton(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert list(missing()) == ["triton"]
    assert "pip install 'loramux[gpu]'" in missing()["triton"]


def test_no_nvrtc(machine, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "pip install 'loramux[gpu]'" in missing()["NVRTC"]


def test_no_compiler(machine, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert list(missing()) == ["C compiler"]
    assert "apt-get install gcc libc6-dev" in missing()["C compiler"]


def test_clang_will_do_and_cc_comes_first(machine, monkeypatch, tmp_path):
    compiler = shutil.which("gcc")
    assert compiler, "the tests of the C extension need a compiler too"
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    (tmp_path / "clang").write_text(
        f'#!{shutil.which("sh", path="/bin")}\nPATH=/bin:/usr/bin\nexec {compiler} "$@"\n'
    )
    (tmp_path / "clang").chmod(0o755)
    assert missing() == {}
    monkeypatch.setenv("CC", "icx")
    assert list(missing()) == ["C compiler"] and "CC is 'icx'" in missing()["C compiler"]


def test_a_compiler_without_its_headers(machine, monkeypatch, tmp_path):
    """As in an image that has gcc alone."""
    (tmp_path / "gcc").write_text("#!/bin/sh\necho 'stdlib.h: No such file' >&2\nexit 1\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(missing()) == ["C launcher"]
    assert "stdlib.h: No such file" in missing()["C launcher"]
    assert "libc6-dev" in missing()["C launcher"]


def test_no_headers_of_python(machine, monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path / "none")})
    assert list(missing()) == ["Python headers"]
    assert "python3-dev" in missing()["Python headers"]


def test_no_library_of_the_driver(machine, monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_LIBCUDA_PATH")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert list(missing()) == ["libcuda"] and "ldconfig" in missing()["libcuda"]
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert missing() == {}


def test_a_gpu_that_takes_no_further_process(machine, monkeypatch):
    def full(index):
        raise torch.OutOfMemoryError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    (said,) = missing().values()
    assert "out of memory. Other processes hold all of it" in said
