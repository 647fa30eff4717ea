"""Calls of tools in text: read in pieces as in one, and written as their grammar wants them."""

from __future__ import annotations

import json
import random
import re
import time
import tracemalloc
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lora_runtime.errors import InvalidRequest
from lora_runtime.text.chat_output import AS_TEMPLATES_SAY, Parsers, ToolUse, chat_answer
from lora_runtime.text.chat_prompt import ChatPrompt, Tool
from lora_runtime.text.structured_output import (
    Matcher,
    Vocabulary,
    compile_grammar,
    grammar_of,
    token_masks,
)
from lora_runtime.text.tool_calls import CallReader
from lora_runtime.text.tool_formats.catalog import FORMATS, format_of, shows_tools
from lora_runtime.text.tool_formats.tool_format import Schemas
from tests.fakes import ByteTokenizer
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

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
SCHEMAS = {"weather": WEATHER, "clock": None}
ARGUMENTS = {"city": 'Köln "}{" \\ </tool_call', "days": 3}
BODY = json.dumps({"name": "weather", "arguments": ARGUMENTS})
CLOCK = '{"name": "clock", "arguments": {}}'
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
CASES = {
    "text": (
        "hermes",
        "No <tool> is <tool_call needed.\n",
        "No <tool> is <tool_call needed.\n",
        [],
    ),
    "one": ("hermes", f"<tool_call>\n{BODY}\n</tool_call>", "", [("weather", ARGUMENTS)]),
    "two with text": (
        "hermes",
        f"Let me see.\n\n<tool_call>\n{BODY}\n</tool_call>\n<tool_call>{CLOCK}</tool_call>\n",
        "Let me see.",
        [("weather", ARGUMENTS), ("clock", {})],
    ),
    "arguments first": (
        "hermes",
        '<tool_call>{"arguments": {"city": "Ulm"}, "name": "weather"}</tool_call> Done.',
        " Done.",
        [("weather", {"city": "Ulm"})],
    ),
    "arguments as text": (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Ulm\\"}"}</tool_call>',
        "",
        [("weather", {"city": "Ulm"})],
    ),
    "no call": (
        "hermes",
        "a <tool_call> is a tag, <tool_call>{1}</tool_call> too",
        "a <tool_call> is a tag, <tool_call>{1}</tool_call> too",
        [],
    ),
    "llama": ("llama3_json", BODY.replace("arguments", "parameters"), "", [("weather", ARGUMENTS)]),
    "llama several": (
        "llama3_json",
        f"<|python_tag|>{BODY}; {CLOCK}",
        "",
        [("weather", ARGUMENTS), ("clock", {})],
    ),
    "llama answers JSON": (
        "llama3_json",
        '{"name": "Ada", "age": 36}',
        '{"name": "Ada", "age": 36}',
        [],
    ),
    "llama text": ("llama3_json", "It is {late}.", "It is {late}.", []),
    "mistral": (
        "mistral",
        f"[TOOL_CALLS] [{BODY}, {CLOCK}]",
        "",
        [("weather", ARGUMENTS), ("clock", {})],
    ),
    "mistral named": (
        "mistral_named",
        f"Well:[TOOL_CALLS]weather[ARGS]{json.dumps(ARGUMENTS)}[TOOL_CALLS]clock{{}}",
        "Well:",
        [("weather", ARGUMENTS), ("clock", {})],
    ),
    "qwen3 coder": (
        "qwen3_coder",
        f"Sure.\n{XML}\n",
        "Sure.",
        [("weather", {"city": "12", "days": 3})],
    ),
}


def read(
    format_name: str, pieces: list[str], schemas: Schemas = SCHEMAS
) -> tuple[str, list[tuple[str, str]], list]:
    reader = CallReader(FORMATS[format_name], schemas)
    parsed = [reader.push(piece) for piece in pieces] + [reader.flush()]
    calls: list[list[str]] = []
    for part in (part for one in parsed for part in one.calls):
        if part.index == len(calls):
            assert part.name
            calls.append([part.name, ""])
        else:
            assert part.index == len(calls) - 1 and not part.name
        calls[part.index][1] += part.arguments
    assert reader.num_calls == len(calls)
    return "".join(one.text for one in parsed), [tuple(call) for call in calls], parsed


