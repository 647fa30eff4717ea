"""Nothing of a row that means something is ignored: it is used, or refused by name, or shown."""

from __future__ import annotations

import csv
import io
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lora_runtime.errors import DataError
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.data import load_dataset
from lora_runtime.training.data.formats import AS_CHAT, FORMATS, MEANINGFUL
from lora_runtime.training.dry_run import estimate
from lora_runtime.training.report import show_data
from lora_runtime.training.report.progress import DATA_HEADINGS
from tests.lora_runtime.training.tiny_runs import quiet_console, run, shown, write_jsonl
from tests.tiny_tokenizer import write_tokenizer

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Bonjour"}
SYSTEM = {"role": "system", "content": "Answer in French."}
CHAT = {"messages": [USER, ASSISTANT]}
ROWS = {
    "chat": CHAT,
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Bonjour"}]
    },
    "completion": {"prompt": "Hi", "completion": " Bonjour"},
    "completion of messages": {"prompt": [USER], "completion": [ASSISTANT]},
    "instruction": {"instruction": "Hi", "output": "Bonjour"},
    "text": {"text": "the fox"},
    "preference": {"prompt": "Hi", "chosen": "Bonjour", "rejected": "Hello"},
    "preference of messages": {
        "prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "Hello"}],
    },
}  # fmt: skip


def jsonl(path, rows):
    return write_jsonl(path.with_suffix(".jsonl"), rows)


def as_json(path, rows):
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, indent=1))
    return path


