"""One request's outputs as text, up to a stop string and without the token that ended it."""

from __future__ import annotations

from lora_runtime.core import FinishReason, StepOutput
from lora_runtime.text.detokenizer import Detokenizer


class OutputText:
    """The text of one request while its outputs come."""

    def __init__(self, detokenizer: Detokenizer, stop_token_ids: frozenset[int]) -> None:
        self._detokenizer = detokenizer
        self._stop_token_ids = stop_token_ids

    def finish_reason(self, output: StepOutput) -> FinishReason | None:
        """Return why the request ends with this output, pushed before, or None."""
        return FinishReason.STOP if self._detokenizer.stopped else output.finish_reason

    def push(self, output: StepOutput) -> str:
        """Return the text that the output adds."""
        text = self._detokenizer.push(self._shown(output))
        if output.finish_reason is not None and not self._detokenizer.stopped:
            text += self._detokenizer.flush()
        return text

    def _shown(self, output: StepOutput) -> tuple[int, ...]:
        """The tokens whose text is shown: all but the stop token that ended the output."""
        token_ids = output.token_ids
        ends_here = output.finish_reason is FinishReason.STOP and token_ids
        if ends_here and token_ids[-1] in self._stop_token_ids:
            return token_ids[:-1]
        return token_ids