@pytest.mark.parametrize("case", CASES)
def test_a_text_is_read_in_pieces_as_in_one(case: str) -> None:
    name, text, said, calls = CASES[case]
    found, found_calls, _ = read(name, [text])
    assert found == said
    assert [(tool, json.loads(arguments)) for tool, arguments in found_calls] == calls
    rng = random.Random(case)
    for _ in range(40):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(1, 12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(name, pieces)[:2] == (found, found_calls)
    assert read(name, list(text))[:2] == (found, found_calls)


WEATHER_CALL = '{"name": "weather", "arguments": {"city": "Ulm"}}'
ULM, NONE = ("weather", '{"city": "Ulm"}'), ("clock", "{}")
BROKEN = {
    "no end": (
        "hermes",
        f"<tool_call>{WEATHER_CALL}<tool_call>{CLOCK}</tool_call>!",
        "!",
        [ULM, NONE],
    ),
    "text for the end": (
        "hermes",
        f"<tool_call>{WEATHER_CALL}\nSo it is: <tool_call>{CLOCK}</tool_call>",
        "So it is:",
        [ULM, NONE],
    ),
    "a key twice": (
        "hermes",
        f'<tool_call>{WEATHER_CALL[:-1]}, "arguments": {{"days": 3}}, "name": "x"}}</tool_call>!',
        "!",
        [ULM],
    ),
    "no number": (
        "hermes",
        '<tool_call>{"arguments": {"days": NaN}, "name": "weather"}</tool_call>',
        '<tool_call>{"arguments": {"days": NaN}, "name": "weather"}</tool_call>',
        [],
    ),
    "half a surrogate pair": (
        "hermes",
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        [],
    ),
    "a list that goes wrong": (
        "mistral",
        f"[TOOL_CALLS] [{WEATHER_CALL}, so it is.] [TOOL_CALLS] [{CLOCK}]",
        "so it is.]",
        [ULM, NONE],
    ),
    "an object that goes wrong": (
        "llama3_json",
        f"{WEATHER_CALL[:-1]}; so it is",
        "; so it is",
        [ULM],
    ),
    "infinite": (
        "qwen3_coder",
        XML.replace("\n3\n", "\n1e999\n"),
        "",
        [("weather", '{"city": "12", "days": "1e999"}')],
    ),
    "a function without a name": (
        "qwen3_coder",
        XML.replace("=weather", "="),
        XML.replace("=weather", "="),
        [],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_in_a_call_is_text_and_calls_behind_it_are_read(case: str) -> None:
    name, text, said, calls = BROKEN[case]
    rng = random.Random(case)
    for count in range(40):
        cuts = sorted(rng.choices(range(len(text) + 1), k=count))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(name, pieces)[:2] == (said, calls)
    assert read(name, list(text))[:2] == (said, calls)


LONG_CALLS = {
    "brackets": ("hermes", '<tool_call>{"name": "a", "arguments": {"x": [', "[1],"),
    "a text": ("hermes", '<tool_call>{"name": "a", "arguments": {"x": "', 'a \\" '),
    "a name": ("hermes", '<tool_call>{"name": "', "a-b "),
    "many calls": ("mistral", "[TOOL_CALLS] [", f"{CLOCK},"),
    "calls with ;": ("llama3_json", "", f"{CLOCK};"),
    "parameters": ("qwen3_coder", XML.partition("<parameter")[0], "<parameter=a>1</parameter>"),
    "calls in calls": ("hermes", "", '<tool_call>{"a":['),
}


@pytest.mark.parametrize("case", LONG_CALLS)
def test_reading_takes_time_in_proportion_to_the_text(case: str) -> None:
    """A stream's neighbours wait while its text is read."""
    name, begin, part = LONG_CALLS[case]

    def seconds(size: int) -> float:
        text = (begin + part * size)[:size]
        reader = CallReader(FORMATS[name], SCHEMAS)
        begun = time.process_time()
        for start in range(0, size, 4):
            reader.push(text[start : start + 4])
        reader.push("}]" * (size // 2) + "?")
        reader.flush()
        return time.process_time() - begun

    seconds(1000)
    assert seconds(40_000) < 1.0


@pytest.mark.parametrize("case", CASES)
def test_a_text_that_is_cut_short_gives_what_it_has(case: str) -> None:
    name, text, _, _ = CASES[case]
    _, whole, _ = read(name, [text])
    for end in range(len(text)):
        said, calls, _ = read(name, [text[:end]])
        assert read(name, list(text[:end]))[:2] == (said, calls)
        for (tool, arguments), (real, all_arguments) in zip(calls, whole, strict=False):
            assert tool == real and all_arguments.startswith(arguments)


@pytest.mark.parametrize("case", CASES)
def test_after_the_only_call_nothing_is_read(case: str) -> None:
    name, text, _, calls = CASES[case]
    for pieces in ([text], list(text)):
        reader = CallReader(FORMATS[name], SCHEMAS, max_calls=1)
        parts = [part for piece in pieces for part in reader.push(piece).calls]
        assert reader.flush().text.strip() in ("", text.strip() if not calls else "")
        assert reader.is_over == bool(calls)
        assert [part.name for part in parts if part.name] == [tool for tool, _ in calls[:1]]
        given = "".join(part.arguments for part in parts)
        assert not calls or json.loads(given) == calls[0][1]


NASTY = [
    "é",
    "東京",
    "😀",
    '"',
    "\\",
    "{",
    "}",
    "[",
    "]",
    "</tool_call",
    "<",
    "\n",
    "a b",
    "[ARGS]",
    ";",
]
TEMPLATES = {
    "hermes": (HERMES, "hermes", False),
    "qwen2.5": (QWEN25, "hermes", True),
    "qwen3": (QWEN3, "hermes", True),
    "qwen3-coder": (QWEN3_CODER, "qwen3_coder", True),
    "llama3.1": (LLAMA31, "llama3_json", False),
    "mistral-v0.3": (MISTRAL03, "mistral", False),
    "mistral-nemo": (MISTRAL_NEMO, "mistral", False),
    "mistral-small3.2": (MISTRAL_SMALL32, "mistral_named", True),
}
"""Template, format, and whether it writes text before calls."""


def any_value(rng: random.Random, depth: int = 2):
    kind = rng.randrange(7 if depth else 5)
    if kind == 5:
        return [any_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 6:
        return {any_text(rng): any_value(rng, depth - 1) for _ in range(rng.randrange(3))}
    return [None, rng.random() < 0.5, rng.randrange(-9, 99), rng.random() * 5, any_text(rng)][kind]


def any_text(rng: random.Random) -> str:
    return "".join(rng.choices(NASTY, k=rng.randrange(1, 6)))


@pytest.mark.parametrize("model", TEMPLATES)
def test_what_a_template_writes_is_read_again(model: str) -> None:
    """Calls with random arguments, rendered by transformers, cut into random pieces."""
    template, name, has_text = TEMPLATES[model]
    schema = {
        "type": "object",
        "properties": {"text": {"type": "string"}, "flag": {"type": "boolean"}, "any": {}},
    }
    tools = [
        {"type": "function", "function": {"name": tool, "description": "", "parameters": schema}}
        for tool in ("look_up", "tell")
    ]
    user = {"role": "user", "content": "Hi."}
    rng = random.Random(model)
    for _ in range(60):
        calls = [
            (
                rng.choice(["look_up", "tell"]),
                {
                    "text": any_text(rng),
                    "flag": rng.random() < 0.5,
                    "any": {"x": any_value(rng), "y": [any_text(rng)]},
                },
            )
            for _ in range(1 if name == "llama3_json" else 2)
        ]
        said = "Let me {see}: [1]" if has_text and rng.random() < 0.5 else ""
        turn = {
            "role": "assistant",
            "content": said,
            "tool_calls": [
                {"id": "abcdefgh1", "function": {"name": tool, "arguments": arguments}}
                for tool, arguments in calls
            ],
        }
        before, whole = (
            render_jinja_template(
                [turns],
                tools=tools,
                chat_template=template,
                add_generation_prompt=is_prompt,
                bos_token="<s>",
                eos_token="</s>",
            )[0][0]
            for turns, is_prompt in (([user], True), ([user, turn], False))
        )
        assert whole.startswith(before.rstrip("\n"))
        text = whole[len(before.rstrip("\n")) :]
        for end in ("<|im_end|>\n", "<|eot_id|>", "</s>"):
            text = text.removesuffix(end)
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(9)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found, found_calls, _ = read(name, pieces, dict.fromkeys(("look_up", "tell"), schema))
        assert [(tool, json.loads(arguments)) for tool, arguments in found_calls] == calls, text
        assert found.strip() == said


def test_arguments_come_as_they_are_written() -> None:
    text = f"<tool_call>\n{BODY}\n</tool_call>"
    _, _, parsed = read("hermes", list(text))
    sizes = [len(part.arguments) for one in parsed for part in one.calls]
    assert len(sizes) >= len(json.dumps(ARGUMENTS)) - 2 and max(sizes) <= 2


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN25, "hermes"),
        (HERMES, "hermes"),
        (LLAMA31, "llama3_json"),
        (QWEN3, "hermes"),
        (MISTRAL03, "mistral"),
        (MISTRAL_NEMO, "mistral"),
        (MISTRAL_SMALL32, "mistral_named"),
        (QWEN3_CODER, "qwen3_coder"),
    ],
)
def test_a_template_says_its_format(template: str, expected: str) -> None:
    found = format_of(template)
    assert found is not None and found.name == expected and shows_tools(template)


def test_a_template_without_tools_is_known() -> None:
    plain = "{# tools #}You have no tools.{% for m in messages %}{{ m.content }}{% endfor %}"
    assert format_of(plain) is None and not shows_tools(plain)


TREE = {
    "type": "object",
    "properties": {
        "name": {"type": "integer"},
        "parts": {"type": "array", "items": {"$ref": "#"}},
        "like": {"$ref": "#/properties/name"},
    },
    "required": ["name"],
    "additionalProperties": False,
}
CALLS_OF_TREE = {
    "hermes": '<tool_call>\n{"name": "tree", "arguments": %s}\n</tool_call>',
    "llama3_json": '{"name": "tree", "parameters": %s}',
    "mistral": '[TOOL_CALLS] [{"name": "tree", "arguments": %s}]',
    "mistral_named": "[TOOL_CALLS]tree[ARGS]%s",
}


def allows(grammar: str, text: str) -> bool:
    matcher = compile_grammar(grammar, Vocabulary([bytes([i]) for i in range(256)], []))
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize("name", CALLS_OF_TREE)
def test_references_within_a_tools_schema_are_to_that_schema(name: str) -> None:
    grammar = grammar_of(FORMATS[name].form({"tree": TREE}, {}))
    for value in (
        {"name": 1, "parts": [{"name": 2, "parts": []}], "like": 3},
        {"name": 1, "parts": [{"name": "tree", "arguments": {"name": 1}}]},
        {"name": 1, "parts": [{"name": "x"}]},
        {"name": 1, "parts": [], "like": "tree"},
    ):
        try:
            jsonschema.validate(value, TREE)
            is_valid = True
        except jsonschema.ValidationError:
            is_valid = False
        assert allows(grammar, CALLS_OF_TREE[name] % json.dumps(value)) == is_valid, value


@pytest.mark.parametrize("schema", [{}, {"properties": {"a": {}}}, {"type": ["null", "object"]}])
@pytest.mark.parametrize("name", CALLS_OF_TREE)
def test_arguments_are_an_object_whatever_the_schema_says(name: str, schema: dict) -> None:
    grammar = grammar_of(FORMATS[name].form({"tree": schema}, {}))
    for arguments, is_allowed in (("{}", True), ("[]", False), ("null", False), ("3", False)):
        assert allows(grammar, CALLS_OF_TREE[name] % arguments) == is_allowed


def test_qwen3_coder_refuses_references_that_its_parameters_cannot_follow() -> None:
    with pytest.raises(InvalidRequest, match="'#'.*must begin with"):
        FORMATS["qwen3_coder"].form({"tree": TREE}, {})


STRICT = {
    "weather": {
        "type": "object",
        "properties": {"days": {"type": "integer"}},
        "required": ["days"],
        "additionalProperties": False,
    },
    "clock": None,
}
ONE_CALL = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"days": 1}}\n</tool_call>',
    "qwen3_coder": (
        "<tool_call>\n<function=weather>\n<parameter=days>\n1\n</parameter>\n</function>\n</tool_call>"
    ),
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"days": 1}}]',
    "mistral_named": '[TOOL_CALLS]weather[ARGS]{"days": 1}',
}


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("name", ONE_CALL)
def test_strict_calls_within_text_keep_to_their_schema(name: str, is_special: bool) -> None:
    """What the grammar of an output with calls of the model's choice lets through."""
    found, call = FORMATS[name], ONE_CALL[name]
    special_ids = {text: 257 + i for i, text in enumerate(found.hidden)} if is_special else {}
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"<end>", *(text.encode() for text in special_ids)]
    vocabulary = Vocabulary(tokens, [256, *special_ids.values()])

    def is_taken(text: str, max_calls: int = 8) -> bool | None:
        """True: it may end there; None: more must follow; False: it may not be written."""
        form = found.free_form(STRICT, special_ids, max_calls)
        matcher = Matcher(compile_grammar(grammar_of(form), vocabulary), frozenset())
        parts = re.split("(" + "|".join(map(re.escape, special_ids)) + ")", text)
        for part in parts if is_special else [text]:
            for token in [special_ids[part]] if part in special_ids else part.encode():
                if not token_masks([matcher], vocabulary.size)[0][token]:
                    return False
                matcher.take(token)
        return matcher.can_end or None

    wrong = call.replace("1}", '"y"}').replace("\n1\n", "\nz\n")
    assert wrong != call
    for text in ("", "Just <text>, [T {é", call, f"So.\n\n{call}", f"{call} Done <b"):
        assert is_taken(text)
    for text in (wrong, f"So {wrong}", call.replace("weather", "forecast")):
        assert is_taken(text) is False
    assert is_taken(f"So {call[:14]}") is None
    if found.marks_each:
        assert is_taken(f"{call}\n{call}") and is_taken(f"{call}\n{call}", 1) is False
    read_back = read(name, [f"So.\n{call}"], STRICT)
    assert read_back[:2] == ("So.", [("weather", '{"days": 1}')])


