"""The compiler's two hooks, as Triton itself calls them when it compiles a kernel for a card; and
our own calls of NVRTC."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import triton
from triton import knobs

from lora_runtime.kernels import compiling
from lora_runtime.kernels.compiling import is_compiling, watch_compiles
from lora_runtime.kernels.cuda import product as cuda_product


class Compiled(triton.runtime.JITFunction):
    """What Triton does around its compiler, with one that notes what the watcher says meanwhile."""

    def __init__(self, fails: bool = False) -> None:
        self.seen: list[bool] = []
        self.fails = fails
        self.device_caches = {0: ({}, None, None, None, None)}
        self.ASTSource = lambda *_: None

    def _call_hook(self, hook, *_: object) -> object:
        return None if hook is None else hook(key="", fn=self, already_compiled=False)

    def compile(self, *_: object, **__: object) -> str:
        self.seen.append(is_compiling())
        if self.fails:
            raise RuntimeError("does not compile")
        return "kernel"

    def run_compiler(self) -> object:
        class Options:
            """Nothing but a __dict__."""

        return self._do_compile("key", {}, 0, {}, Options(), None, False)


@pytest.fixture(autouse=True)
def hooks():
    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = knobs.runtime.jit_post_compile_hook = None
        yield
    compiling._end()


def test_a_compile_is_seen_while_it_runs_and_goes_on():
    watch_compiles()
    kernel = Compiled()
    assert not is_compiling()
    assert kernel.run_compiler() == "kernel" and kernel.seen == [True]
    assert not is_compiling()


def test_one_that_fails_or_hangs_does_not_count_for_ever(monkeypatch):
    watch_compiles()
    with pytest.raises(RuntimeError):
        Compiled(fails=True).run_compiler()
    monkeypatch.setattr(compiling, "MAX_COMPILE_S", 0.0)
    assert not is_compiling()


def test_others_hooks_stay():
    def other(**_: object) -> None: ...

    knobs.runtime.jit_cache_hook = other
    watch_compiles()
    assert knobs.runtime.jit_cache_hook is other and knobs.runtime.jit_post_compile_hook is None


@pytest.mark.parametrize("status", [0, 6])
def test_nvrtc_is_seen_while_it_compiles_the_cuda_source(monkeypatch, status):
    seen, good = [], SimpleNamespace(value=0)

    def compile_program(*_: object) -> tuple[SimpleNamespace]:
        seen.append(is_compiling())
        return (SimpleNamespace(value=status),)

    nvrtc = SimpleNamespace(
        nvrtcCreateProgram=lambda *_: (good, "program"),
        nvrtcCompileProgram=compile_program,
        nvrtcGetProgramLogSize=lambda _: (good, 1),
        nvrtcGetProgramLog=lambda *_: (good,),
        nvrtcGetCUBINSize=lambda _: (good, 1),
        nvrtcGetCUBIN=lambda *_: (good,),
    )
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=nvrtc))
    if status:
        with pytest.raises(RuntimeError, match="sm_90"):
            cuda_product.compiled.__wrapped__("sm_90", ())
    else:
        assert cuda_product.compiled.__wrapped__("sm_90", ()) == b"\0"
    assert seen == [True] and not is_compiling()
