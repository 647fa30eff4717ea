"""A vocabulary's bytes against its own decoder; what definitions are refused, and by what name."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from lora_runtime.core import StructuredOutput, StructureKind
from lora_runtime.errors import InvalidRequest, UnsupportedFeature
from lora_runtime.text import structure_compiler
from lora_runtime.text.structure_compiler import StructureCompiler
from lora_runtime.text.structured_output import (
    MAX_BYTES,
    Matcher,
    Structure,
    Vocabulary,
    compile_grammar,
    grammar_of,
    token_masks,
)
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.thinking import Tags, Thinking
from lora_runtime.text.token_reader import vocabulary_bytes
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.text.worker_processes import LimitExceeded
from tests.tiny_tokenizer import VOCAB_SIZE, write_tokenizer

ASCII = [chr(i) for i in range(32, 127)]


def byte_fallback() -> Backend:
    """A vocabulary as SentencePiece makes them."""
    names = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", "▁the", "the", "é", "▁▁", *(c for c in ASCII if c != " ")]
    vocabulary = {token: i for i, token in enumerate([*names, *words])}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def vocabulary(tiny: Path) -> Vocabulary:
    found = Tokenizer.load(tiny).vocabulary(VOCAB_SIZE + 7)  # a base may have more rows
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_bytes_are_what_the_tokenizer_decodes(kind: str, tiny: Path) -> None:
    is_level = kind == "byte level"
    backend = Backend.from_file(str(tiny / "tokenizer.json")) if is_level else byte_fallback()
    size = backend.get_vocab_size()
    found = vocabulary_bytes(backend, size + 3)
    assert found is not None
    tokens, special = found
    assert tokens[size:] == [b""] * 3
    rng = random.Random(kind)
    plain = [i for i in range(size) if i not in special]
    for _ in range(300):
        ids = rng.choices(plain, k=rng.randint(1, 12))
        text = b"".join(tokens[i] for i in ids)
        try:
            expected = text.decode()
        except UnicodeDecodeError:
            continue  # decoders differ in how they show what is no UTF-8
        assert backend.decode(ids) == expected


def test_a_vocabulary_without_bytes_is_none() -> None:
    words = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert vocabulary_bytes(words, 2) is None
    words.decoder = decoders.ByteLevel()
    assert vocabulary_bytes(words, 2) is None


def texts_of(vocabulary: Vocabulary, form: StructuredOutput, seed: int) -> str:
    """A random text of a form, token by token."""
    matcher = Matcher(compile_grammar(grammar_of(form), vocabulary), frozenset())
    rng, text = np.random.default_rng(seed), b""
    while not matcher.is_complete and not (matcher.can_end and rng.random() < 0.3):
        allowed = np.flatnonzero(token_masks([matcher], vocabulary.size)[0])
        token = int(rng.choice(allowed))
        assert token not in vocabulary.special_ids and vocabulary.tokens[token]
        matcher.take(token)
        text += vocabulary.tokens[token]
    assert not matcher.error
    return text.decode()


@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-z]{2,5}@[a-z]+\.(com|org)",
        r"(?i)yes|no",
        r"^[0-9]{4}-[0-9][05]$",
        r'"[^"]{0,6}"',
        r"(a|ab)(c|bcd)?(d*)",
        r"[^\x00-\x7f]{1,3}",
    ],
)
def test_expressions_are_those_of_python(pattern: str, vocabulary: Vocabulary) -> None:
    for seed in range(20):
        text = texts_of(vocabulary, StructuredOutput.of({"regex": pattern}), seed)
        assert re.fullmatch(pattern, text)


def test_choices_are_taken_as_they_are(vocabulary: Vocabulary) -> None:
    choices = ["a", "ab", "(x)*[y]+{2}|^$", "new\nline", 'q"\\', "é狐", "a/b", "<|im_end|>"]
    form = StructuredOutput.of({"choice": choices})
    found = {texts_of(vocabulary, form, seed) for seed in range(200)}
    assert found <= {*choices} and len(found) >= len(choices) - 1


def test_white_space_in_json_has_bounds(vocabulary: Vocabulary) -> None:
    form = StructuredOutput.of({"json_schema": {"type": "array", "items": {"const": 1}}})
    for seed in range(30):
        text = texts_of(vocabulary, form, seed)
        assert set(json.loads(text)) <= {1}
        assert not re.search(r"  |\n\n|\n[ \t]{21}", re.sub(r"\n[ \t]{0,20}", "", text))


@pytest.mark.parametrize(
    ("kind", "definition", "said"),
    [
        ("json_schema", "{", "no JSON"),
        ("json_schema", "[1]", "no JSON schema"),
        ("json_schema", "true", "must be an object"),
        ("json_schema", '{"minimum": NaN}', "cannot be served"),
        ("json_schema", '{"const": "\\ud800"}', "cannot be served"),
        ("grammar", '{"grammars": []}', "no Lark"),
        ("grammar", ' {"grammars": [1]}', "no Lark"),
        ("json_schema", "[" * 65 + "]" * 65, "65 deep"),
        ("json_schema", '"' + "x" * MAX_BYTES + '"', "bytes"),
        ("grammar", " ", "empty"),
        ("grammar", "\ud800", "Unicode"),
        ("choice", "[]", "texts"),
        ("choice", '["a", ""]', "empty"),
        ("choice", "{", "JSON"),
    ],
)
def test_a_definition_is_refused_by_name(kind: str, definition: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        grammar_of(StructuredOutput(StructureKind(kind), definition))
    assert str(caught.value.field).startswith(f"sampling.structured_output.{kind}")


@pytest.mark.parametrize(
    "given", [{}, {"regex": "a", "choice": []}, {"xml": "a"}, {"json_object": 1}, {"regex": 5}]
)
def test_a_mapping_names_one_form(given: dict) -> None:
    with pytest.raises(InvalidRequest):
        StructuredOutput.of(given)


@pytest.fixture
def compiler(tiny: Path) -> Iterator[StructureCompiler]:
    tokenizer = Tokenizer.load(tiny)
    compiler = StructureCompiler(lambda: tokenizer.vocabulary(VOCAB_SIZE))
    yield compiler
    compiler.close()


def test_answers_are_remembered_and_a_dead_process_is_replaced(
    compiler: StructureCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(pattern: str) -> bool:
        try:
            asyncio.run(compiler.compile(StructuredOutput.of({"regex": pattern})))
        except InvalidRequest as error:
            assert error.field == "sampling.structured_output.regex"
            return False
        return True

    async def too_late(_work: object) -> None:
        raise LimitExceeded

    assert served("a+") and not served("(?=a)")
    for process in compiler._processes._processes:
        if process._running is not None:
            process._running.kill()
            process._running.wait()
    with monkeypatch.context() as patch:
        patch.setattr(compiler._processes, "run", None)
        assert served("a+") and not served("(?=a)")  # without a process
    assert served("b+")
    with monkeypatch.context() as patch:
        patch.setattr(compiler._processes, "run", too_late)
        assert not served("c+")
    assert not served("c+")  # for a while
    monkeypatch.setattr(structure_compiler, "PENALTY_S", -1.0)
    compiler._refused_until = {key: 0.0 for key in compiler._refused_until}
    assert served("c+")


def test_an_owner_neither_finds_nor_displaces_what_another_has_compiled(
    compiler: StructureCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []
    held: list[bool] = []
    """Places that were entered: True while held."""

    @asynccontextmanager
    async def place() -> AsyncIterator[None]:
        held.append(True)
        yield
        held[-1] = False

    async def accepted(work: object) -> dict[str, object]:
        assert held[-1]
        tried.append(work)
        return {}

    def compile_for(owner: str, pattern: str) -> bool:
        """Whether it had to be tried."""
        num_tried, num_held = len(tried), len(held)
        form = StructuredOutput.of({"regex": pattern})
        asyncio.run(compiler.compile(form, owner=owner, place=place()))
        assert len(held) - num_held == len(tried) - num_tried
        return len(tried) > num_tried

    monkeypatch.setattr(compiler._processes, "run", accepted)
    monkeypatch.setattr(structure_compiler, "MAX_REMEMBERED", 12)
    assert compile_for("modest", "a") and compile_for("greedy", "a"), "each has its own"
    assert compile_for("modest", "b")
    for index in range(40):
        assert compile_for("greedy", f"a{{{index + 1}}}")
    assert not compile_for("modest", "a") and not compile_for("modest", "b")
    assert not compile_for("greedy", "a{40}") and compile_for("greedy", "a{20}")
    assert len(compiler._known) == 12


def test_a_form_after_a_thought_is_another_than_the_form_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two tenants ask for one form, with a thought that the prompt opened, with one that the model
    may open, and without: whoever asks first, each gets its own.
    """
    form = StructuredOutput.of({"choice": ["yes", "no"]})
    texts = {"yes", "no", "so</think>yes", "</think>\n\nno", "<think>so</think>no"}
    tags = Tags("<think>", "</think>")
    allowed: list[tuple[Thinking | None, set[str]]] = [
        (None, {"yes", "no"}),
        (Thinking(tags, True, {}), texts - {"yes", "no"}),
        (Thinking(tags, False, {}), {"yes", "no", "<think>so</think>no"}),
    ]
    asked = [(owner, *case) for case in allowed for owner in ("acme", "other")]
    random.Random(0).shuffle(asked)
    num_bytes = 256
    vocabulary = Vocabulary([*(bytes([i]) for i in range(num_bytes)), b"<end>"], [num_bytes])

    def is_written(structure: Structure, text: str) -> bool:
        matcher = structure.start()
        for byte in text.encode():
            if not token_masks([matcher], vocabulary.size)[0][byte]:
                return False
            matcher.take(byte)
        return matcher.can_end

    with closing(StructureCompiler(lambda: vocabulary)) as compiler:
        for owner, thinking, _ in asked:
            asyncio.run(compiler.compile(form, None, thinking, owner=owner))
        monkeypatch.setattr(compiler._processes, "run", None)  # nothing known is tried again
        for owner, thinking, expected in asked:
            structure = asyncio.run(compiler.compile(form, None, thinking, owner=owner))
            assert {text for text in texts if is_written(structure, text)} == expected


def test_tokens_of_another_text_are_not_drawn(
    compiler: StructureCompiler, vocabulary: Vocabulary
) -> None:
    """An adapter may give a token of the base another text, or make it special."""
    named = vocabulary.tokens.index(b"a")
    added = ((0, "<|endoftext|>", True), (1, "<tool>", True), (named, "a", True))
    assert vocabulary.differing(added) == {1, named}
    side = TextSide(
        template=None,
        variables={},
        is_own_template=False,
        tokenizer="",
        added=added,
        eos_token_ids=(),
    )
    structure = asyncio.run(compiler.compile(StructuredOutput.of({"regex": "a"}), side))
    assert structure.start().excluded == {1, named}


def test_a_base_without_bytes_serves_no_structured_output() -> None:
    compiler = StructureCompiler(lambda: None)
    with pytest.raises(UnsupportedFeature):
        asyncio.run(compiler.compile(StructuredOutput.of({"regex": "a"})))
    compiler.close()