def as_csv(path, rows):
    path = path.with_suffix(".csv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path, rows):
    path = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


KINDS = [jsonl, as_json, as_csv, parquet]


def load(tmp_path, tokenizer, rows, kind=jsonl, size=512, **options):
    return load_dataset(kind(tmp_path / "d", rows), tokenizer, size, **options)


def same(tmp_path, tokenizer, row, other):
    return load(tmp_path, tokenizer, [row]).digest == load(tmp_path, tokenizer, [other]).digest


def learned(tokenizer, example):
    return tokenizer._inner.decode(example.token_ids[example.predictors + 1])


@pytest.mark.parametrize("name", ["chat", "sharegpt"])
def test_system_beside_messages_is_the_first_message(tmp_path, tokenizer, name):
    whole = {"messages": [SYSTEM, USER, ASSISTANT]}
    row = {**ROWS[name], "system": SYSTEM["content"]}
    assert same(tmp_path, tokenizer, row, whole)
    for nothing in ("", None):
        assert same(tmp_path, tokenizer, {**ROWS[name], "system": nothing}, CHAT)
    assert same(tmp_path, tokenizer, {**whole, "system": SYSTEM["content"]}, whole)
    with pytest.raises(DataError, match="differ; remove one"):
        load(tmp_path, tokenizer, [{**whole, "system": "Be brief."}])


@pytest.mark.parametrize("name", ["completion of messages", "preference of messages"])
def test_system_beside_a_prompt_of_messages(tmp_path, tokenizer, name):
    row = {**ROWS[name], "system": SYSTEM["content"]}
    assert same(tmp_path, tokenizer, row, {**ROWS[name], "prompt": [SYSTEM, USER]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["completion", "preference"])
def test_system_beside_text_makes_it_a_chat(tmp_path, tokenizer, name, kind):
    """As TRL reads the row whose prompt is the messages of the system and the user: the prompt by
    the template with the generation prompt, the rest learned. TRL also trains on what the template
    puts behind the end of the turn, which no model is asked for.
    """
    row = {**ROWS[name], "system": SYSTEM["content"]}
    found = load(tmp_path, tokenizer, [row, ROWS[name]], kind)
    template = tokenizer._inner.apply_chat_template
    prompt = [SYSTEM, {"role": "user", "content": row["prompt"]}]
    answers = [row[key] for key in ("completion", "chosen", "rejected") if key in row]
    for example, answer in zip(found.examples, answers, strict=False):
        whole = [*prompt, {"role": "assistant", "content": answer}]
        ids = template(whole, return_dict=True)["input_ids"]
        start = len(template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
        end = next(i for i in range(start, len(ids)) if ids[i] in tokenizer.eos_token_ids)
        assert example.token_ids.tolist() == ids
        assert (example.predictors + 1).tolist() == list(range(start, end + 1))
    assert found.notes == (f"{AS_CHAT} (rows: 1)",)
    plain = load(tmp_path, tokenizer, [{**ROWS[name], "system": ""}], kind)
    assert plain.digest == load(tmp_path, tokenizer, [ROWS[name]], kind).digest
    assert plain.notes == ()


@pytest.mark.parametrize("kind", KINDS)
def test_system_beside_text_alone_is_refused_by_name(tmp_path, tokenizer, kind):
    row = {**ROWS["text"], "system": SYSTEM["content"]}
    with pytest.raises(DataError, match="system is 'Answer in French.'") as caught:
        load(tmp_path, tokenizer, [row], kind)
    assert caught.value.field == "system"


TOOLS = [{"type": "function", "function": {"name": "w"}}]
FOREIGN = {
    "label": False, "labels": "5", "kto_tag": True, "weight": 0.5, "tools": TOOLS,
    "functions": TOOLS, "images": ["a.png"], "input_ids": [1, 2], "chat_template": "{{ x }}",
    "system_prompt": "Be brief.", "Label": True, " weight ": 0, "input": "of ships",
    "history": [["a", "b"]], "output": "c",
}  # fmt: skip


@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("name", ROWS)
def test_a_key_that_means_something_elsewhere_is_refused_by_name(tmp_path, tokenizer, name, key):
    if name == "instruction" and key in ("input", "history", "output"):
        return
    row = {**ROWS[name], key: FOREIGN[key]}
    with pytest.raises(DataError) as caught:
        load(tmp_path, tokenizer, [ROWS[name], row])
    assert caught.value.message.startswith(f"{tmp_path / 'd.jsonl'}:2: {key} is ")
    assert caught.value.field == key
    for nothing in (None, "", [], {}):
        dataset = load(tmp_path, tokenizer, [{**ROWS[name], key: nothing}])
        assert dataset.unused == (key,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["card_arrival", "false", "0"])
def test_a_label_column_is_used_by_choice_or_refused(tmp_path, tokenizer, kind, label):
    rows = [{"text": "where is my card?", "label": label}]
    with pytest.raises(DataError, match="label is .*columns: {prompt: text, completion: label}"):
        load(tmp_path, tokenizer, rows, kind)
    columns = {"prompt": "text", "completion": "label"}
    (example,) = load(tmp_path, tokenizer, rows, kind, columns=columns).examples
    assert learned(tokenizer, example) == f"{label}<|im_end|>"


@pytest.mark.parametrize("value", [False, True, 0, 1])
def test_labels_of_kto_are_refused(tmp_path, tokenizer, value):
    row = {"prompt": "1+1?", "completion": "5", "label": value}
    with pytest.raises(DataError, match="label is .*KTO.*keep the rows whose label is true"):
        load(tmp_path, tokenizer, [row])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_weight_one_is_a_row(tmp_path, tokenizer, kind):
    for value in (1, 1.0):
        rows = [{**ROWS["completion"], "weight": value}]
        assert load(tmp_path, tokenizer, rows, kind).unused == ("weight",)


def weighed(*weights):
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Sorry, two."},
    ]
    for turn, weight in zip(turns[1::2], weights, strict=True):
        turn |= {} if weight is None else {"weight": weight}
    return {"messages": turns}


@pytest.mark.parametrize("kind", [jsonl, as_json, parquet])
def test_a_weight_of_zero_is_context(tmp_path, tokenizer, kind):
    texts = {None: "three<|im_end|>Sorry, two.<|im_end|>", 0: "Sorry, two.<|im_end|>"}
    for first, text in texts.items():
        (example,) = load(tmp_path, tokenizer, [weighed(first, 1)], kind).examples
        assert learned(tokenizer, example) == text
        assert (
            example.token_ids.tolist() == tokenizer.split_chat(weighed(None, None)["messages"])[0]
        )
    with pytest.raises(DataError, match="its weight is 0"):
        load(tmp_path, tokenizer, [weighed(0, 0)], kind)


@pytest.mark.parametrize("weight", [0.5, 2, -1, "1"])
def test_other_weights_are_refused(tmp_path, tokenizer, weight):
    with pytest.raises(DataError, match=r"messages\[1\].weight is .*0 or 1"):
        load(tmp_path, tokenizer, [weighed(weight, 1)])
    with pytest.raises(DataError, match=r"messages\[0\].weight is 0.*only the assistant's"):
        load(tmp_path, tokenizer, [{"messages": [{**USER, "weight": 0}, ASSISTANT]}])


@pytest.mark.parametrize(
    ("key", "value"),
    [("tool_calls", [{"id": "a"}]), ("name", "Ann"), ("train", False), ("images", ["a.png"])],
)
def test_other_keys_of_a_message_are_refused_by_name(tmp_path, tokenizer, key, value):
    row = {"messages": [USER, {**ASSISTANT, key: value}]}
    with pytest.raises(DataError, match=rf"messages\[1\] has {key}, .*exactly role and content"):
        load(tmp_path, tokenizer, [row])


def test_sharegpt_is_the_chat_it_says(tmp_path, tokenizer):
    turns = [("system", "be brief"), ("human", "hi"), ("gpt", "the dog"), ("user", "and?"),
             ("assistant", "the fox")]  # fmt: skip
    rows = [{"id": "1", "conversations": [{"from": who, "value": what} for who, what in turns]}]
    dataset = load(tmp_path, tokenizer, rows, as_json)
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles.get(who, who), "content": what} for who, what in turns]
    assert dataset.digest == load(tmp_path, tokenizer, [{"messages": messages}]).digest
    assert (dataset.format, dataset.unused) == ("sharegpt", ("id",))
    plain = [{"conversations": messages}]
    assert load(tmp_path, tokenizer, plain).digest == dataset.digest
    for who in ("function_call", "observation", "robot"):
        rows = [{"conversations": [*rows[0]["conversations"], {"from": who, "value": "x"}]}]
        with pytest.raises(DataError, match=rf"conversations\[5\].from is '{who}'"):
            load(tmp_path, tokenizer, rows)
        rows[0]["conversations"].pop()
    chosen = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    with pytest.raises(DataError, match="chosen is {'from'"):
        load(tmp_path, tokenizer, [{**rows[0], **chosen}])


