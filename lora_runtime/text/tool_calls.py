"""Calls of tools in the text of an output: how families of models write them, read as they come.

What is no call stays text. A call's name is given once its arguments begin; from then on the
arguments are given as they come. How an output is cut into pieces makes no difference.

Sources: the chat templates of Hermes 2 Pro and Qwen2.5 (`hermes`), Llama 3.1 (`llama3_json`),
Mistral 7B Instruct v0.3 and Mistral Small 3.1 (`mistral`) and Qwen3-Coder (`qwen3_coder`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_runtime.core import StructuredOutput, StructureKind
from lora_runtime.text.structured_output import JSON_OPTIONS

MAX_PARALLEL = 8
"""Calls of one output that has to call tools."""
ARGUMENTS = ("arguments", "parameters")
"""Keys of a call's arguments."""

Schemas = Mapping[str, Mapping[str, Any] | None]
"""Tool → JSON schema of its arguments, None for any object; in the order they were given."""


class CallPart(NamedTuple):
    """More of one call of an output; a call's first part has its name."""

    number: int
    """Which call, from 0."""
    name: str
    arguments: str


class Parsed(NamedTuple):
    """What more of an output's text gives."""

    text: str
    calls: tuple[CallPart, ...]


@dataclass(slots=True)
class Call:
    """A call as far as its text goes; without arguments it has not begun."""

    name: str = ""
    arguments: str | None = None


Reading = Callable[[str, list[Call], Schemas], int]
"""Reads calls from the beginning of a text, which is that of their marker, into a list, and returns
where they end. Raises CutShort where the text ends before they do, and NoCall."""


class CutShort(Exception):
    """The text is the beginning of a call."""


class NoCall(Exception):
    """The text is no call from here on."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls."""

    name: str
    marker: str
    """What calls begin with."""
    hidden: tuple[str, ...]
    """Texts of the format that may be special tokens of a vocabulary, which are no text."""
    read: Reading
    grammar: Callable[[Schemas, Callable[[str], str]], str]
    """The grammar of an output that is calls and nothing else. The function gives a text of
    `hidden` as the grammar has it."""
    opening: str = ""
    """What calls at the very beginning of an output may begin with instead."""

    def form(self, schemas: Schemas, special_ids: Mapping[str, int]) -> StructuredOutput:
        """The form of an output that calls at least one of these tools. special_ids: of `hidden`,
        those that are special tokens.
        """

        def literal(text: str) -> str:
            is_special = text in special_ids
            return f"<[{special_ids[text]}]>" if is_special else json.dumps(text)

        return StructuredOutput(StructureKind.GRAMMAR, self.grammar(schemas, literal))


class CallReader:
    """Reads the text of one output."""

    def __init__(self, format: ToolFormat, schemas: Schemas) -> None:
        self.num_calls = 0
        self._format, self._schemas = format, schemas
        self._held = ""
        """Text that is not given yet."""
        self._space = ""
        """White space before the calls that are held; it goes with them."""
        self._is_call = False
        """What is held begins with calls, so far as it goes."""
        self._may_open = bool(format.opening)
        self._given: list[Call] = []
        """What has been given of the calls that are held."""

    def push(self, text: str) -> Parsed:
        """Take more text, give what is certain by now."""
        self._held += text
        texts: list[str] = []
        parts: list[CallPart] = []
        while self._is_call or self._find(texts):
            calls: list[Call] = []
            try:
                end = self._format.read(self._held, calls, self._schemas)
            except CutShort:
                parts += self._news(calls)
                break
            except NoCall:
                end = 0 if not _begun(calls) else len(self._held)
            parts += self._news(calls)
            if end == 0:  # the marker was only text
                end = len(self._format.marker) if self._held.startswith(self._format.marker) else 1
                texts.append(self._space + self._held[:end])
            self._leave(end)
        return Parsed("".join(texts), tuple(parts))

    def flush(self) -> Parsed:
        """Give the rest at the end of the output; a call that is cut short stays as it is."""
        rest, self._held = self._space + self._held, ""
        is_over = self._given or (self.num_calls and rest.isspace())
        return Parsed("" if is_over else rest, ())

    def _find(self, texts: list[str]) -> bool:
        """Give text up to where calls begin, or up to what may be their beginning."""
        held, marker = self._held, self._format.marker
        if self._may_open and held.strip():
            self._may_open = False
            if held.lstrip().startswith(self._format.opening):
                self._hold(held, len(held) - len(held.lstrip()))
                return True
        found = held.find(marker)
        if found < 0:
            kept = _num_kept(held, marker)
            texts.append(held[: len(held) - kept])
            self._held = held[len(held) - kept :]
            return False
        texts.append(held[:found].rstrip())
        self._hold(held, found)
        return True

    def _hold(self, text: str, start: int) -> None:
        before = text[:start]
        self._space, self._held = before[len(before.rstrip()) :], text[start:]
        self._is_call, self._may_open = True, False

    def _news(self, calls: Sequence[Call]) -> list[CallPart]:
        """What of the calls that are held has not been given."""
        parts, begun = [], _begun(calls)
        for index, call in enumerate(begun):
            assert call.arguments is not None
            is_new = index == len(self._given)
            if is_new:
                self._given.append(Call(arguments=""))
                self.num_calls += 1
            given = self._given[index].arguments or ""
            if is_new or len(call.arguments) > len(given):
                number = self.num_calls - len(self._given) + index
                name = call.name if is_new else ""
                parts.append(CallPart(number, name, call.arguments[len(given) :]))
                self._given[index].arguments = call.arguments
        return parts

    def _leave(self, end: int) -> None:
        self._held, self._is_call, self._space = self._held[end:], False, ""
        self._given.clear()