@pytest.mark.parametrize("name", ONE_CALL)
def test_a_grammar_lets_as_many_calls_through_as_may_be_made(name: str) -> None:
    vocabulary = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<end>"], [256])
    for max_calls in (1, 3):
        grammar = grammar_of(FORMATS[name].form(STRICT, {}, max_calls))
        matcher = Matcher(compile_grammar(grammar, vocabulary), frozenset())
        one = ONE_CALL[name].removeprefix("[TOOL_CALLS] [").removesuffix("]")
        begin, between, end = {
            "mistral": ("[TOOL_CALLS] [", ", ", "]"),
            "mistral_named": ("", "", ""),
        }.get(name, ("", "\n", ""))
        for byte in f"{begin}{between.join([one] * max_calls)}".encode():
            assert token_masks([matcher], vocabulary.size)[0][byte]
            matcher.take(byte)
        allowed = np.flatnonzero(token_masks([matcher], vocabulary.size)[0])
        assert [bytes([byte]) for byte in allowed if byte < 256] == [b"]"] * bool(end)
        assert matcher.is_complete == (not end)


def test_strict_calls_need_a_marker() -> None:
    class Llama(ByteTokenizer):
        def chat_template(self, *, has_tools: bool = False) -> str:
            return LLAMA31

    prompt = ChatPrompt(({"role": "user", "content": "Hi"},), (Tool("clock", strict=True),))
    for tokenizer, parsers in ((Llama(), AS_TEMPLATES_SAY), (ByteTokenizer(), Parsers("none"))):
        with pytest.raises(InvalidRequest) as caught:
            chat_answer(prompt, [], tokenizer, None, parsers)
        assert caught.value.field == "messages.tools[0].strict"
    named = replace(prompt, tool_choice="clock")
    assert chat_answer(named, [], Llama(), None, AS_TEMPLATES_SAY).with_form(None)[1] is not None


