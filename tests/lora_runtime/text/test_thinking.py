"""What is thought before an answer: read apart in any pieces, and before any kind of form."""

from __future__ import annotations

import random
import re

import pytest

from lora_runtime.core import StructuredOutput
from lora_runtime.text.structured_output import (
    Matcher,
    Vocabulary,
    compile_grammar,
    grammar_of,
    token_masks,
)
from lora_runtime.text.thinking import TAGS, Thinking, ThoughtReader, tags_of, thinking_of
from tests.tool_templates import QWEN3, QWEN25, THINKS_ALWAYS

BEGIN_ID, END_ID = 257, 258
BYTES = [bytes([byte]) for byte in range(256)]
TAG_IDS = {"<think>": BEGIN_ID, "</think>": END_ID}
CASES = {
    "a thought": (False, "<think>\nHm </thin <b\n\n</think>\n\nYes.\n", "Hm </thin <b", "Yes.\n"),
    "no thought": (False, "\n <thin air>", "", "\n <thin air>"),
    "a tag later on": (False, "So <think>x</think>", "", "So <think>x</think>"),
    "opened": (True, "Hm.\n</think>\nYes </think>", "Hm.", "Yes </think>"),
    "nothing thought": (False, "<think>\n\n</think>\n\n{}", "", "{}"),
    "cut in a thought": (True, "Hm </thi", "Hm </thi", ""),
    "cut in the first tag": (False, "<thi", "", "<thi"),
    "white space inside": (True, "a\n\n b </x> </think>c", "a\n\n b </x>", "c"),
}  # fmt: skip
"""Whether the prompt has opened a thought, the text, what was thought and what is said."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tags", TAGS, ids=str)
def test_a_text_is_read_in_pieces_as_in_one(case: str, tags) -> None:
    is_open, *texts = CASES[case]
    swap = dict(zip(("<think>", "</think>"), tags, strict=True))
    text, thought, said = (re.sub("</?think>", lambda m: swap[m[0]], each) for each in texts)
    if "cut" in case and tags != TAGS[0]:
        return
    rng = random.Random(case)
    for _ in range(60):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        reader = ThoughtReader(Thinking(tags, is_open, {}))
        read = [*map(reader.push, pieces), reader.flush()]
        assert "".join(part for part, _ in read) == thought
        assert "".join(part for _, part in read) == said


def test_a_prompt_says_how_it_stands() -> None:
    assert tags_of(QWEN25) is None and tags_of(None) is None
    tags = tags_of(QWEN3)
    assert tags == tags_of(THINKS_ALWAYS) == TAGS[0]
    assert thinking_of(tags, "x<think>\n\n</think>\n\n", {}) is None
    assert thinking_of(tags, "assistant\n<think>\n", {}).is_open
    assert not thinking_of(tags, "</think> old\nassistant\n", {}).is_open
    assert thinking_of(tags, "a", TAG_IDS | {"<s>": 1}).special_ids == TAG_IDS


FORMS = {
    "json_object": (True, '{"a": [1]}', "[1]"),
    "json_schema": ({"type": "integer"}, "-12", "x"),
    "regex": ("[a-f]{2,4}(-[0-9]+)?", "abc-1", "g"),
    "grammar": ('start: "(" start ")" | "x"', "((x))", ")"),
    "choice": (["red", "green </think>"], "green </think>", "blue"),
}
"""A definition, a text that has the form, and the beginning of one that has not."""


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("kind", FORMS)
def test_a_form_begins_after_the_thought(kind: str, is_special: bool) -> None:
    tags = [tag.encode() for tag in TAG_IDS] if is_special else []
    special_ids = [256, *(TAG_IDS.values() if is_special else ())]
    vocabulary = Vocabulary([*BYTES, b"<end>", *tags], special_ids)

    def is_taken(thinking: Thinking, text: str) -> bool | None:
        """True: it has the whole form; None: more must follow; False: it may not be written."""
        grammar = thinking.before(grammar_of(StructuredOutput.of({kind: definition})))
        matcher = Matcher(compile_grammar(grammar, vocabulary), frozenset())
        parts = re.split("(</?think>)", text) if is_special else [text]
        tokens = [
            token
            for part in parts
            for token in ([TAG_IDS[part]] if part in TAG_IDS else part.encode())
        ]
        for token in tokens:
            if not token_masks([matcher], vocabulary.size)[0][token]:
                return False
            matcher.take(token)
        return matcher.can_end or None

    definition, good, bad = FORMS[kind]
    if is_special and "</think>" in good:
        good = "red"
    opened, may = (Thinking(TAGS[0], is_open, TAG_IDS if is_special else {}) for is_open in (1, 0))
    thought = 'Hm: {"a": </thin, é\n\n'
    assert is_taken(opened, f"{thought}</think>{good}")
    assert is_taken(opened, f"{thought}</think>\n\n{good}")
    assert is_taken(opened, thought) is None  # and may not end there
    assert is_taken(opened, f"{thought}</think>{bad}") is False
    assert is_taken(may, f"<think>{thought}</think>\n{good}")
    assert is_taken(may, good)
    assert is_taken(may, bad) is False
