"""Formats: what is learned of each, by the template that serving uses."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from transformers import AutoTokenizer

from lora_runtime.errors import ConfigError, DataError
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.config import Column, UnitConfig
from lora_runtime.training.data import load_dataset, load_datasets
from lora_runtime.training.data.formats import FORMATS
from tests.lora_runtime.training.tiny_runs import write_jsonl
from tests.tiny_tokenizer import CHATML_TEMPLATE, write_tokenizer

CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "the dog"},
    {"role": "user", "content": "and now?"},
    {"role": "assistant", "content": "the fox, and the ship"},
]
PIECE = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
MARKED_TEMPLATE = CHATML_TEMPLATE.replace(
    PIECE,
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}",
)


def load(tmp_path, tokenizer, rows, **options):
    return load_dataset(write_jsonl(tmp_path / "d.jsonl", rows), tokenizer, 512, **options)


def learned(tokenizer, example):
    return tokenizer.decode(example.token_ids[example.predictors + 1])


def equal_to_chat(tmp_path, tokenizer, row, messages, **options):
    found = load(tmp_path, tokenizer, [row], **options)
    return found.digest == load(tmp_path, tokenizer, [{"messages": messages}]).digest


def test_learned_tokens_are_those_that_transformers_marks(tmp_path, tokenizer):
    (example,) = load(tmp_path, tokenizer, [{"messages": CONVERSATION}]).examples
    write_tokenizer(tmp_path / "marked", chat_template=MARKED_TEMPLATE)
    marked = AutoTokenizer.from_pretrained(tmp_path / "marked").apply_chat_template(
        CONVERSATION, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.token_ids.tolist() == marked["input_ids"]
    targets = [i for i, is_learned in enumerate(marked["assistant_masks"]) if is_learned]
    assert (example.predictors + 1).tolist() == targets


def test_learned_tokens_follow_exactly_the_prompts_that_serving_sends(tmp_path, tokenizer):
    (example,) = load(tmp_path, tokenizer, [{"messages": CONVERSATION}]).examples
    token_ids, targets = example.token_ids.tolist(), (example.predictors + 1).tolist()
    starts = [t for t in targets if t - 1 not in targets]
    prompts = [tokenizer.apply_chat_template(CONVERSATION[:index]) for index in (2, 4)]
    assert [token_ids[:start] for start in starts] == prompts


def test_prompt_and_completion_as_messages_learn_only_the_completion(tmp_path, tokenizer):
    row = {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}
    (example,) = load(tmp_path, tokenizer, [row]).examples
    assert example.token_ids.tolist() == tokenizer.split_chat(CONVERSATION)[0]
    assert learned(tokenizer, example) == "the fox, and the ship"


def test_every_token_of_plain_text_is_learned(tmp_path, tokenizer):
    (example,) = load(tmp_path, tokenizer, [{"text": "the fox and the dog"}]).examples
    expected = tokenizer.encode("the fox and the dog")
    assert example.token_ids[:-1].tolist() == expected
    assert int(example.token_ids[-1]) in tokenizer.eos_token_ids
    assert example.predictors.tolist() == list(range(len(expected)))


def test_instructions_are_asked_as_a_user_would(tmp_path, tokenizer):
    row = {"instruction": "sing", "input": "of ships", "output": "the ships"}
    turn = [
        {"role": "user", "content": "sing\nof ships"},
        {"role": "assistant", "content": "the ships"},
    ]
    assert equal_to_chat(tmp_path, tokenizer, row, turn)
    alone = [{"role": "user", "content": "sing"}, turn[1]]
    for empty in ({}, {"input": ""}, {"input": None, "system": "", "history": []}):
        row = {"instruction": "sing", **empty, "output": "the ships"}
        assert equal_to_chat(tmp_path, tokenizer, row, alone)


def test_instructions_have_a_system_and_earlier_turns(tmp_path, tokenizer):
    row = {
        "instruction": "and now?",
        "output": "the fox, and the ship",
        "system": "be brief",
        "history": [["hi", "the dog"]],
    }
    assert equal_to_chat(tmp_path, tokenizer, row, CONVERSATION)


def test_alpaca_prompt(tmp_path, tokenizer):
    rows = [
        {"instruction": "sing {x}", "input": "of ships", "output": "the ships"},
        {"instruction": "sing", "input": "", "output": "la"},
    ]
    dataset = load(tmp_path, tokenizer, rows, instructions="alpaca")
    texts = [tokenizer.decode(example.token_ids) for example in dataset.examples]
    assert (
        "### Instruction:\nsing {x}\n\n### Input:\nof ships\n\n### Response:\nthe ships" in texts[0]
    )
    assert texts[1].endswith("request.\n\n### Instruction:\nsing\n\n### Response:\nla")
    assert [learned(tokenizer, example) for example in dataset.examples] == ["the ships", "la"]


def test_instructions_on_a_base_without_chat_template(tmp_path):
    write_tokenizer(tmp_path, chat_template=None)
    tokenizer = Tokenizer.load(tmp_path)
    row = {"instruction": "sing", "output": "la"}
    with pytest.raises(DataError, match="no chat template"):
        load(tmp_path, tokenizer, [row])
    assert len(load(tmp_path, tokenizer, [row], instructions="alpaca").examples) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the fox", "chosen": " jumps", "rejected": " sinks slowly"},
        {
            "prompt": CONVERSATION[:2],
            "chosen": CONVERSATION[2:3],
            "rejected": [{"role": "assistant", "content": "the storm"}],
        },
    ],
)
def test_preferences_are_pairs_of_completions(tmp_path, tokenizer, row):
    dataset = load(tmp_path, tokenizer, [row, row])
    assert len(dataset.pairs) == 2
    for pair in dataset.pairs:
        for key, example in pair._asdict().items():
            as_completion = {"prompt": row["prompt"], "completion": row[key]}
            (expected,) = load(tmp_path, tokenizer, [as_completion]).examples
            assert example.token_ids.tolist() == expected.token_ids.tolist()
            assert example.predictors.tolist() == expected.predictors.tolist()


def test_preferences_can_be_read_as_completions(tmp_path, tokenizer):
    row = {"prompt": "the fox", "chosen": " jumps", "rejected": " sinks"}
    path = write_jsonl(tmp_path / "d", [row])
    columns = {"prompt": "prompt", "completion": "chosen"}
    train, _ = load_datasets(UnitConfig(name="u", data=path, columns=columns), tokenizer, 64)
    assert learned(tokenizer, train.examples[0]) == " jumps"


def test_columns_give_names_and_choose_the_format(tmp_path, tokenizer):
    row = {"text": "where is my card?", "category": "card_arrival", "messages": []}
    columns = {"prompt": "text", "completion": "category"}
    found = load(tmp_path, tokenizer, [row], columns=columns)
    plain = {"prompt": row["text"], "completion": row["category"]}
    assert found.digest == load(tmp_path, tokenizer, [plain]).digest
    assert load(tmp_path, tokenizer, [row], columns={"text": "text"}).format == "text"
    optional = {"instruction": "text", "output": "category", "input": "context"}
    assert load(tmp_path, tokenizer, [row], columns=optional).format == "instruction"
    with pytest.raises(DataError, match="chat as well as text.*columns: {messages: messages"):
        load(tmp_path, tokenizer, [row])


@pytest.mark.parametrize(
    ("row", "options", "field", "expected"),
    [
        ({"text": "a"}, {"columns": {"text": "body"}}, "columns.text", "has no 'body'"),
        (
            {"a": "a"},
            {"columns": {"prompt": "a"}},
            "columns",
            "name its columns, as in columns: {prompt:",
        ),
        ({"text": ""}, {}, "text", "text is empty"),
        ({"text": None}, {}, "text", "text is None; it must be text"),
        ({"instruction": 3, "output": "a"}, {}, "instruction", "instruction is 3"),
        ({"instruction": "a", "output": "a", "history": ["b"]}, {}, "history", "pairs"),
        ({"instruction": "a", "output": "a", "history": "b"}, {}, "history", "pairs"),
        (
            {"instruction": "a", "output": "a", "system": "b"},
            {"instructions": "alpaca"},
            "system",
            "no place in instructions: alpaca",
        ),
        ({"prompt": "a", "completion": CONVERSATION}, {}, "completion", "must both be text"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, {}, "rejected", "rejected is empty"),
        (
            {"prompt": CONVERSATION, "completion": [{"role": "user", "content": "a"}]},
            {},
            "messages",
            "no message of role assistant",
        ),
    ],
)
def test_errors_name_line_and_key(tmp_path, tokenizer, row, options, field, expected):
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        load(tmp_path, tokenizer, [row], **options)
    assert caught.value.message.startswith(f"{tmp_path / 'd.jsonl'}:1")
    assert caught.value.field == field


def test_column_names_are_checked_with_the_settings():
    known = {key for keys in FORMATS.values() for key in (*keys.required, *keys.optional)}
    assert set(get_args(Column)) == known
    with pytest.raises(ConfigError, match="columns is {'promt': 'a'}; it must be .*prompt"):
        UnitConfig(name="u", data="d", columns={"promt": "a"})
