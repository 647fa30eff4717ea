"""What a model thinks before it answers: where it begins and ends, and how it is read apart.

Some templates open it themselves at the end of the prompt, some close it there so that there is
none, and after the others the model opens it if it will. So the rendered prompt says how it stands,
and with it `enable_thinking` or whatever a template calls its switch.

Sources: the chat templates of Qwen/Qwen3-0.6B, deepseek-ai/DeepSeek-R1-Distill-Qwen-32B and
mistralai/Magistral-Small-2509.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lora_runtime.text.tool_calls import num_kept

PROMPT_END = 32
"""Tokens at the end of a prompt in which its last tag stands, if it has one there."""


class Tags(NamedTuple):
    """What thinking stands between."""

    begin: str
    end: str


TAGS = (Tags("<think>", "</think>"), Tags("[THINK]", "[/THINK]"))


@dataclass(frozen=True, slots=True)
class Thinking:
    """How an output may begin."""

    tags: Tags
    is_open: bool
    """The prompt has opened it. False: the output may."""
    special_ids: Mapping[str, int]
    """Those of the tags that are special tokens."""

    def before(self, grammar: str) -> str:
        """The grammar, as llguidance takes it, of an output that thinks, or may, and then has the
        form of another grammar: one in its JSON, or in its dialect of Lark.
        """
        is_lark = not grammar.startswith("{")
        form = {"lark_grammar": grammar} if is_lark else json.loads(grammar)["grammars"][0]
        thought = {"lark_grammar": self._grammar}
        return json.dumps({"grammars": [thought, {**form, "name": "form"}]})

    @property
    def _grammar(self) -> str:
        begin, end = map(self._literal, self.tags)
        if self.tags.end in self.special_ids:  # it is no text, so any text ends before it
            thought = f"thought: /(?s:.*)/ {end}"
        else:
            thought = f"thought[lazy]: THOUGHT\nTHOUGHT: /(?s:.*)/ {end}"
        whole = "thought /\\n{0,2}/"
        start = whole if self.is_open else f"({begin} {whole})?"
        return f"start: {start} @form\n{thought}"

    def _literal(self, tag: str) -> str:
        return f"<[{self.special_ids[tag]}]>" if tag in self.special_ids else json.dumps(tag)


def tags_of(template: str | None) -> Tags | None:
    """The tags that a chat template knows; None: its model does not think, or not so."""
    return next((tags for tags in TAGS if tags.end in (template or "")), None)


def thinking_of(tags: Tags, prompt_end: str, special_ids: Mapping[str, int]) -> Thinking | None:
    """How the outputs of a chat may begin; None where its prompt says that they do not think.

    prompt_end: the end of the rendered prompt, special tokens included. special_ids: text → id of
    each special token.
    """
    if prompt_end.rstrip().endswith(tags.end):
        return None
    is_open = prompt_end.rstrip().endswith(tags.begin)
    return Thinking(tags, is_open, {tag: special_ids[tag] for tag in tags if tag in special_ids})


class ThoughtReader:
    """Reads the text of one output apart into what was thought and what is said. White space around
    a thought, and line breaks after it, are neither.
    """

    def __init__(self, thinking: Thinking | None) -> None:
        self._thinking = thinking
        self._is_open = thinking is not None and thinking.is_open
        self._may_open = thinking is not None and not thinking.is_open
        self._is_begun = False
        """What is being read, a thought or what follows one, has a first character."""
        self._held = ""

    @property
    def is_thinking(self) -> bool:
        """True while what comes is a thought, or may begin one."""
        return self._is_open or self._may_open

    def push(self, text: str) -> tuple[str, str]:
        """Take more text; return what is certain by now of the thought and of what is said."""
        if self._thinking is None:
            return "", text
        self._held += text
        if self._may_open:
            self._open(self._thinking.tags.begin)
        thought = self._more_thought(self._thinking.tags.end) if self._is_open else ""
        return thought, "" if self.is_thinking else self._said()

    def flush(self) -> tuple[str, str]:
        """Return the rest at the end of the output; a thought may be cut short."""
        rest, self._held = self._held, ""
        return (rest.rstrip(), "") if self._is_open else ("", rest)

    def _open(self, begin: str) -> None:
        held = self._held.lstrip()
        if held.startswith(begin):
            self._held, self._is_open = held[len(begin) :], True
            self._may_open = False
        elif not begin.startswith(held):
            self._may_open, self._is_begun = False, True  # no thought: every line break is said

    def _more_thought(self, end: str) -> str:
        if not self._is_begun:
            self._held = self._held.lstrip()
        found = self._held.find(end)
        if found >= 0:
            thought, self._held = self._held[:found].rstrip(), self._held[found + len(end) :]
            self._is_open = self._is_begun = False
            return thought
        size = len(self._held) - num_kept(self._held, end)
        thought, self._held = self._held[:size], self._held[size:]
        self._is_begun = self._is_begun or bool(thought)
        return thought

    def _said(self) -> str:
        said, self._held = self._held, ""
        if not self._is_begun:
            said = said.lstrip("\n")
            self._is_begun = bool(said)
        return said