PATTERNS = {
    "^[a-c/]+$": ("a/b", "ad"),
    "b+": ("abba", "ac"),
    r"^\$\/x": ("$/xy", "x$/x"),
    "a$": ("ba", "ab"),
    r"a\$": ("a$b", "a"),
    "é\n": ("é\n", "é"),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_texts_of_qwen3_coder_keep_to_their_schema(pattern: str) -> None:
    good, bad = PATTERNS[pattern]
    shape = {"type": "string", "pattern": pattern, "minLength": 2, "maxLength": 5}
    if good == "é\n":
        shape["minLength"] = 1
    jsonschema.validate(good, shape)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, shape)
    schemas = {"f": {"type": "object", "properties": {"x": shape}, "required": ["x"]}}
    vocabulary = Vocabulary([*(bytes([byte]) for byte in range(256)), b"<end>"], [256])
    for text, is_good in ((good, True), (bad, False), ("a" * 6, False)):
        grammar = grammar_of(FORMATS["qwen3_coder"].form(schemas, {}))
        matcher = Matcher(compile_grammar(grammar, vocabulary), frozenset())
        call = f"<tool_call>\n<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>"
        taken = []
        for token in call.encode():
            taken.append(bool(token_masks([matcher], 257)[0][token]))
            if not taken[-1]:
                break
            matcher.take(token)
        assert all(taken) == is_good, text


