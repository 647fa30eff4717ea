"""Triton kernels run through Triton's interpreter where there is no GPU.

Triton reads the variable when it is imported, which bitsandbytes does. pytest-xdist's first process
imports this file before it starts the others, so peft, which takes seconds, is imported where used.
"""

from __future__ import annotations

import gc
import os
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lora_runtime.adapters.files import open_folder

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("suite", deadline=None)  # on a busy machine every example takes longer
settings.load_profile("suite")

COMPILING_TIMEOUT = 900
"""Seconds that a test may take on a GPU, where kernels are compiled in the tests."""


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        for item in items:
            item.add_marker(pytest.mark.timeout(COMPILING_TIMEOUT), append=False)


def pytest_collection_finish():
    """No collection of garbage looks again through what the imports left, which is a million
    objects, and those that look through all the rest are four times as rare as Python has them.
    """
    gc.collect()
    gc.freeze()
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 4 * old)


@pytest.fixture(scope="session", autouse=True)
def short_model_cards():
    """PEFT's README.md, beside every adapter: to render its template takes longer than the rest."""
    from peft import PeftModel

    def write(_: PeftModel, folder: str) -> None:
        (Path(folder) / "README.md").write_text("---\nlibrary_name: peft\n---\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "create_or_update_model_card", write)
        yield


@pytest.fixture(scope="session", autouse=True)
def settle_s():
    """Nearly every test loads what it has just written, and has written all of it: a folder counts
    as complete sooner than in a server. Yields a server's seconds.
    """
    seconds = open_folder.SETTLE_S
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_folder, "SETTLE_S", seconds / 10)
        yield seconds


@pytest.fixture
def settles_as_in_a_server(settle_s, monkeypatch):
    """For tests of folders that change while they are read."""
    monkeypatch.setattr(open_folder, "SETTLE_S", settle_s)


@pytest.fixture(autouse=True)
def seeded(request):
    """The same random numbers in any order of tests, others in every test."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
