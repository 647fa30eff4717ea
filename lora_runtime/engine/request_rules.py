"""What a request may say, wherever it comes from: over gRPC, or from `LLM` in this process.

Pure functions of names, weights, texts and facts; what a composition computes is the engine's
affair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.core import (
    AdapterChoice,
    AdapterUse,
    SamplingParams,
    activation_start,
    is_whole,
)
from lora_runtime.errors import InvalidRequest, written
from lora_runtime.text.text_side import TextSide

MAX_ADAPTERS = 8
MAX_WEIGHT = 100.0
"""Far beyond any useful strength, and small enough that products stay finite."""
MAX_OUTPUTS = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256


def check_count(num_choices: int) -> None:
    """Raise InvalidRequest (field `adapters`) for more than may act on one request."""
    if num_choices > MAX_ADAPTERS:
        raise InvalidRequest(
            f"adapters names {num_choices}; at most {MAX_ADAPTERS} may act on one request",
            field="adapters",
        )


def check_choices(choices: Sequence[AdapterChoice]) -> None:
    """Refuse too many adapters, one named twice, and a weight that is no number in range.

    Raises InvalidRequest naming the field: `adapters`, `adapters[i].name`, `adapters[i].weight`.
    """
    check_count(len(choices))
    seen: set[str] = set()
    for index, choice in enumerate(choices):
        if choice.name in seen:
            field = f"adapters[{index}].name"
            raise InvalidRequest(
                f"{field} is {choice.name!r} once more; name it once, with the sum of its weights",
                field=field,
            )
        seen.add(choice.name)
        _check_weight(choice.weight, f"adapters[{index}].weight")


def check_stops(stops: Sequence[str]) -> None:
    """Refuse too many stop texts, an empty one, which every output would begin with, and one that
    is too long. Raises InvalidRequest naming `sampling.stop` or `sampling.stop[i]`.
    """
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(
            f"sampling.stop has {len(stops)} texts; at most {MAX_STOPS} are allowed",
            field="sampling.stop",
        )
    for index, stop in enumerate(stops):
        field = f"sampling.stop[{index}]"
        if not isinstance(stop, str):
            raise InvalidRequest(f"{field} is {written(stop)}; it must be a text", field=field)
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise InvalidRequest(
                f"{field} has {len(stop)} characters; it must have 1 to {MAX_STOP_LENGTH}",
                field=field,
            )


def check_num_outputs(num_outputs: int) -> None:
    """Raise InvalidRequest (field `sampling.n`) for what is no number of outputs."""
    if not is_whole(num_outputs) or not 1 <= num_outputs <= MAX_OUTPUTS:
        raise InvalidRequest(
            f"sampling.n is {num_outputs!r}; it must be a whole number from 1 to {MAX_OUTPUTS}",
            field="sampling.n",
        )


def logit_bias(biases: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """Return a mapping of token ids to biases as SamplingParams has it. Raises InvalidRequest
    (field `sampling.logit_bias`) for what cannot be one; the rest is checked there.
    """
    if not isinstance(biases, Mapping) or not all(map(is_whole, biases)):
        raise InvalidRequest(
            f"sampling.logit_bias is {written(biases)}; it must map token ids to numbers",
            field="sampling.logit_bias",
        )
    return tuple(sorted(biases.items()))


def params_of_outputs(sampling: SamplingParams, num_outputs: int) -> list[SamplingParams]:
    """Return the parameters of each output of one prompt.

    The first has those that were given, so that it is what a request for one output gets; the
    others draw by seeds made from its seed and their index, and leave the prompt's log
    probabilities to it.
    """
    others = [
        replace(sampling, seed=_seed_of(sampling.seed, index), num_prompt_logprobs=None)
        for index in range(1, num_outputs)
    ]
    return [sampling, *others]


def _seed_of(seed: int | None, index: int) -> int | None:
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1  # below 2^63, as seeds are


def uses(digests: Iterable[str], choices: Sequence[AdapterChoice]) -> tuple[AdapterUse, ...]:
    """Return what the engine is told: each content once, in an order that names do not change.

    `digests`: the choices' contents, in their order. Two names of the same content act as one
    adapter with the sum of their weights.
    """
    weights: dict[str, float] = {}
    for digest, choice in zip(digests, choices, strict=True):
        weights[digest] = weights.get(digest, 0.0) + choice.weight
    return tuple(AdapterUse(digest=digest, weight=w) for digest, w in sorted(weights.items()))


def shared_side(
    sides: Mapping[str, TextSide | None], *, field: str, advice: str = ""
) -> TextSide | None:
    """Return the text side that the adapters of a request share; None is the base's.

    `sides`: name → the adapter's own; `advice`: what else than other adapters helps. Raises
    InvalidRequest naming `field` where they differ: a prompt has one tokenizer, one template and
    one set of end tokens, and which is the caller's to say.
    """
    names = {side.key if side else "": name for name, side in sides.items()}
    if len(names) > 1:
        raise InvalidRequest(
            f"{', '.join(map(repr, sorted(names.values())))} bring different text: tokens, chat "
            f"templates or end tokens; {advice}compose adapters of one text",
            field=field,
        )
    return next(iter(sides.values()), None)


def with_ends(
    sampling: SamplingParams, end_token_ids: Iterable[int], vocab_size: int
) -> SamplingParams:
    """Return parameters by which end tokens stop the output too; a base cannot give those that lie
    beyond its vocabulary.
    """
    ends = {token for token in end_token_ids if token < vocab_size}
    return replace(sampling, stop_token_ids=frozenset(sampling.stop_token_ids) | ends)


def request_notes(facts: Mapping[str, AdapterFacts], token_ids: Sequence[int]) -> Iterator[str]:
    """Yield what the caller should know: adapters, of those by name, that were not invoked."""
    outcome = "the base answers" if len(facts) == 1 else "it does not act"
    for name, each in facts.items():
        wanted = each.invocation_tokens
        if wanted and activation_start(token_ids, wanted) is None:
            yield (
                f"adapter {name!r} was not invoked: its invocation tokens are not in the "
                f"prompt; {outcome}"
            )


def _check_weight(weight: float, field: str) -> None:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (is_number and -MAX_WEIGHT <= weight <= MAX_WEIGHT):  # so written, NaN is refused too
        raise InvalidRequest(
            f"{field} is {written(weight)}; it must be from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}",
            field=field,
        )
