"""Examples: targets, truncation, order and named errors."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.errors import DataError
from lora_runtime.training.data import Example, ExampleStream, PackedBatch, load_dataset
from tests.lora_runtime.training.tiny_runs import ragged_data, write_jsonl

QUESTION = {"role": "user", "content": "hi"}
CHAT = {"messages": [QUESTION, {"role": "assistant", "content": "the dog"}]}
PAIR = {"prompt": "the fox", "completion": " and the dog"}


def learned_text(example, tokenizer):
    return tokenizer.decode(example.token_ids[example.predictors + 1])


def test_only_answers_are_learned(tmp_path, tokenizer):
    chat = load_dataset(write_jsonl(tmp_path / "c", [CHAT]), tokenizer, 64)
    assert learned_text(chat.examples[0], tokenizer) == "the dog"
    pair = load_dataset(write_jsonl(tmp_path / "p", [PAIR, {**PAIR, "id": 7}]), tokenizer, 64)
    assert learned_text(pair.examples[0], tokenizer) == " and the dog"
    assert len(pair.examples) == 2
    for dataset in (chat, pair):
        example = dataset.examples[0]
        last = example.token_ids[example.predictors[-1] + 1]
        assert int(last) in tokenizer.eos_token_ids


def test_an_empty_prompt_still_trains_without_a_predictor_for_its_first_token(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d", [{"prompt": "", "completion": "the dog"}])
    example = load_dataset(path, tokenizer, 64).examples[0]
    assert example.predictors.tolist() == list(range(len(example.token_ids) - 1))


def test_truncation_is_counted(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d", [PAIR, {"prompt": "a", "completion": "b"}])
    whole = load_dataset(path, tokenizer, 64)
    cut = load_dataset(path, tokenizer, len(whole.examples[0].token_ids) - 2)
    assert (whole.num_truncated, cut.num_truncated) == (0, 1)
    assert cut.num_tokens == whole.num_tokens - 2
    assert cut.num_target_tokens == whole.num_target_tokens - 2
    assert cut.digest != whole.digest
    assert "2 examples (1 truncated)" in cut.describe()


def test_truncation_keeps_the_end_or_the_start_or_is_an_error(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d", [{"prompt": "a", "completion": "b"}, PAIR])
    (_, whole) = load_dataset(path, tokenizer, 64).examples
    size = len(whole.token_ids) - 1
    (_, end) = load_dataset(path, tokenizer, size).examples
    (_, start) = load_dataset(path, tokenizer, size, "start").examples
    assert torch.equal(end.token_ids, whole.token_ids[:-1])
    assert torch.equal(start.token_ids, whole.token_ids[1:])
    assert learned_text(end, tokenizer) == learned_text(start, tokenizer) == " and the dog"
    assert torch.equal(start.predictors, whole.predictors - 1)
    assert len(load_dataset(path, tokenizer, size + 1, "error").examples) == 2
    with pytest.raises(DataError) as caught:
        load_dataset(path, tokenizer, size, "error")
    assert caught.value.message.startswith(f"{path}:2: it has {size + 1} tokens")


def test_a_long_prompt_can_be_cut_at_its_start(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d", [{"prompt": "the " * 90, "completion": "a"}])
    (example,) = load_dataset(path, tokenizer, 64, "start").examples
    assert len(example.token_ids) == 64 and learned_text(example, tokenizer) == "a"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{not json", "is not JSON"),
        (b'{"prompt": "\xff", "completion": "a"}', "is not JSON in UTF-8"),
        (b'{"prompt": "\\ud800", "completion": "a"}', "is not JSON in UTF-8"),
        (b"[1]", "is a list"),
        (b'{"prompt": "a"}', "which are no format's"),
        (json.dumps({**CHAT, **PAIR}).encode(), "is chat as well as completion"),
        (json.dumps(CHAT).encode(), "is a chat example in a file of completion examples"),
        (b'{"prompt": "a", "completion": 3}', "must be text"),
        (
            json.dumps({"prompt": "the " * 90, "completion": "a"}).encode(),
            "no target token within max_seq_len=64",
        ),
    ],
)
def test_errors_name_file_and_line(tmp_path, tokenizer, line, expected):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        load_dataset(path, tokenizer, 64)
    assert caught.value.message.startswith(f"{path}:3")
    assert expected in caught.value.message


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hi", "list of objects"),
        (["hi"], "list of objects"),
        ([{"role": "user"}], "must have exactly role and content"),
        ([{"role": "robot", "content": "x"}], "robot"),
        ([{"role": "user", "content": "x"}], "no message of role assistant"),
        ([], "messages is empty"),
    ],
)
def test_bad_conversations_name_file_and_line(tmp_path, tokenizer, messages, expected):
    path = write_jsonl(tmp_path / "d", [CHAT, {"messages": messages}])
    with pytest.raises(DataError) as caught:
        load_dataset(path, tokenizer, 64)
    assert caught.value.message.startswith(f"{path}:2")
    assert expected in caught.value.message


def test_missing_and_empty_files(tmp_path, tokenizer):
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(tmp_path / "none", tokenizer, 64)
    with pytest.raises(DataError, match="holds no example"):
        load_dataset(write_jsonl(tmp_path / "empty", []), tokenizer, 64)


def test_every_epoch_is_a_new_order_of_all_examples(tmp_path, tokenizer):
    examples = load_dataset(ragged_data(tmp_path / "d", 20), tokenizer, 256).examples
    index = {id(example): number for number, example in enumerate(examples)}

    def order(stream, start, count):
        return [index[id(example)] for example in stream.take(start, count)]

    stream = ExampleStream(examples, seed=1)
    epochs = [order(stream, 20 * epoch, 20) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(20))
    assert order(ExampleStream(examples, seed=1), 13, 34) == sum(epochs, [])[13:47]
    assert order(ExampleStream(examples, seed=2), 0, 20) != epochs[0]


def test_packed_rows_keep_their_labels(tmp_path, tokenizer):
    examples = load_dataset(ragged_data(tmp_path / "d", 5), tokenizer, 256).examples
    batch = PackedBatch.of([[example] for example in examples])
    lengths = [length for (rows,) in batch.rows for length in rows.lengths]
    rows = batch.token_ids.split(lengths)
    assert all(torch.equal(row, e.token_ids) for row, e in zip(rows, examples, strict=True))
    expected = torch.cat([example.token_ids[example.predictors + 1] for example in examples])
    assert torch.equal(batch.labels, expected)
    assert torch.equal(batch.token_ids[batch.logits_at + 1], batch.labels)
    assert batch.position_ids.tolist() == [p for length in lengths for p in range(length)]


@given(
    prefixes=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    lengths=st.lists(st.integers(2, 9), min_size=2, max_size=4),
)
def test_what_all_rows_of_a_unit_begin_with_is_packed_once(prefixes, lengths):
    def example(shared, row, length):
        own = [100 * row + i for i in range(1, length + 1)]
        token_ids = [*range(1000, 1000 + shared), *own]
        return Example(torch.tensor(token_ids), torch.arange(shared, len(token_ids) - 1))

    units = [[example(p, row, n) for row, n in enumerate(lengths)] for p in prefixes]
    batch = PackedBatch.of(units)
    assert [rows.prefix for (rows,) in batch.rows] == prefixes
    assert len(batch.token_ids) == sum(p + sum(lengths) for p in prefixes)
    end, wanted = 0, 0
    for prefix, examples in zip(prefixes, units, strict=True):
        shared, end = slice(end, end + prefix), end + prefix
        for e in examples:
            own = slice(end, end + len(e.token_ids) - prefix)
            for found, whole in [
                (batch.token_ids, e.token_ids),
                (batch.position_ids, torch.arange(len(e.token_ids))),
            ]:
                assert torch.equal(torch.cat([found[shared], found[own]]), whole)
            at = slice(wanted, wanted + len(e.predictors))
            assert torch.equal(batch.logits_at[at], own.start - prefix + e.predictors)
            assert torch.equal(batch.labels[at], e.token_ids[e.predictors + 1])
            end, wanted = own.stop, at.stop


def test_a_predictor_is_never_shared():
    token_ids = torch.arange(6)
    examples = [Example(token_ids, torch.tensor([p, 4])) for p in (3, 2)]
    assert PackedBatch.of([examples]).rows[0][0].prefix == 2
    assert PackedBatch.of([examples[:1]]).rows[0][0].prefix == 0


def test_answers_to_one_prompt_share_it_where_that_saves_more():
    def example(*token_ids):
        return Example(torch.tensor(token_ids), torch.tensor([len(token_ids) - 2]))

    system, one, other = range(10), range(20, 40), range(50, 55)
    answers = [example(*system, *prompt, 70 + i, 80) for prompt in (one, other) for i in (0, 1)]
    (rows,) = PackedBatch.of([answers]).rows
    assert [(part.prefix, part.lengths) for part in rows] == [(30, [2, 2]), (15, [2, 2])]
    (rows,) = PackedBatch.of([[answers[0], *answers[2:], *answers[2:]]]).rows
    assert [(part.prefix, len(part.lengths)) for part in rows] == [(10, 5)]
    texts = [Example(torch.arange(9), torch.arange(8)) for _ in range(3)]
    assert [part.prefix for part in PackedBatch.of([texts]).rows[0]] == [0]
