"""The form that an output must have: its definition as a grammar, and a matcher that follows it.

llguidance does the work: a definition becomes a grammar, which says after every token which of the
vocabulary's may follow. It takes less than a millisecond for most definitions and 10 to 100 µs a
token, releases the interpreter's lock meanwhile and has limits of its own, LIMITS. What it cannot
hold an output to, such as `uniqueItems`, it refuses by name.

A definition comes from a client. `worker_processes.py` has processes where it is tried first, and
which are killed when it takes too much (`structure_compiler.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from lora_runtime.core import StructuredOutput, StructureKind
from lora_runtime.errors import InvalidRequest, written

MAX_BYTES = 128 << 10
"""Bytes of a definition in UTF-8."""
MAX_NESTING = 64
"""Brackets of a JSON schema that may be open at once."""
MAX_CHOICES = 1000
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,  # about 7 ms
    step_max_items=20_000,  # about 1 ms
    max_lexer_states=20_000,  # of 1 to 2 KB
    max_grammar_size=50_000,
    verbose_errors=False,
)
WHITESPACE = r"( |\n[ \t]{0,20})?"
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": WHITESPACE, "lenient": False}
"""Between the parts of a JSON text stand at most a space, or a line break and an indentation: with
any white space allowed a model may write nothing else to the end."""

_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)
_META = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")
_GBNF_RULE = re.compile(r"^[ \t]*[\w.-]+[ \t]*::=", re.MULTILINE)
"""A rule in the dialect of llama.cpp. llguidance's translator of it is not used: it makes terminals
of rules, which take all that they can, and so loses texts of the grammar.
"""
_WORD_BITS = 32


def field_of(form: StructuredOutput) -> str:
    """The name of the definition in requests and in errors about it."""
    return f"sampling.structured_output.{form.kind}"


def grammar_of(form: StructuredOutput) -> str:
    """A definition as a grammar of llguidance, which may still refuse it.

    Raises InvalidRequest naming the field: it is no text, empty, too long or too deep, no JSON, or
    a list of other things than texts.
    """
    text, field = form.definition, field_of(form)
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} is {written(text)}; it must be a text", field=field)
    try:
        num_bytes = len(text.encode())
    except UnicodeError:
        raise InvalidRequest(f"{field} is not valid Unicode", field=field) from None
    if num_bytes > MAX_BYTES:
        raise InvalidRequest(
            f"{field} has {num_bytes} bytes; at most {MAX_BYTES} are compiled", field=field
        )
    try:
        return _written_as_grammar(form, text, field)
    except ValueError as error:
        raise InvalidRequest(f"{field} cannot be served: {error}", field=field) from None


def _written_as_grammar(form: StructuredOutput, text: str, field: str) -> str:
    """Raises InvalidRequest, and ValueError for what llguidance cannot read at all, such as NaN or
    half a surrogate pair.
    """
    match form.kind:
        case StructureKind.JSON_OBJECT:
            return _json_grammar('{"type": "object"}')
        case StructureKind.JSON_SCHEMA:
            _check_schema(text, field)
            return _json_grammar(text)
        case StructureKind.CHOICE:
            return LLMatcher.grammar_from_regex("|".join(map(_literal, _choices(text, field))))
        case StructureKind.REGEX:
            return LLMatcher.grammar_from_regex(text)
        case StructureKind.GRAMMAR:
            if not text.strip():
                raise InvalidRequest(f"{field} is empty", field=field)
            if text.lstrip().startswith("{"):  # llguidance would take it for several, in its JSON
                raise InvalidRequest(f"{field} is no Lark: it begins with '{{'", field=field)
            if rule := _GBNF_RULE.search(text):
                raise InvalidRequest(
                    f"{field} has the rule {written(rule[0].strip())}, which is GBNF; write it in "
                    "llguidance's dialect of Lark, with `:` for `::=` and `start` for `root`",
                    field=field,
                )
            return LLMatcher.grammar_from_lark(text)


def _json_grammar(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)  # type: ignore[arg-type]


def _check_schema(text: str, field: str) -> None:
    depth = deepest = 0
    for found in _BRACKETS.finditer(text):
        depth += bool(found[1]) - bool(found[2])
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise InvalidRequest(
            f"{field} is nested {deepest} deep; at most {MAX_NESTING} are compiled", field=field
        )
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{field} is no JSON: {error}", field=field) from None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{field} is no JSON schema: it must be an object", field=field)


def _choices(text: str, field: str) -> list[str]:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} is no JSON list: {error}", field=field) from None
    if not isinstance(choices, list) or not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"{field} must be 1 to {MAX_CHOICES} texts", field=field)
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise InvalidRequest(f"{field}[{index}] must be a text, and not empty", field=field)
    return choices


def _literal(text: str) -> str:
    """A text as a regular expression."""
    return _META.sub(r"\\\g<0>", text)


class Vocabulary:
    """The texts of all tokens, as llguidance keeps them.

    Making one takes 0.2 s for 50,000 tokens and holds the interpreter's lock.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_ids: Collection[int],
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        """tokens: each id's bytes, empty where it has none.
        special_ids: those whose text is no part of an output, such as end tokens. encode: the
        tokenizer, so that text which a form leaves no choice in has the tokens that it gives; None
        takes the longest tokens.
        """
        self.tokens, self.special_ids = tokens, frozenset(special_ids)
        self.inner = LLTokenizer(TokenizerWrapper(_Tokens(tokens, self.special_ids, encode)))

    @property
    def size(self) -> int:
        return len(self.tokens)

    def differing(self, added: Iterable[tuple[int, str, bool]]) -> frozenset[int]:
        """Ids that have another text in a tokenizer with these added tokens, each (id, text,
        whether it is special).
        """
        return frozenset(
            index
            for index, text, is_special in added
            if index < self.size
            and (is_special, text.encode()) != (index in self.special_ids, self.tokens[index])
        )


