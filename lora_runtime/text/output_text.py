"""One request's outputs as text, up to a stop string and without the token that ended it, and what
of the text is thought, said and called.
"""

from __future__ import annotations

from lora_runtime.core import FinishReason, StepOutput
from lora_runtime.text.chat_output import AnswerParts, AnswerReader
from lora_runtime.text.detokenizer import Detokenizer


class OutputText:
    """The text of one request while its outputs come. `finish_reason` says why the request ends
    with what was pushed last; None: it goes on.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop_token_ids: frozenset[int], reader: AnswerReader
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self._detokenizer = detokenizer
        self._stop_token_ids = stop_token_ids
        self._reader = reader

    @property
    def num_reasoning_tokens(self) -> int:
        return self._reader.num_reasoning_tokens

    def push(self, output: StepOutput) -> AnswerParts:
        """Return what the output adds."""
        text = self._detokenizer.push(self._shown(output))
        reason = output.finish_reason
        if self._detokenizer.stopped:
            reason = FinishReason.STOP
        elif reason is not None:
            text += self._detokenizer.flush()
        parts = self._reader.push(text, len(output.token_ids), is_last=reason is not None)
        if self._reader.is_over and reason in (None, FinishReason.LENGTH):
            reason = FinishReason.STOP
        self.finish_reason = None if reason is None else self._reader.reason(reason)
        return parts

    def _shown(self, output: StepOutput) -> tuple[int, ...]:
        """The tokens whose text is shown: all but the stop token that ended the output."""
        token_ids = output.token_ids
        ends_here = output.finish_reason is FinishReason.STOP and token_ids
        if ends_here and token_ids[-1] in self._stop_token_ids:
            return token_ids[:-1]
        return token_ids