def _begun(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call.arguments is not None]


def _num_kept(held: str, marker: str) -> int:
    """Length of a text's end that may go with calls: white space and a marker's beginning."""
    longest = min(len(marker) - 1, len(held))
    size = next((n for n in range(longest, 0, -1) if held.endswith(marker[:n])), 0)
    before = held[: len(held) - size]
    return len(held) - len(before.rstrip())


# Reading. A position moves on; whoever finds the text at its end raises CutShort.

_SPACE = re.compile(r"\s*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SCALAR = re.compile(r"[^\s,{}\[\]\"]+")
_NESTED = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)
_NAME = re.compile(r"[\w.-]{1,256}")


def _skip(text: str, at: int) -> int:
    """The position after white space, where the text goes on."""
    found = _SPACE.match(text, at)
    assert found is not None
    if found.end() == len(text):
        raise CutShort
    return found.end()


def _expect(text: str, at: int, wanted: str) -> int:
    """The position after a wanted text."""
    if text.startswith(wanted, at):
        return at + len(wanted)
    raise CutShort if wanted.startswith(text[at:]) else NoCall


def _value_end(text: str, at: int) -> int | None:
    """Where the JSON value that begins here ends; None: the text ends before. Raises NoCall."""
    if text[at] not in '{["':
        scalar = _SCALAR.match(text, at)
        if scalar is None:
            raise NoCall
        return scalar.end() if scalar.end() < len(text) else None
    if text[at] == '"':
        string = _STRING.match(text, at)
        return None if string is None else string.end()
    depth = 0
    for found in _NESTED.finditer(text, at):
        depth += (found[0] in "{[") - (found[0] in "}]")
        if depth == 0:
            return found.end()
    return None


def _value(text: str, at: int) -> tuple[Any, int]:
    """A JSON value and the position after it."""
    end = _value_end(text, at)
    if end is None:
        raise CutShort
    try:
        return json.loads(text[at:end]), end
    except (ValueError, RecursionError):
        raise NoCall from None


def _json_call(text: str, at: int, calls: list[Call], *, needs_arguments: bool = False) -> int:
    """Read {"name": …, "arguments": {…}}, keys in any order, and return the position after it."""
    call, held = Call(), None
    calls.append(call)
    at = _expect(text, at, "{")
    while True:
        key, at = _value(text, _skip(text, at))
        at = _skip(text, _expect(text, _skip(text, at), ":"))
        if key in ARGUMENTS and call.name and text[at] == "{":
            end = _value_end(text, at)
            call.arguments = text[at:end]
            if end is None:
                raise CutShort
            at = end
        else:
            value, at = _value(text, at)
            if key == "name" and isinstance(value, str):
                call.name = value
            elif key in ARGUMENTS:
                held = value if isinstance(value, str) else json.dumps(value or {})
        at = _skip(text, at)
        if text[at] == "}":
            break
        at = _expect(text, at, ",")
    if not call.name or (needs_arguments and held is None and call.arguments is None):
        raise NoCall
    call.arguments = call.arguments or held or "{}"
    return at + 1