class _Tokens:
    """What TokenizerWrapper asks for. The end of a text has an id after all others, so that the
    ids of real end tokens are the request's affair.
    """

    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_ids: frozenset[int],
        encode: Callable[[str], list[int]] | None,
    ) -> None:
        self.tokens = [*tokens, b"<end>"]
        self.eos_token_id = len(tokens)
        self.special_token_ids = sorted({*special_ids, self.eos_token_id})
        self._encode, self._special_ids = encode, special_ids
        self._ids = {t: i for i, t in enumerate(tokens) if t and i not in special_ids}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Tokens whose bytes are exactly the text's: a mask is wrong for any other."""
        if self._encode is not None:
            with suppress(UnicodeError):
                ids = self._encode(text.decode())
                is_exact = b"".join(self.tokens[i] for i in ids) == text
                if is_exact and self._special_ids.isdisjoint(ids):
                    return ids
        return list(self._longest_first(text))

    def _longest_first(self, text: bytes) -> Iterator[int]:
        start = 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                return  # no output of this vocabulary has the byte: the matcher finds no token
            yield self._ids[text[start:end]]
            start = end


class Matcher:
    """Where one output stands in its form."""

    def __init__(self, inner: LLMatcher, excluded: frozenset[int]) -> None:
        self._inner, self._excluded = inner, excluded
        self._failure = ""

    @property
    def inner(self) -> LLMatcher:
        return self._inner

    @property
    def excluded(self) -> frozenset[int]:
        """Tokens that have another text in the tokenizer in use, and are not drawn."""
        return self._excluded

    @property
    def is_complete(self) -> bool:
        """True once nothing may follow."""
        return self._inner.is_stopped() and not self._inner.is_error()

    @property
    def can_end(self) -> bool:
        """True where the output so far has the whole form; more may be allowed."""
        return self._inner.is_accepting()

    @property
    def error(self) -> str:
        """Why no token can be given any more: a limit was met, or what `fail` said."""
        return said_by(self._inner) if self._inner.is_error() else self._failure

    def fail(self, why: str) -> None:
        """End the output: no token can be given."""
        self._failure = why

    def take(self, token_id: int) -> None:
        """Go on by the output's next token."""
        self._inner.consume_token(token_id)


@dataclass(frozen=True, slots=True)
class Structure:
    """A compiled form. Each output that is to have it starts a matcher of its own."""

    _first: LLMatcher
    """Before any token, with the first mask computed; it is copied and never moves."""
    _excluded: frozenset[int] = frozenset()

    def start(self) -> Matcher:
        """A matcher before the first token."""
        return Matcher(self._first.deep_copy(), self._excluded)


def compile_grammar(grammar: str, vocabulary: Vocabulary) -> LLMatcher:
    """A matcher before the first token, warm. Raises ValueError with what is wrong."""
    matcher = LLMatcher(vocabulary.inner, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        mask = matcher.compute_bitmask()
        if not any(mask) and not matcher.is_error():
            raise ValueError("it allows no text")
    if matcher.is_error():
        raise ValueError(said_by(matcher))
    return matcher


def said_by(matcher: LLMatcher) -> str:
    """What a matcher says is wrong, without its inner state."""
    said = matcher.get_error().split("\n<non-verbose/>")[0].strip()
    return "it allows no text" if said.startswith("NoExtension") else said


@cache
def _executor() -> LLExecutor:
    return LLExecutor()


def token_masks(matchers: Sequence[Matcher], vocab_size: int) -> NDArray[np.uint8]:
    """(n, vocab) uint8: 1 where a token may follow.

    All matchers are of one vocabulary. The masks are computed side by side, without the
    interpreter's lock. A matcher that meets a limit has an `error` afterwards.
    """
    words = vocab_size // _WORD_BITS + 1  # the text's end has a bit after the last token's
    bits = np.zeros((len(matchers), words), dtype=np.int32)
    if len(matchers) == 1:
        matchers[0].inner.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    else:
        pairs = [(matcher.inner, index) for index, matcher in enumerate(matchers)]
        row_bytes = words * bits.itemsize
        _executor().unsafe_compute_mask_ptr(pairs, bits.ctypes.data, row_bytes, len(matchers))
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
    return allowed[:, :vocab_size]
