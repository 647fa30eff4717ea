"""Text files that are the base's own, byte for byte, are no text side; another one makes one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_runtime.adapters.files.companions import own_text_files, text_digest
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder)
    return folder


def test_the_bases_own_files_are_no_difference(base: Path) -> None:
    text = {path.name: path.read_bytes() for path in base.iterdir()}
    assert own_text_files(text, base) == {} == own_text_files({}, base)
    assert text_digest({}) == ""


def test_one_file_that_differs_makes_all_of_them_the_adapters(base: Path) -> None:
    text = {path.name: path.read_bytes() for path in base.iterdir()}
    digests = set()
    for name in (*text, "generation_config.json"):
        own = {**text, name: text.get(name, b"{}")[:-1] + b" }"}
        assert own_text_files(own, base) == own
        digests.add(text_digest(own))
    assert len(digests) == len(text) + 1
    assert own_text_files(text, Path("no such folder")) == text
