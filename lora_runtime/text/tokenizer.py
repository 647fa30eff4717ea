"""Text to token ids and back, chat templates, and which tokens of an example are to be learned.

Chat templates are foreign code. They run in jinja2's ImmutableSandboxedEnvironment alone, through
`transformers.utils.chat_template_utils`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_runtime.errors import BaseRefused, DataError, InvalidRequest
from lora_runtime.text.heard_messages import check_heard
from lora_runtime.text.messages import (
    Message,
    as_templates_want,
    check_plain_messages,
    check_variables,
)
from lora_runtime.text.structured_output import Vocabulary
from lora_runtime.text.token_reader import TokenReader, vocabulary_bytes

NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})


class Tokenizer:
    """The base's own tokenizer, read from its checkpoint folder."""

    def __init__(self, inner: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> None:
        self._inner = inner
        self.eos_token_ids = eos_token_ids
        """The ids that end an output: the tokenizer's and those of the folder's configs."""

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer in `folder`; no network, no code from the folder.

        Raises BaseRefused when there is none, it needs code of its own or is written in Python.
        """
        try:
            inner = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            raise BaseRefused(f"no usable tokenizer in {folder}: {error}") from error
        if getattr(inner, "backend_tokenizer", None) is None:
            raise BaseRefused(
                f"no usable tokenizer in {folder}: {type(inner).__name__} is written in Python; "
                "only those that the tokenizers library runs, as from tokenizer.json, are served"
            )
        configured = configured_eos_ids(folder)
        own = () if inner.eos_token_id is None else (inner.eos_token_id,)
        return cls(inner, configured.union(own))

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return len(self._inner)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token as the vocabulary writes it: no token's text has more."""
        return max(len(token.encode()) for token in self._inner.get_vocab())

    def vocabulary(self, vocab_size: int) -> Vocabulary | None:
        """The texts of a base's `vocab_size` tokens, for structured output; None where they are no
        bytes of their own. Takes some tenths of a second.
        """
        found = vocabulary_bytes(self._inner.backend_tokenizer, vocab_size)
        return None if found is None else Vocabulary(*found, encode=self.encode_rendered)

    @property
    def has_chat_template(self) -> bool:
        return self._inner.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw prompt, with the leading token if the base expects one."""
        return self._encode(text, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids` without special tokens; invalid UTF-8 becomes U+FFFD."""
        # Not `_inner.decode`: it looks at every id in Python first, for each token of each stream.
        backend = self._inner.backend_tokenizer
        return str(backend.decode(list(token_ids), skip_special_tokens=True))

    def with_added(self, added: Iterable[tuple[int, str, bool]] | None) -> TokenDecoder | Tokenizer:
        """A decoder with other added tokens, each (id, text, whether special); None: the base's."""
        return self if added is None else TokenDecoder(self._inner, added)

    def token_reader(self, added: Iterable[tuple[int, str, bool]] | None = None) -> TokenReader:
        """What gives the bytes of each token; `added` as for `with_added`."""
        return TokenReader(self._inner.backend_tokenizer, added)

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a conversation that a template has rendered, special tokens included. Raises
        InvalidRequest (field `messages`).
        """
        return self._encode(text, add_special_tokens=False, field="messages")

    def chat_template(self, *, has_tools: bool = False) -> str | None:
        """The base's chat template; of several the one for tools where there are some."""
        template: str | dict[str, str] | None = self._inner.chat_template
        if not isinstance(template, dict):
            return template
        return template.get("tool_use" if has_tools and "tool_use" in template else "default")

    @cached_property
    def added_tokens(self) -> tuple[tuple[int, str, bool], ...]:
        """(id, text, whether it is special) of each added token."""
        backend = self._inner.backend_tokenizer
        added = backend.get_added_tokens_decoder()
        return tuple(
            (index, backend.id_to_token(index), token.special) for index, token in added.items()
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> list[int]:
        """Token ids of a conversation in the base's own template.

        tools: in the shape of OpenAI's API; variables: what the template sees beside them.
        The base's template runs in this process: the operator has chosen it with the base.

        Raises InvalidRequest (field `messages`): there is no template or it does not compile, a
        role or key is unknown, or the template itself refuses the messages or leaves one out.
        """
        check_variables(variables, self._inner.special_tokens_map)
        given = {**variables, "tools": list(tools) or None}
        turns = as_templates_want(messages)
        rendered = self._render(turns, add_generation_prompt, given)
        check_heard(turns, lambda marked: self._render(marked, add_generation_prompt, given))
        return self.encode_rendered(rendered)

    def split_chat(
        self, messages: Sequence[Message], learned: Sequence[bool] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and True for each token the assistant produces.

        `learned` has False for each message that is context only; None: all may be learned. A first
        message by the assistant is context too, because no prompt asks for it. An end token at the
        end of the assistant's text counts as the template's own and is not written twice.

        The tokens of a turn are those after the prompt that serving would send, up to the
        end-of-turn token. Raises DataError when that prompt is no prefix of the conversation (the
        template rewrites earlier turns), when a turn to be learned is empty, or when there is none.
        """
        messages = [self._without_end(message) for message in messages]
        try:
            check_plain_messages(messages)
            token_ids = self.apply_chat_template(messages, add_generation_prompt=False)
            mask = [False] * len(token_ids)
            for start, end in self._assistant_spans(messages, learned, token_ids):
                mask[start:end] = [True] * (end - start)
        except InvalidRequest as error:
            raise DataError(error.message, field=error.field) from error
        if not any(mask):
            raise DataError(
                "no message of role assistant to learn from: there is none, or it is the first, "
                "which no prompt asks for, or its weight is 0",
                field="messages",
            )
        return token_ids, mask

    def split_completion(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        """Token ids of a prompt and its completion, and True for the completion's tokens.

        The prompt's ids are those that serving sends. The completion ends with one end token, its
        own or else the tokenizer's. Raises DataError when the completion is nothing else.
        """
        text, end = self._split_end(completion)
        if not text.strip():
            raise DataError("the completion is nothing but the end token; fill or remove it")
        if end is None:
            raise DataError("the base's tokenizer has no end token, so a completion cannot end")
        prompt_ids = self.encode(prompt)
        target_ids = [*self._encode(text, add_special_tokens=False), end]
        if prompt_ids == target_ids[:1] == [self._inner.bos_token_id]:
            del target_ids[0]  # the text brings the leading token along
        return prompt_ids + target_ids, [False] * len(prompt_ids) + [True] * len(target_ids)

    def _without_end(self, message: Message) -> Message:
        """An assistant's message without the end tokens after its text, which templates add."""
        if message.get("role") != "assistant" or not isinstance(message.get("content"), str):
            return message
        return {**message, "content": self._split_end(message["content"])[0]}

    def _split_end(self, text: str) -> tuple[str, int | None]:
        """A text without the end tokens after it, and the first of them, or else the tokenizer's.

        White space after an end token is removed with it.
        """
        end = self._inner.eos_token_id
        while found := next(filter(text.rstrip().endswith, self._end_texts), None):
            text, end = text.rstrip().removesuffix(found), self._end_texts[found]
        return text, end

    @cached_property
    def _end_texts(self) -> dict[str, int]:
        """Text → id of every token that ends an output."""
        texts = {str(self._inner.decode(token_id)): token_id for token_id in self.eos_token_ids}
        return {text: token_id for text, token_id in texts.items() if text.strip()}

    def _encode(self, text: str, *, add_special_tokens: bool, field: str = "text") -> list[int]:
        try:
            return list(
                self._inner.encode(text, add_special_tokens=add_special_tokens, verbose=False)
            )
        except (TypeError, UnicodeError):  # half of a surrogate pair, which no UTF-8 has
            raise InvalidRequest(f"{field} is not valid Unicode", field=field) from None

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        if not self.has_chat_template:
            raise _refused("the base has no chat template; send text or token ids instead")
        try:
            return str(
                self._inner.apply_chat_template(
                    messages,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **variables,
                )
            )
        except Exception as error:  # a template is foreign code and may raise anything
            raise _refused(f"the base's chat template refuses the messages: {error}") from error

    def _assistant_spans(
        self, messages: Sequence[Message], learned: Sequence[bool] | None, token_ids: list[int]
    ) -> Iterator[tuple[int, int]]:
        """Begin and end, in `token_ids`, of each of the assistant's turns that is to be learned."""
        for index, message in enumerate(messages):
            is_learned = message["role"] == "assistant" and (learned is None or learned[index])
            if not index or not is_learned:
                continue
            if not message["content"].strip():
                raise DataError(
                    f"messages[{index}]: the assistant says nothing, so there is nothing to learn; "
                    "fill it, remove it, or give it the weight 0",
                    field="messages",
                )
            turns = [dict(other) for other in messages[: index + 1]]
            prompt = self.encode_rendered(self._render(turns[:-1], True, NO_VARIABLES))
            turn = self.encode_rendered(self._render(turns, False, NO_VARIABLES))
            if not _is_prefix(prompt, turn) or not _is_prefix(turn, token_ids):
                raise DataError(
                    f"messages[{index}]: the base's template renders this turn differently in "
                    "training and in serving. Split the conversation into single turns and remove "
                    "leading white space from the assistant's text.",
                    field="messages",
                )
            yield len(prompt), self._turn_end(turn, len(prompt))

    def _turn_end(self, turn: list[int], start: int) -> int:
        """Index after the turn's last end token; templates may add a line break behind it."""
        ends = [index for index in range(start, len(turn)) if turn[index] in self.eos_token_ids]
        return ends[-1] + 1 if ends else len(turn)


class TokenDecoder:
    """Decodes as the base's tokenizer does, but with an adapter's added tokens."""

    def __init__(
        self, inner: PreTrainedTokenizerBase, added: Iterable[tuple[int, str, bool]]
    ) -> None:
        backend = inner.backend_tokenizer
        self._model, self._decoder = backend.model, backend.decoder
        self._added = {index: "" if special else text for index, text, special in added}

    def decode(self, token_ids: Sequence[int]) -> str:
        """As `Tokenizer.decode`. Source: tokenizers, `TokenizerImpl::decode`."""
        named = (self._added.get(i, self._model.id_to_token(i)) for i in token_ids)
        tokens = [token for token in named if token]
        return " ".join(tokens) if self._decoder is None else self._decoder.decode(tokens)


def _is_prefix(prefix: list[int], whole: list[int]) -> bool:
    return whole[: len(prefix)] == prefix


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, field="messages")


def configured_eos_ids(folder: Path) -> frozenset[int]:
    """End tokens that the generation config and the config of a base's folder name."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)