def test_the_prompt_that_repeats_a_conversation_is_only_shown(tmp_path, tokenizer):
    dataset = load(tmp_path, tokenizer, [{"prompt": "Hi", **CHAT}, {**CHAT, "source": "web"}])
    assert dataset.unused == ("prompt", "source")


@pytest.mark.parametrize("kind", KINDS)
def test_every_unused_column_is_in_the_tables_of_train_and_dry_run(tmp_path, tokenizer, base, kind):
    rows = [{"id": n, "text": "the fox", "topic": "[b]", "note": None} for n in range(4)]
    path = kind(tmp_path / "d", rows)
    held_out = kind(tmp_path / "e", [{"text": "the dog", "seen": "never"}])
    units = (
        UnitConfig(name="u", data=path, eval_data=held_out, rank=2),
        UnitConfig(name="v", data=path, rank=2, columns={"prompt": "topic", "completion": "text"}),
    )
    console = quiet_console()
    show_data(
        console,
        estimate(base, tokenizer, TrainConfig(output=tmp_path, units=units, max_seq_len=64)).data,
    )
    run(base, tokenizer, tmp_path / "out", units, console=console)
    lines = [re.split(r"\s{2,}", line.strip()) for line in shown(console).splitlines()]
    last = {line[0]: line[-1] for line in lines if len(line) > 4}
    assert last["u"] == "id, topic, note" and last["v"] == "id, note" and last["held out"] == "seen"
    assert sum(line[0] == "u" and line[-1] == "id, topic, note" for line in lines) == 2
    page = (tmp_path / "out" / "report" / "summary.md").read_text()
    assert "columns not used: id, topic, note" in page


@pytest.mark.parametrize("is_terminal", [True, False])
def test_at_80_columns_nothing_of_the_data_is_cut(tmp_path, tokenizer, is_terminal):
    path = jsonl(tmp_path / "long_conversations", [{**CHAT, "source of it": "[b]"}])
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=is_terminal, color_system=None)
    show_data(console, [("support", load_dataset(path, tokenizer, 64), None)])
    assert "…" not in text.getvalue()
    for word in ("support", *DATA_HEADINGS[1:], path.name, "source of it"):
        assert any(word in line for line in text.getvalue().splitlines()), word


