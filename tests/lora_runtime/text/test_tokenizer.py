"""Chat rendering stays in its sandbox, and the loss mask covers what serving would generate."""

from __future__ import annotations

import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from lora_runtime.errors import BaseRefused, DataError, InvalidRequest
from lora_runtime.text.tokenizer import Tokenizer
from tests.tiny_tokenizer import (
    BAD_TEMPLATES,
    CHATML_TEMPLATE,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    write_tokenizer,
)

IM_END = SPECIAL_TOKENS.index("<|im_end|>")
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is the captain?"},
    {"role": "assistant", "content": "The fox. 🦊"},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "A storm."},
]
REWRITES_EARLIER_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}{{ '' if loop.last or m['role'] == 'user' else '...' }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_with(folder: Path, template: str | None = CHATML_TEMPLATE) -> Tokenizer:
    write_tokenizer(folder, chat_template=template)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def test_text_round_trips(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox — 狐狸 🦊 é\n\tend"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == VOCAB_SIZE and tokenizer.has_chat_template


def test_chat_is_the_text_of_the_template(tokenizer: Tokenizer, folder: Path) -> None:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}])
    raw = AutoTokenizer.from_pretrained(folder).decode(ids)
    assert raw == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"


def test_end_tokens_come_from_tokenizer_and_configs(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 5}))
    assert Tokenizer.load(tmp_path).eos_token_ids == {IM_END, 5, 7, 9}


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseRefused, match="no usable tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_written_in_python_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BaseRefused, match="ByT5Tokenizer is written in Python"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"role": "user", "content": "x", "weight": "y"}],
        [{"role": "user", "content": "x", "name": 1}],
        [{"role": "user", "content": "x", "tool_calls": []}],
        [{"role": "user", "content": "x", "tool_call_id": "1"}],
        [{"role": "assistant", "tool_calls": [{"name": "x"}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "["}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "[]"}}]}],
        [{"role": "pirate", "content": "x"}],
        [{"role": "user", "content": 3}],
    ],
)
def test_malformed_messages_are_refused(tokenizer: Tokenizer, messages: list[dict]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.apply_chat_template(messages)
    assert caught.value.field == "messages"


@pytest.mark.parametrize("template", [None, *BAD_TEMPLATES])
def test_failing_or_escaping_template_is_refused(tmp_path: Path, template: str | None) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.field == "messages" and "the base" in caught.value.message


def test_mask_is_what_the_assistant_generates(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.split_chat(CONVERSATION)
    assert ids == tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=False)
    turns = [
        [token for token, _ in turn]
        for is_target, turn in groupby(zip(ids, mask, strict=True), key=itemgetter(1))
        if is_target
    ]
    assert [tokenizer.decode(turn) for turn in turns] == ["The fox. 🦊", "A storm."]
    assert all(turn.index(IM_END) == len(turn) - 1 for turn in turns)


def test_prompt_part_is_what_serving_sends(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.split_chat(CONVERSATION)
    first = mask.index(True)
    assert ids[:first] == tokenizer.apply_chat_template(CONVERSATION[:2])
    second = mask.index(True, mask.index(False, first))
    assert ids[:second] == tokenizer.apply_chat_template(CONVERSATION[:4])


def test_turn_without_end_token_is_learned_to_its_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    ids, mask = tokenizer.split_chat(CONVERSATION[1:3])
    learned = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
    assert tokenizer.decode(learned) == "The fox. 🦊\n"


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, REWRITES_EARLIER_TURNS)
    tokenizer.split_chat(CONVERSATION[1:3])
    with pytest.raises(DataError, match=r"messages\[2\]"):
        tokenizer.split_chat(CONVERSATION)


@pytest.mark.parametrize(
    "messages", [CONVERSATION[:2], [{"role": "user", "text": "x"}], [], CONVERSATION[2:3]]
)
def test_unusable_conversation_is_a_data_error(tokenizer: Tokenizer, messages: list[dict]) -> None:
    with pytest.raises(DataError):
        tokenizer.split_chat(messages)


def test_completion_follows_the_served_prompt_and_ends(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.split_completion("The quick brown", " fox jumps")
    prompt = tokenizer.encode("The quick brown")
    assert ids[: len(prompt)] == prompt and ids[-1] == IM_END
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert tokenizer.decode(ids[len(prompt) :]) == " fox jumps"
