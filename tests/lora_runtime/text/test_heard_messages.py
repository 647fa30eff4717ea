"""A message that a chat template passes over is refused by name, and no other is."""

from __future__ import annotations

import asyncio
import time

import pytest

from lora_runtime.errors import DataError, InvalidRequest
from lora_runtime.text.heard_messages import check_heard
from lora_runtime.text.own_text import read_text_side
from lora_runtime.text.text_workers import TextWorkers
from lora_runtime.text.tokenizer import Tokenizer
from tests.tiny import VOCAB_SIZE
from tests.tiny_tokenizer import write_tokenizer

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


def test_a_conversation_of_many_messages_takes_linear_time():
    chat = [{"role": "user", "content": "a"}] * 50_000
    began = time.process_time()
    check_heard(chat, lambda messages: "".join(message["content"] for message in messages))
    assert time.process_time() - began < 2
