"""A message that a chat template passes over is refused by name, and no other is."""

from __future__ import annotations

import asyncio
import time

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lora_runtime.errors import DataError, InvalidRequest
from lora_runtime.text.heard_messages import check_heard
from lora_runtime.text.own_text import read_text_side
from lora_runtime.text.text_workers import TextWorkers
from lora_runtime.text.tokenizer import Tokenizer
from tests.tiny import VOCAB_SIZE
from tests.tiny_tokenizer import write_tokenizer
from tests.tool_templates import (
    HERMES,
    LLAMA31,
    MISTRAL03,
    MISTRAL_NEMO,
    MISTRAL_SMALL32,
    QWEN3,
    QWEN3_CODER,
    QWEN25,
)

TURNS = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ X }}{% endif %}{% endfor %}"  # noqa: E501
DROPS = TURNS.replace("X", "m.content")
FAITHFUL = {
    "plain": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "upper": "{% for m in messages %}{{ m.content | upper | trim }}{% endfor %}",
    "json": "{{ messages | tojson }}",
    "cuts reasoning": "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
    "cuts the end": "{% for m in messages %}{{ m.content[:12] }}{% endfor %}",
    "system first": "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% endif %}" + DROPS,
}
CHAT = [
    {"role": "system", "content": "a"},  # as short as it is, it stands in the other texts too
    {"role": "user", "content": "a ship"},
    {"role": "assistant", "content": "<think>that is a ship</think>a sun"},
    {"role": "user", "content": "  "},
    {"role": "user", "content": "and a sun"},
]


def tokenizer_with(folder, template):
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


@pytest.mark.parametrize("name", FAITHFUL)
def test_what_is_written_in_any_form_is_heard(tmp_path, name):
    assert tokenizer_with(tmp_path, FAITHFUL[name]).apply_chat_template(CHAT)


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_message_that_the_bases_template_leaves_out_is_refused(tmp_path, role, place):
    tokenizer = tokenizer_with(tmp_path, DROPS)
    chat = [turn for turn in CHAT if turn["role"] != "system"]
    assert tokenizer.apply_chat_template(chat)
    chat.insert(place, {"role": role, "content": "a"})
    with pytest.raises(
        InvalidRequest, match=rf"messages\[{place}\] has the role '{role}'"
    ) as caught:
        tokenizer.apply_chat_template(chat)
    assert caught.value.field == "messages"
    with pytest.raises(DataError, match="leaves it out"):
        tokenizer.split_chat([*chat, {"role": "assistant", "content": "yes"}])


def test_a_message_that_an_adapters_template_leaves_out_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    workers = TextWorkers(tmp_path, VOCAB_SIZE)
    try:
        side, _ = read_text_side(
            {"chat_template.jinja": DROPS.encode()}, tmp_path, VOCAB_SIZE, tmp_path / "work"
        )
        assert asyncio.run(workers.render(side, CHAT[1:]))
        with pytest.raises(InvalidRequest, match="leaves it out"):
            asyncio.run(workers.render(side, CHAT))
    finally:
        workers.close()


CALLS_ALONE = {
    "hermes": HERMES,
    "llama3.1": LLAMA31,
    "mistral-v0.3": MISTRAL03,
    "mistral-nemo": MISTRAL_NEMO,
}
"""They write a turn's calls and leave out what it says beside them."""
CALLS_AND_TEXT = {
    "mistral-small3.2": MISTRAL_SMALL32,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "qwen3-coder": QWEN3_CODER,
}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def chat_with_a_call(said):
    """A conversation whose second turn calls a tool and may say something beside the call."""
    call = {"id": "abcdefghi", "function": {"name": "clock", "arguments": "{}"}}
    return [
        {"role": "user", "content": "when?"},
        {"role": "assistant", "content": said, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "noon"},
    ]


@pytest.mark.parametrize("name", CALLS_ALONE | CALLS_AND_TEXT)
def test_what_a_turn_says_beside_its_calls_is_written_or_refused(tmp_path, name):
    tokenizer = tokenizer_with(tmp_path, (CALLS_ALONE | CALLS_AND_TEXT)[name])
    backend = AutoTokenizer.from_pretrained(tmp_path)

    def rendered(said):
        return backend.decode(tokenizer.apply_chat_template(chat_with_a_call(said), tools=[TOOL]))

    assert "noon" in rendered("") and "clock" in rendered("")
    if name in CALLS_AND_TEXT:
        assert "I will look" in rendered("I will look")
        return
    with pytest.raises(InvalidRequest, match=r"messages\[1\] has the role 'assistant'") as caught:
        rendered("I will look")
    assert caught.value.field == "messages"


@pytest.mark.parametrize("name", CALLS_ALONE | CALLS_AND_TEXT)
def test_the_templates_of_calls_are_what_they_are_taken_for(name):
    """By transformers, without this project's check: the refusals above are no false alarms."""
    turns = chat_with_a_call("I will look")
    turns[1]["tool_calls"][0]["function"]["arguments"] = {}
    template = (CALLS_ALONE | CALLS_AND_TEXT)[name]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (text,), _ = render_jinja_template([turns], [TOOL], chat_template=template, **special)
    assert "noon" in text and ("I will look" in text) == (name in CALLS_AND_TEXT)


def test_a_conversation_of_many_messages_takes_linear_time():
    chat = [{"role": "user", "content": "a"}] * 50_000
    began = time.process_time()
    check_heard(chat, lambda messages: "".join(message["content"] for message in messages))
    assert time.process_time() - began < 2
