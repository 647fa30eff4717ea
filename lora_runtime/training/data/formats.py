"""What a row means: its format by its keys, and its token ids with the targets among them.

chat         `messages`: what the assistant says is learned
completion   `prompt`, `completion`: both text, or both lists of messages
instruction  `instruction`, `output`, and if there are `input`, `system`, `history`
text         `text`: every token is learned
preference   `prompt`, `chosen`, `rejected`: as completion, twice

Which tokens are targets is decided by the tokenizer's split, the same template serving uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lora_runtime.errors import DataError
from lora_runtime.text.tokenizer import Message, Tokenizer
from lora_runtime.training.config import InstructionStyle

Values = Mapping[str, object]
Split = tuple[list[int], list[bool]]
"""Token ids, and True for those to be learned."""


class Keys(NamedTuple):
    """The keys of one format; a row without a required one is not of it."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS = {
    "chat": Keys(("messages",)),
    "completion": Keys(("prompt", "completion")),
    "instruction": Keys(("instruction", "output"), ("input", "system", "history")),
    "text": Keys(("text",)),
    "preference": Keys(("prompt", "chosen", "rejected")),
}
"""Format → its keys; other keys of a row are ignored."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca, with the line break before the response that is usual since."""


def choose_columns(row: Values, columns: Mapping[str, str], where: str) -> Values:
    """The row's values under the keys of a format; without `columns` the row as it is."""
    if not columns:
        return row
    optional = {key for keys in FORMATS.values() for key in keys.optional}
    for key, column in columns.items():
        if column not in row and key not in optional:
            raise DataError(
                f"{where} has no {column!r}, which columns names for {key}; it has "
                f"{', '.join(row) or 'nothing'}",
                field=f"columns.{key}",
            )
    return {key: row[column] for key, column in columns.items() if column in row}


def find_format(values: Values, where: str) -> str:
    """The format whose keys a row has. Raises DataError when it is none, or more than one."""
    matching = [
        name for name, keys in FORMATS.items() if all(key in values for key in keys.required)
    ]
    if not matching:
        known = "; ".join(", ".join(keys.required) for keys in FORMATS.values())
        raise DataError(
            f"{where} has the keys {', '.join(values) or 'none'}, which are no format's; use those "
            f"of one ({known}), or set columns",
            field="columns",
        )
    if len(matching) > 1:
        key = FORMATS[matching[0]].required[0]
        raise DataError(
            f"{where} is {' as well as '.join(matching)} by its keys; remove some, or choose by "
            f"columns, as in columns: {{{key}: {key}, …}}",
            field="columns",
        )
    return matching[0]


def content_of(values: Values, kind: str) -> dict[str, object]:
    """The part of a row that makes its example."""
    keys = FORMATS[kind]
    return {key: values[key] for key in (*keys.required, *keys.optional) if values.get(key)}


def split_row(
    values: Values, kind: str, tokenizer: Tokenizer, instructions: InstructionStyle
) -> list[Split]:
    """A row's token ids and targets: one sequence, or two of a preference, the chosen one first.

    Raises DataError naming the key.
    """
    match kind:
        case "chat":
            return [tokenizer.split_chat(_messages(values, "messages"))]
        case "completion":
            return [_continued(values, "completion", tokenizer)]
        case "instruction" if instructions == "alpaca":
            return [tokenizer.split_completion(_alpaca_prompt(values), _answer(values, "output"))]
        case "instruction":
            return [tokenizer.split_chat(_conversation(values))]
        case "text":
            return [tokenizer.split_completion("", _answer(values, "text"))]
    return [_continued(values, key, tokenizer) for key in ("chosen", "rejected")]


def _continued(values: Values, key: str, tokenizer: Tokenizer) -> Split:
    """A prompt and what follows it, both as text or both as messages."""
    is_chat = [isinstance(values[name], list) for name in ("prompt", key)]
    if all(is_chat):
        prompt = _messages(values, "prompt")
        messages = [*prompt, *_messages(values, key)]
        return tokenizer.split_chat(messages, first_target=len(prompt))
    if any(is_chat):
        raise DataError(f"prompt and {key} must both be text or both lists of messages", field=key)
    return tokenizer.split_completion(_text(values, "prompt"), _answer(values, key))


def _conversation(values: Values) -> list[Message]:
    """Instruction and input as one message of the user, after the turns of `history`."""
    system = _text(values, "system")
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in _history(values):
        messages += _turn(question, answer)
    question = "\n".join(filter(None, (_text(values, "instruction"), _text(values, "input"))))
    return [*messages, *_turn(question, _answer(values, "output"))]


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca_prompt(values: Values) -> str:
    for key in ("system", "history"):
        if values.get(key):
            raise DataError(f"{key} has no place in instructions: alpaca; use chat", field=key)
    instruction, context = _text(values, "instruction"), _text(values, "input")
    template = ALPACA_WITH_INPUT if context else ALPACA
    return template.format(instruction=instruction, input=context)


def _history(values: Values) -> list[list[str]]:
    turns = values.get("history") or []
    is_list = isinstance(turns, list)
    for turn in turns if is_list else [None]:
        if not isinstance(turn, list) or [type(part) for part in turn] != [str, str]:
            raise DataError("history must be a list of [question, answer] pairs", field="history")
    return turns


def _messages(values: Values, key: str) -> list[Message]:
    messages = values[key]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{key} must be a list of objects with role and content", field=key)
    return messages


def _answer(values: Values, key: str) -> str:
    text = _text(values, key)
    if not text:
        raise DataError(
            f"{key} is empty, so there is nothing to learn; fill or remove it", field=key
        )
    return text


def _text(values: Values, key: str) -> str:
    """Text under a key; a key that is missing or null, which only optional ones may be, is ''."""
    text = values.get(key)
    if text is None and any(key in keys.optional for keys in FORMATS.values()):
        return ""
    if not isinstance(text, str):
        raise DataError(f"{key} is {text!r}; it must be text", field=key)
    return text
