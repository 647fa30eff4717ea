"""An adapter's own chat template is found; tokens that the base does not have are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_runtime.adapters.files import companions
from lora_runtime.adapters.files.file_names import TEXT_FILES
from lora_runtime.adapters.files.folder import read_optional
from lora_runtime.errors import AdapterRefused, AdapterSourceRefused
from tests.tiny_tokenizer import VOCAB_SIZE, write_tokenizer

TEMPLATE = "{{ messages[0]['content'] }}!"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A folder with the base's own tokenizer beside the adapter, as trainers save it."""
    return Path(shutil.copytree(base, tmp_path / "adapter"))


def own_chat_template(folder: Path, base: Path, vocab_size: int) -> str | None:
    found = {name: read_optional(folder, name, limit) for name, limit in TEXT_FILES.items()}
    text = {name: content for name, content in found.items() if content is not None}
    return companions.own_chat_template(text, base, vocab_size)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_bases_own_tokenizer_is_no_difference(base: Path, adapter: Path) -> None:
    assert own_chat_template(adapter, base, VOCAB_SIZE) is None
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(adapter)
    assert own_chat_template(adapter, base, VOCAB_SIZE) is None


def test_a_folder_without_a_tokenizer(base: Path, tmp_path: Path) -> None:
    assert own_chat_template(tmp_path, base, VOCAB_SIZE) is None
    assert own_chat_template(tmp_path, Path("no such folder"), VOCAB_SIZE) is None


def test_a_template_file_is_found(base: Path, adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    assert own_chat_template(adapter, base, VOCAB_SIZE) == TEMPLATE


@pytest.mark.parametrize(
    "value",
    [TEMPLATE, [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]],
)
def test_a_template_in_the_settings_is_found(value: object, base: Path, adapter: Path) -> None:
    """transformers 4 kept it there, one or several by name."""
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    edit(adapter / "tokenizer_config.json", chat_template=value)
    assert own_chat_template(adapter, base, VOCAB_SIZE) == TEMPLATE


def test_added_tokens_are_refused_by_name(base: Path, adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|thought|>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(AdapterRefused, match=r"<\|thought\|>") as refusal:
        own_chat_template(adapter, base, VOCAB_SIZE)
    assert refusal.value.field in ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<|new|>": 7}),
        ("added_tokens.json", {"<|im_end|>": 300}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<|new|>"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 5, "content": "<|new|>"}]}),
        ("tokenizer.json", {"model": {"vocab": {"<|new|>": 299}}}),
        ("tokenizer.json", {"model": {"vocab": [["<|new|>", -1.0]]}}),
    ],
)
def test_every_file_is_looked_at(name: str, content: dict, base: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(AdapterRefused) as refusal:
        own_chat_template(tmp_path, base, VOCAB_SIZE)
    assert refusal.value.field == name


def test_without_the_bases_tokenizer_ids_beyond_it_are_refused(tmp_path: Path) -> None:
    folder = Path("no such folder")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|new|>": VOCAB_SIZE - 1}))
    assert own_chat_template(tmp_path, folder, VOCAB_SIZE) is None
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|new|>": VOCAB_SIZE}))
    with pytest.raises(AdapterRefused, match="<|new|>"):
        own_chat_template(tmp_path, folder, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"[]"),
        ("tokenizer.json", b'{"a": 1, "a": 2}'),
        ("added_tokens.json", b"\xff"),
        ("chat_template.jinja", b"\xff\xfe"),
        ("chat_template.jinja", b"x" * (1 << 20) + b"x"),
    ],
)
def test_hostile_files_are_refused(name: str, content: bytes, base: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterRefused) as refusal:
        own_chat_template(tmp_path, base, VOCAB_SIZE)
    assert refusal.value.field == name


def test_links_are_refused(base: Path, tmp_path: Path) -> None:
    os.symlink("/etc/passwd", tmp_path / "chat_template.jinja")
    with pytest.raises(AdapterSourceRefused):
        own_chat_template(tmp_path, base, VOCAB_SIZE)