def _read_hermes(text: str, calls: list[Call], schemas: Schemas) -> int:
    at = _skip(text, _expect(text, 0, "<tool_call>"))
    at = _json_call(text, at, calls)
    return _expect(text, _skip(text, at), "</tool_call>")


def _read_llama(text: str, calls: list[Call], schemas: Schemas) -> int:
    at = 0 if text.startswith("{") else _skip(text, _expect(text, 0, "<|python_tag|>"))
    at = _json_call(text, at, calls, needs_arguments=True)
    while text[_skip(text, at)] == ";":
        at = _json_call(text, _skip(text, _skip(text, at) + 1), calls, needs_arguments=True)
    return at


def _read_mistral(text: str, calls: list[Call], schemas: Schemas) -> int:
    at = _skip(text, _expect(text, 0, "[TOOL_CALLS]"))
    if text[at] != "[":
        return _read_named(text, at, calls)
    at = _json_call(text, _skip(text, at + 1), calls)
    while text[at := _skip(text, at)] == ",":
        at = _json_call(text, _skip(text, at + 1), calls)
    return _expect(text, at, "]")


def _read_named(text: str, at: int, calls: list[Call]) -> int:
    """Read name[ARGS]{…}, where [ARGS] may be missing."""
    name = _NAME.match(text, at)
    if name is None:
        raise NoCall
    at = _skip(text, name.end())
    if text[at] == "[":
        at = _skip(text, _expect(text, at, "[ARGS]"))
    if text[at] != "{":
        raise NoCall
    end = _value_end(text, at)
    calls.append(Call(name[0], text[at:end]))
    if end is None:
        raise CutShort
    return end


def _read_qwen(text: str, calls: list[Call], schemas: Schemas) -> int:
    at = _expect(text, _skip(text, _expect(text, 0, "<tool_call>")), "<function=")
    name, at = _until(text, at, ">")
    properties = (schemas.get(name) or {}).get("properties")
    call, given = Call(name, "{"), 0
    calls.append(call)
    while True:
        at = _skip(text, at)
        if "</function>".startswith(text[at : at + len("</function>")]):
            at = _skip(text, _expect(text, at, "</function>"))
            end = _expect(text, at, "</tool_call>")
            call.arguments = f"{call.arguments}}}"
            return end
        key, at = _until(text, _expect(text, at, "<parameter="), ">")
        value, at = _until(text, at, "</parameter>")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        pair = f"{json.dumps(key)}: {_typed(value, schema)}"
        call.arguments = f"{call.arguments}{', ' if given else ''}{pair}"
        given += 1


def _until(text: str, at: int, end: str) -> tuple[str, int]:
    found = text.find(end, at)
    if found < 0:
        raise CutShort
    return text[at:found], found + len(end)


def _typed(value: str, schema: object) -> str:
    """The JSON of a parameter, which the model wrote as it is if it is a text."""
    value = value.removeprefix("\n").removesuffix("\n")
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind != "string":
        try:
            return json.dumps(json.loads(value))
        except (ValueError, RecursionError):
            pass
    return json.dumps(value)


# Writing: grammars of outputs that are calls


