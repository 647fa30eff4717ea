"""Bases and a tokenizer shared by the training tests; training never changes them."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from lora_runtime.base.fingerprint import fingerprint
from lora_runtime.base.loader import load_base
from lora_runtime.config import BaseConfig
from lora_runtime.text.tokenizer import Tokenizer
from tests.lora_runtime.training.tiny_runs import make_tokenizer
from tests.tiny import in_float64, tiny_base


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Threads only slow tiny models down, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def no_drawing():
    """To draw a plot takes as long as a tiny run; test_report.py does."""

    def savefig(_: Figure, path: Path, **__: object) -> None:
        path.write_bytes(b"\x89PNG")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def content_of(base):
    """The fingerprint, and a digest of every bit, of which the fingerprint rounds some away."""
    digest = hashlib.sha256()
    for name, tensor in chain(base.model.named_parameters(), base.model.named_buffers()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    for path in base.spec.linears:
        linear = base.model.get_submodule(path).linear
        assert linear._dense is None or torch.equal(linear._dense, linear.weight_values()), path
    return fingerprint(base.model, base.spec.quantization), digest.hexdigest()


@pytest.fixture(scope="session")
def contents():
    """(base, its content when it was made) of every base that tests share."""
    return []


@pytest.fixture(autouse=True)
def shared_bases_stay(contents):
    """No test of this package may change a shared base by one bit."""
    yield
    for base, before in contents:
        assert content_of(base) == before


@pytest.fixture(scope="session")
def base(contents):
    """NF4 linears, float32 compute."""
    base = tiny_base("llama")
    contents.append((base, content_of(base)))
    return base


@pytest.fixture(scope="session")
def exact_base(contents):
    """Unquantised and float64, so that equalities are not hidden by rounding."""
    base = tiny_base("llama", quantization="none", dtype=torch.float64)
    in_float64(base.model)
    contents.append((base, content_of(base)))
    return base


@pytest.fixture(scope="package")
def smollm2():
    """The embedded base, NF4 with float32 compute, and its tokenizer."""
    base = load_base(BaseConfig(dtype="float32", device="cpu"))
    return base, Tokenizer.load(base.folder)