@pytest.mark.parametrize("wrong", [
    {"properties": [1]}, {"required": 5},
    {"properties": {"x": {"type": "string", "maxLength": "9"}}},
    {"properties": {"x": {"type": "string", "pattern": 5}}},
], ids=str)  # fmt: skip
def test_what_is_no_schema_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(InvalidRequest) as caught:
        FORMATS["qwen3_coder"].form({"f": wrong}, {})
    assert caught.value.field == "messages.tools"


@pytest.mark.parametrize("name", FORMATS)
def test_a_large_schema_takes_no_more_time_or_memory_than_it_is_large(name: str) -> None:
    """Qwen3-Coder has a rule for each parameter, which needs the schema's definitions again."""
    schema = {
        "type": "object",
        "properties": {f"p{index}": {} for index in range(4_000)},
        "required": [f"q{index}" for index in range(100_000)],
        "$defs": {"a": {"const": "x" * 20_000}},
    }
    tracemalloc.start()
    try:
        began = time.process_time()
        with pytest.raises(InvalidRequest):
            grammar_of(FORMATS[name].form({"f": schema}, {}))
        assert time.process_time() - began < 2
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(json.dumps(schema))


@pytest.mark.parametrize("name", FORMATS)
def test_schemas_that_are_too_deep_are_refused(name: str) -> None:
    schema: dict = {}
    for _ in range(2000):
        schema = {"properties": {"a": schema}}
    tools = ToolUse(FORMATS[name], {"weather": schema}, {}, ("weather",), frozenset(), None)
    with pytest.raises(InvalidRequest, match="nested too deep"):
        _ = tools.form
