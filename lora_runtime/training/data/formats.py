"""From a row to token ids and targets; the row's keys decide its format.

chat         `messages`, and if there is `system`: what the assistant says is learned
sharegpt     `conversations` of `from` and `value`, and if there is `system`: as chat
completion   `prompt`, `completion`, and if there is `system`: both text, or both lists of messages
instruction  `instruction`, `output`, and if there are `input`, `system`, `history`
text         `text`: every token is learned
preference   `prompt`, `chosen`, `rejected`: as completion, twice

`system` is a first message; beside a `prompt` that is text, the prompt is then the user's message
and the answer the assistant's, by the base's chat template. A message's `weight`, 0 or 1, says
whether the assistant's turn is learned, as in OpenAI's fine-tuning files. Which tokens are targets
is decided by the tokenizer's split, the same template serving uses. Other keys are shown as not
used, but those that mean something elsewhere in the field are refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from lora_runtime.errors import DataError
from lora_runtime.text.messages import Message
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.config import InstructionStyle

Values = Mapping[str, object]
Split = tuple[list[int], list[bool]]
"""Token ids, and True for those to be learned."""


MAX_SHOWN = 60
"""Characters of a value in an error."""

FIRST_TURN = "first turn of the assistant is context, as no prompt asks for it"
AS_CHAT = "beside system, prompt and answer are read as messages of a chat, not as plain text"


class Keys(NamedTuple):
    """The keys of one format; a row without a required one is not of it."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS = {
    "chat": Keys(("messages",), ("system",)),
    "sharegpt": Keys(("conversations",), ("system",)),
    "completion": Keys(("prompt", "completion"), ("system",)),
    "instruction": Keys(("instruction", "output"), ("input", "system", "history")),
    "text": Keys(("text",)),
    "preference": Keys(("prompt", "chosen", "rejected"), ("system",)),
}
"""Format → its keys."""

_LABEL = (
    "whether or what of the row is to be learned is not decided by it: of prompts and completions "
    "with labels (KTO) keep the rows whose label is true and remove the key; of texts with labels "
    "choose columns, as in columns: {prompt: text, completion: label}"
)
_WEIGHT = "a row has no weight but 1: repeat or remove rows, or weigh messages by 0 and 1"
_TOOLS = "serving sends no tools: write them into a message of the system, and calls as content"
_MEDIA = "bases read text only"
_TOKENS = "data is tokenized here: give its text"
MEANINGFUL = {
    **{key: "" for keys in FORMATS.values() for key in (*keys.required, *keys.optional)},
    **dict.fromkeys(("label", "labels", "kto_tag"), _LABEL),
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), _WEIGHT),
    **dict.fromkeys(("tools", "functions", "function_call", "tool_calls"), _TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("input_ids", "completion_mask", "assistant_masks", "token_ids"), _TOKENS),
    **dict.fromkeys(
        ("chat_template", "chat_template_kwargs"), "the base's template is used as it is"
    ),
    "system_prompt": "the key is system",
}
"""Keys that trainers give a meaning, those of the formats among them → why, or what to do instead.
"""
_EMPTY: tuple[object, ...] = (None, "", [], {})

ROLES_OF_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}

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
    """The format whose keys a row has; a key that is null counts where no format has the others.

    Raises DataError when it is none, or more than one.
    """
    present = [key for key, value in values.items() if value is not None]
    matching = _formats_of(present) or _formats_of(values)
    if not matching:
        known = "; ".join(", ".join(keys.required) for keys in FORMATS.values())
        example = "columns: {prompt: question, completion: answer}"
        raise DataError(
            f"{where} has the keys {', '.join(values) or 'none'}, which are no format's; use those "
            f"of one ({known}), or name its columns, as in {example}",
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


def _formats_of(names: Collection[str]) -> list[str]:
    return [name for name, keys in FORMATS.items() if all(key in names for key in keys.required)]


def unused_keys(values: Values, kind: str) -> list[str]:
    """The keys of a row that its format has no use for.

    Raises DataError for one that means something elsewhere and holds a value.
    """
    keys = FORMATS[kind]
    unused = [key for key in values if key not in (*keys.required, *keys.optional)]
    for key in unused:
        name = key.strip().lower()
        if name not in MEANINGFUL or values[key] in _EMPTY or _is_harmless(name, values[key], kind):
            continue
        advice = f": {MEANINGFUL[name]}" if MEANINGFUL[name] else ""
        raise DataError(
            f"{key} is {_short(values[key])}, which {kind} examples have no use for{advice}; "
            "remove it, or choose by columns what is used",
            field=key,
        )
    return unused


def _is_harmless(name: str, value: object, kind: str) -> bool:
    """A weight of 1, and the prompt that data sets repeat beside the conversation it begins."""
    if name == "prompt":
        return kind in ("chat", "sharegpt")
    return name == "weight" and str(value).strip() in ("1", "1.0", "True")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def content_of(values: Values, kind: str) -> dict[str, object]:
    """The part of a row that makes its example."""
    keys = FORMATS[kind]
    return {key: values[key] for key in (*keys.required, *keys.optional) if values.get(key)}


def note_of(values: Values, kind: str) -> str | None:
    """A remark on how a row is read, if there is one."""
    if kind in ("completion", "preference") and values.get("system"):
        return None if isinstance(values["prompt"], list) else AS_CHAT
    turns = values[FORMATS[kind].required[0]]
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict) or values.get("system"):
        return None
    role = first.get("role", ROLES_OF_SHAREGPT.get(str(first.get("from"))))
    return FIRST_TURN if role == "assistant" and kind in ("chat", "sharegpt") else None