def test_a_column_without_a_name_is_shown(tmp_path, tokenizer):
    """Data frames write their index as such a one."""
    (tmp_path / "d.csv").write_text(",text\n0,the fox\n")
    assert load_dataset(tmp_path / "d.csv", tokenizer, 64).unused == ("''",)


NULLS = {"tool_calls": None, "name": None, "weight": None, "function_call": {}, "tools": []}


@pytest.mark.parametrize("kind", [jsonl, as_json, parquet])
def test_keys_that_are_null_are_no_keys(tmp_path, tokenizer, kind):
    nulls = {**NULLS, "function_call": None} if kind is parquet else NULLS
    messages = [{**turn, **nulls} for turn in CHAT["messages"]]
    row = {"messages": messages, "system": None, "prompt": None, "completion": None, "tools": None}
    dataset = load(tmp_path, tokenizer, [row], kind)
    assert dataset.digest == load(tmp_path, tokenizer, [CHAT]).digest
    with pytest.raises(DataError, match=r"messages\[1\].*content"):
        load(tmp_path, tokenizer, [{"messages": [USER, {**ASSISTANT, "content": None}]}], kind)


def test_a_first_turn_of_the_assistant_is_context_and_said(tmp_path, tokenizer):
    greeting = {"role": "assistant", "content": "Welcome! How can I help?"}
    dataset = load(tmp_path, tokenizer, [CHAT, {"messages": [greeting, USER, ASSISTANT]}])
    assert learned(tokenizer, dataset.examples[1]) == "Bonjour<|im_end|>"
    assert dataset.examples[1].token_ids.tolist()[:1] == tokenizer.encode("<|im_start|>")
    assert dataset.notes == (
        "first turn of the assistant is context, as no prompt asks for it (rows: 1)",
    )
    console = quiet_console()
    show_data(console, [("u", dataset, None)])
    assert "u: first turn of the assistant is context" in shown(console)
    shared = {"conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "a"},
                                {"from": "gpt", "value": "b"}]}  # fmt: skip
    assert load(tmp_path, tokenizer, [shared]).notes == dataset.notes
    with pytest.raises(DataError, match="is the first, which no prompt asks for"):
        load(tmp_path, tokenizer, [{"messages": [greeting]}])
    after_system = load(tmp_path, tokenizer, [{"messages": [SYSTEM, greeting]}])
    assert learned(tokenizer, after_system.examples[0]).startswith("Welcome!")
    assert after_system.notes == ()