def _json_rule(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"


def _call_rules(schemas: Schemas, key: str) -> str:
    """The rule `call`: an object of a tool's name and its arguments."""
    rules = []
    for index, (name, schema) in enumerate(schemas.items()):
        parts = {"name": {"const": name}, key: schema or {"type": "object"}}
        whole: dict[str, Any] = {"type": "object", "properties": parts, "required": list(parts)}
        whole["additionalProperties"] = False
        for definitions in ("$defs", "definitions"):  # what the arguments' schema refers to
            if schema and definitions in schema:
                whole[definitions] = schema[definitions]
        rules.append(f"call_{index}: {_json_rule(whole)}")
    names = " | ".join(f"call_{index}" for index in range(len(rules)))
    return "\n".join((f"call: {names}", *rules))


def _hermes_grammar(schemas: Schemas, literal: Callable[[str], str]) -> str:
    whole = f'{literal("<tool_call>")} "\\n" call "\\n" {literal("</tool_call>")}'
    more = f'("\\n" whole){{0,{MAX_PARALLEL - 1}}}'
    return f"start: whole {more}\nwhole: {whole}\n{_call_rules(schemas, 'arguments')}"


def _llama_grammar(schemas: Schemas, literal: Callable[[str], str]) -> str:
    return f"start: call\n{_call_rules(schemas, 'parameters')}"


def _mistral_grammar(schemas: Schemas, literal: Callable[[str], str]) -> str:
    more = f'(", " call){{0,{MAX_PARALLEL - 1}}}'
    start = f'start: {literal("[TOOL_CALLS]")} "[" call {more} "]"'
    return f"{start}\n{_call_rules(schemas, 'arguments')}"


def _mistral_named_grammar(schemas: Schemas, literal: Callable[[str], str]) -> str:
    calls = []
    rules = []
    for index, (name, schema) in enumerate(schemas.items()):
        opening = f"{literal('[TOOL_CALLS]')} {json.dumps(name)} {literal('[ARGS]')}"
        calls.append(f"{opening} arguments_{index}")
        rules.append(f"arguments_{index}: {_json_rule(schema or {'type': 'object'})}")
    start = f"start: call call{{0,{MAX_PARALLEL - 1}}}\ncall: {' | '.join(calls)}"
    return "\n".join((start, *rules))


def _qwen_grammar(schemas: Schemas, literal: Callable[[str], str]) -> str:
    whole = f'{literal("<tool_call>")} "\\n" call "\\n" {literal("</tool_call>")}'
    more = f'("\\n" whole){{0,{MAX_PARALLEL - 1}}}'
    calls, rules = [], []
    for index, (name, schema) in enumerate(schemas.items()):
        opening, body = json.dumps(f"<function={name}>\n"), []
        properties = (schema or {}).get("properties") or {}
        required = (schema or {}).get("required") or ()
        for number, (key, value) in enumerate(properties.items()):
            rule = f"p_{index}_{number}"
            kind = value.get("type") if isinstance(value, Mapping) else None
            is_text = kind == "string" and "enum" not in value and "const" not in value
            text = r"/[^<]*/" if is_text else f"v_{index}_{number}"
            if not is_text:
                rules.append(f"v_{index}_{number}: {_json_rule(_as_schema(value))}")
            start, end = json.dumps(f"<parameter={key}>\n"), json.dumps("\n</parameter>\n")
            rules.append(f"{rule}: {start} {text} {end}")
            body.append(rule if key in required else f"{rule}?")
        calls.append(" ".join((opening, *body, '"</function>"')))
    start = f"start: whole {more}\nwhole: {whole}\ncall: {' | '.join(calls)}"
    return "\n".join((start, *rules))


def _as_schema(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


HERMES = ToolFormat(
    "hermes", "<tool_call>", ("<tool_call>", "</tool_call>"), _read_hermes, _hermes_grammar
)
QWEN3_CODER = ToolFormat(
    "qwen3_coder", "<tool_call>", ("<tool_call>", "</tool_call>"), _read_qwen, _qwen_grammar
)
LLAMA3_JSON = ToolFormat(
    "llama3_json",
    "<|python_tag|>",
    ("<|python_tag|>",),
    _read_llama,
    _llama_grammar,
    opening="{",
)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", ("[TOOL_CALLS]",), _read_mistral, _mistral_grammar)
MISTRAL_NAMED = ToolFormat(
    "mistral_named",
    "[TOOL_CALLS]",
    ("[TOOL_CALLS]", "[ARGS]"),
    _read_mistral,
    _mistral_named_grammar,
)
FORMATS = {f.name: f for f in (HERMES, QWEN3_CODER, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED)}


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template writes earlier calls in, or asks for; None: none known."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        return QWEN3_CODER if "<function=" in template else HERMES
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return LLAMA3_JSON
    return None


_TAG = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_TOOLS = re.compile(r"\btools\b")


def shows_tools(template: str) -> bool:
    """Tell whether a chat template reads the variable `tools`."""
    return any(_TOOLS.search(tag) for tag in _TAG.findall(template))