def split_row(
    values: Values, kind: str, tokenizer: Tokenizer, instructions: InstructionStyle
) -> list[Split]:
    """A row's token ids and targets: one sequence, or two of a preference, the chosen one first.

    Raises DataError naming the key.
    """
    match kind:
        case "chat" | "sharegpt":
            turns = _turns(values, FORMATS[kind].required[0])
            return [_split(_after_system(values, turns), tokenizer)]
        case "completion":
            return [_continued(values, "completion", tokenizer)]
        case "instruction" if instructions == "alpaca":
            prompt = _alpaca_prompt(values)
            return [_completed(prompt, _answer(values, "output"), "output", tokenizer)]
        case "instruction":
            return [tokenizer.split_chat(_conversation(values))]
        case "text":
            return [_completed("", _answer(values, "text"), "text", tokenizer)]
    return [_continued(values, key, tokenizer) for key in ("chosen", "rejected")]


def _continued(values: Values, key: str, tokenizer: Tokenizer) -> Split:
    """A prompt and what follows it, both as text or both as messages."""
    is_chat = [isinstance(values[name], list) for name in ("prompt", key)]
    if all(is_chat):
        prompt = _after_system(values, _turns(values, "prompt"))
        context = [turn._replace(is_learned=False) for turn in prompt]
        return _split([*context, *_turns(values, key)], tokenizer)
    if any(is_chat):
        raise DataError(f"prompt and {key} must both be text or both lists of messages", field=key)
    question, answer = _text(values, "prompt"), _answer(values, key)
    if system := _text(values, "system"):  # plain text has no place for it, a chat has
        return tokenizer.split_chat([_system(system), *_question_and_answer(question, answer)])
    return _completed(question, answer, key, tokenizer)


def _completed(prompt: str, answer: str, key: str, tokenizer: Tokenizer) -> Split:
    try:
        return tokenizer.split_completion(prompt, answer)
    except DataError as error:
        raise DataError(f"{key}: {error.message}", field=error.field or key) from error


def _split(turns: Sequence[_Turn], tokenizer: Tokenizer) -> Split:
    messages, learned = [turn.message for turn in turns], [turn.is_learned for turn in turns]
    return tokenizer.split_chat(messages, learned)


def _conversation(values: Values) -> list[Message]:
    """Instruction and input as one message of the user, after the turns of `history`."""
    system = _text(values, "system")
    messages = [_system(system)] if system else []
    for question, answer in _history(values):
        messages += _question_and_answer(question, answer)
    question = "\n".join(filter(None, (_text(values, "instruction"), _text(values, "input"))))
    return [*messages, *_question_and_answer(question, _answer(values, "output"))]


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _question_and_answer(question: str, answer: str) -> list[Message]:
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
    rule = "history must be a list of [question, answer] pairs"
    if not isinstance(turns, list):
        raise DataError(rule, field="history")
    for turn in turns:
        if not isinstance(turn, list) or [type(part) for part in turn] != [str, str]:
            raise DataError(rule, field="history")
    return turns


class _Turn(NamedTuple):
    message: Message
    is_learned: bool


def _turns(values: Values, key: str) -> list[_Turn]:
    messages = values[key]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{key} must be a list of objects with role and content", field=key)
    return [_turn(message, f"{key}[{index}]", key) for index, message in enumerate(messages)]


def _turn(values: Mapping[str, object], where: str, key: str) -> _Turn:
    """A message of role and content, or from and value; others of its keys must hold nothing."""
    found = {name: value for name, value in values.items() if value not in (None, [], {})}
    weight = found.pop("weight", 1)
    if "from" in found and "value" in found:
        role = str(found.pop("from"))
        if role not in ROLES_OF_SHAREGPT:
            known = ", ".join(ROLES_OF_SHAREGPT)
            raise DataError(f"{where}.from is {role!r}; known are {known}", field=key)
        found |= {"role": ROLES_OF_SHAREGPT[role], "content": found.pop("value")}
    others = found.keys() - {"role", "content"}
    if others:
        name = min(others)
        advice = MEANINGFUL.get(name) or "serving sends role and content alone"
        raise DataError(
            f"{where} has {name}, {_short(found[name])}, beside role and content; it must have "
            f"exactly role and content, and if so a weight: {advice}; remove it",
            field=key,
        )
    if weight not in (0, 1) or ("weight" in values and found.get("role") != "assistant"):
        raise DataError(
            f"{where}.weight is {weight!r}; it must be 0 or 1, and only the assistant's messages "
            "have one",
            field=key,
        )
    if "content" not in found and "content" in values:
        raise DataError(f"{where}.content is null; fill it or remove the message", field=key)
    return _Turn(found, bool(weight))


def _after_system(values: Values, turns: list[_Turn]) -> list[_Turn]:
    """The turns after the row's own `system`, if it has one."""
    system = _text(values, "system")
    if not system:
        return turns
    message = _system(system)
    first = turns[0].message if turns else {}
    if first == message:
        return turns
    if first.get("role") == "system":
        raise DataError(
            "system and the first message, which is of the system too, differ; remove one",
            field="system",
        )
    return [_Turn(message, False), *turns]


def _answer(values: Values, key: str) -> str:
    text = _text(values, key)
    if not text.strip():
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
