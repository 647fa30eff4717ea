"""The tokens of prompts and the text of tokens, by the base or by an adapter's own text side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from lora_runtime.engine.client import EngineInfo
from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import InvalidRequest
from lora_runtime.text.chat_output import template_of
from lora_runtime.text.chat_prompt import ChatPrompt, shown_tools
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.text_workers import OwnText
from lora_runtime.text.token_reader import TokenReader
from lora_runtime.text.tokenizer import Tokenizer
from loramux.server.calls import Prompt, PromptLimits, TextPrompt, TokenPrompt

T = TypeVar("T")

NUM_TOKENISERS = 4
STUCK_S = 10.0
"""Far longer than any one prompt takes."""
LONG_TEXT = 2_000
"""Characters or token ids from which tokenising leaves the event loop; below, a thread costs more.
"""
HUGE_TEXT = 1 << 18
"""Characters from which texts are tokenised one at a time: what is made of one takes fifty times
its size."""
MAX_WAITING_HUGE = 64
MIN_BYTES_PER_TOKEN = 128
"""A prompt may have so many bytes for each token that fits, if the base's longest has no more: an
adapter may add tokens."""


class Prompts:
    """Makes the tokens of prompts, long ones in threads of its own."""

    def __init__(self, tokenizer: Tokenizer, own_text: OwnText, info: EngineInfo) -> None:
        self._tokenizer = tokenizer
        self._own_text = own_text
        self._vocab_size = info.base.vocab_size
        self._tokenisers = WorkerPool(
            "tokenising", num_threads=NUM_TOKENISERS, max_waiting=info.max_queued_requests
        )
        self._huge_texts = WorkerPool(
            "tokenising long texts", num_threads=1, max_waiting=MAX_WAITING_HUGE
        )
        num_tokens = info.token_limit() - 1
        longest = max(tokenizer.longest_token, MIN_BYTES_PER_TOKEN)
        self.limits = PromptLimits(num_tokens, num_tokens * longest)

    async def tokenize(self, prompt: Prompt, side: TextSide | None = None) -> list[int]:
        """Return a prompt's token ids, as an adapter's own text side makes them or as the base.

        Raises InvalidRequest naming the prompt's field.
        """
        if prompt.is_empty:
            raise InvalidRequest(f"{prompt.field} is empty", field=prompt.field)
        match prompt:
            case TextPrompt(text=text) if side is not None and side.tokenizer is not None:
                return await self._own_text.encode(side, text)
            case TextPrompt(text=text) if len(text) < LONG_TEXT:
                return self._tokenizer.encode(text)
            case TextPrompt(text=text):
                return await self._tokenised(len(text), self._tokenizer.encode, text)
            case ChatPrompt():
                return await self._rendered(prompt, side)
            case TokenPrompt(token_ids=token_ids) if len(token_ids) < LONG_TEXT:
                return self._checked(token_ids)
            case TokenPrompt(token_ids=token_ids):
                return await self._tokenised(0, self._checked, token_ids)

    def detokenize(
        self, token_ids: tuple[int, ...], side: TextSide | None = None, field: str = "token_ids"
    ) -> str:
        """Return the text of token ids, as an adapter's own text side has them or as the base.

        Raises InvalidRequest naming `field`.
        """
        decoder = self._tokenizer.with_added(side.added if side else None)
        return decoder.decode(self._checked(token_ids, field))

    def token_reader(self, side: TextSide | None) -> TokenReader:
        """Return what gives each token's bytes, as an adapter's own text side has them."""
        return self._tokenizer.token_reader(side.added if side else None)

    def is_stuck(self) -> bool:
        """Tell whether conversations wait that nobody renders: none is answered then."""
        return self._tokenisers.is_stuck(STUCK_S)

    async def _rendered(self, prompt: ChatPrompt, side: TextSide | None) -> list[int]:
        """A conversation's token ids, by an adapter's own text side or by the base's template."""
        messages, variables = prompt.messages, prompt.template_variables
        tools = shown_tools(prompt, template_of(prompt, self._tokenizer, side))
        if side is None or not side.renders_chats:
            size = sum(len(message.get("content") or "") for message in messages)
            apply = partial(self._tokenizer.apply_chat_template, tools=tools, variables=variables)
            return await self._tokenised(size, apply, messages)
        rendered = await self._own_text.render(side, messages, tools, variables)
        if isinstance(rendered, list):
            return rendered
        return await self._tokenised(len(rendered), self._tokenizer.encode_rendered, rendered)

    async def _tokenised(
        self, num_characters: int, function: Callable[[T], list[int]], prompt: T
    ) -> list[int]:
        pool = self._tokenisers if num_characters < HUGE_TEXT else self._huge_texts
        return await pool.run(function, prompt)

    def _checked(self, token_ids: tuple[int, ...], field: str = "token_ids") -> list[int]:
        vocab_size = self._vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            wrong = (i for i, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size)
            index = next(wrong)
            raise InvalidRequest(
                f"{field}[{index}] is {token_ids[index]}; the base has {vocab_size} tokens",
                field=field,
            )
        return list(token_ids)