@pytest.mark.parametrize("nothing", ["", " \n", "<|im_end|>", "<|im_end|> <|im_end|>\n"])
def test_an_empty_answer_is_refused_in_every_format(tmp_path, tokenizer, nothing):
    empty = {**ASSISTANT, "content": nothing}
    rows = [
        {"messages": [USER, empty]},
        {"messages": [USER, empty, USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": nothing}]},
        {"prompt": "Hi", "completion": nothing},
        {"prompt": [USER], "completion": [empty]},
        {"instruction": "Hi", "output": nothing},
        {"instruction": "Hi", "output": "a", "history": [["b", nothing]]},
        {"text": nothing},
        {"prompt": "Hi", "chosen": "a", "rejected": nothing},
        {"prompt": [USER], "chosen": [empty], "rejected": [ASSISTANT]},
    ]
    for row in rows:
        with pytest.raises(DataError, match="nothing to learn|nothing but the end token"):
            load(tmp_path, tokenizer, [row])
    silent = {"messages": [USER, {**empty, "weight": 0}, USER, ASSISTANT]}
    assert len(load(tmp_path, tokenizer, [silent]).examples) == 1


@pytest.mark.parametrize("behind", ["<|im_end|>", "<|im_end|>\n", "<|im_end|><|im_end|>"])
def test_an_end_token_that_the_text_brings_is_not_doubled(tmp_path, tokenizer, behind):
    turn = {**ASSISTANT, "content": f"Bonjour{behind}"}
    pairs = [
        (ROWS["text"], {"text": f"the fox{behind}"}),
        (ROWS["completion"], {"prompt": "Hi", "completion": f" Bonjour{behind}"}),
        (ROWS["instruction"], {"instruction": "Hi", "output": f"Bonjour{behind}"}),
        (ROWS["preference"], {"prompt": "Hi", "chosen": f"Bonjour{behind}", "rejected": "Hello"}),
        (CHAT, {"messages": [USER, turn]}),
        (
            {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
            {"messages": [USER, turn, USER, turn]},
        ),
    ]
    for row, ended in pairs:
        assert same(tmp_path, tokenizer, row, ended)
    options = {"instructions": "alpaca"}
    one, other = (load(tmp_path, tokenizer, [row], **options) for row in pairs[2])
    assert one.digest == other.digest


def test_an_end_inside_a_text_stays(tmp_path, tokenizer):
    text = "the fox<|im_end|>the dog\n"
    (example,) = load(tmp_path, tokenizer, [{"text": text}]).examples
    assert learned(tokenizer, example) == text[3:] + "<|im_end|>"


def test_a_leading_token_that_the_text_brings_is_not_doubled(tmp_path):
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer.json").read_text())
    config["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1],
                                            "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("") == [1]
    assert same(tmp_path, tokenizer, {"text": "a fox"}, {"text": "<|im_start|>a fox"})


def test_a_long_cell_of_a_table_is_read(tmp_path, tokenizer):
    rows = [{"prompt": "the fox", "completion": "a" * 131_073}]
    found = load(tmp_path, tokenizer, rows, as_csv, size=16)
    assert found.digest == load(tmp_path, tokenizer, rows, size=16).digest
    assert found.num_truncated == 1


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d"])
@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_and_a_list_are_read_whatever_the_name(tmp_path, tokenizer, name, indent):
    expected = load(tmp_path, tokenizer, [CHAT]).digest
    for content in (CHAT, [CHAT]):
        (tmp_path / name).write_text(json.dumps(content, indent=indent))
        assert load_dataset(tmp_path / name, tokenizer, 64).digest == expected


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls", "x"]),
            values,
        )
    ),
    max_leaves=8,
)
SOUND = st.sampled_from([USER, ASSISTANT, SYSTEM, {"from": "gpt", "value": "b"}])
TURNS = st.lists(SOUND | SOUND | ANY, max_size=4)
KEYS = sorted({*MEANINGFUL, "messages", "conversations", "id"})


@settings(max_examples=300)
@given(
    st.lists(st.dictionaries(st.sampled_from(KEYS), ANY | TURNS | TURNS, max_size=4), max_size=3)
)
def test_whatever_rows_hold_they_are_read_or_refused(tokenizer, tmp_path_factory, rows):
    path = write_jsonl(tmp_path_factory.getbasetemp() / "any.jsonl", rows)
    try:
        dataset = load_dataset(path, tokenizer, 64)
    except DataError as error:
        assert str(path) in error.message
    else:
        used = FORMATS[dataset.format]
        assert len(dataset.items) == len(rows)
        assert all({*row} <= {*used.required, *used.optional, *dataset.unused} for row in rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["completion", "text", "preference", "instruction"])
def test_rows_that_are_too_long_are_dropped_by_choice_and_counted(tmp_path, tokenizer, kind, name):
    last = list(ROWS[name])[-1]
    long = {**ROWS[name], last: "the lazy dog " * 90}
    rows = [ROWS[name], long, ROWS[name]]
    dataset = load(tmp_path, tokenizer, rows, kind, size=64, truncation="drop")
    assert (dataset.num_dropped, len(dataset.items), dataset.num_truncated) == (1, 2, 0)
    assert "1 dropped" in dataset.describe()
    assert dataset.digest == load(tmp_path, tokenizer, [rows[0], rows[2]], kind).digest
    console = quiet_console()
    show_data(console, [("u", dataset, None)])
    cells = shown(console).splitlines()[-2].split()
    assert cells[:6] == ["u", dataset.path.name, name, "2", "0", "1"]
    with pytest.raises(DataError, match="holds no example: its 1 rows are all over max_seq_len=64"):
        load(tmp_path, tokenizer, [long], kind, size=64, truncation="drop")
    question = {"prompt": "the lazy dog " * 90, "completion": "a"}
    with pytest.raises(DataError, match="set truncation to start or drop"):
        load(tmp_path, tokenizer, [question], kind, size=64)
