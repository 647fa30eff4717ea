"""The adapters of one request: which may stand together, and what follows from their content.

Pure functions of names, weights and records; what a composition computes is the engine's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_runtime.core import AdapterUse, activation_start
from lora_runtime.errors import InvalidRequest
from lora_runtime.text.text_side import TextSide
from server.calls import AdapterChoice, AdapterRecord

MAX_ADAPTERS = 8
MAX_WEIGHT = 100.0
"""Far beyond any useful strength, and small enough that products stay finite."""


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


def uses(
    records: Sequence[AdapterRecord], choices: Sequence[AdapterChoice]
) -> tuple[AdapterUse, ...]:
    """Return what the engine is told: each content once, in an order that names do not change.

    Two names of the same content act as one adapter with the sum of their weights.
    """
    weights: dict[str, float] = {}
    for record, choice in zip(records, choices, strict=True):
        weights[record.digest] = weights.get(record.digest, 0.0) + choice.weight
    return tuple(AdapterUse(digest=digest, weight=w) for digest, w in sorted(weights.items()))


def text_side(records: Sequence[AdapterRecord], uses_base_text: bool) -> TextSide | None:
    """Return the text side that a request's adapters share; None is the base's.

    Raises InvalidRequest (field `adapters`) where they bring different ones: a prompt has one
    tokenizer, one template and one set of end tokens, and which is the caller's to say.
    """
    if uses_base_text or not records:
        return None
    sides = {record.text.key if record.text else "": record.name for record in records}
    if len(sides) > 1:
        raise InvalidRequest(
            f"{', '.join(map(repr, sorted(sides.values())))} bring different text: tokens, chat "
            "templates or end tokens; set base_text to use the base's, or compose adapters of one "
            "text",
            field="adapters",
        )
    return records[0].text


def depth(records: Sequence[AdapterRecord]) -> int:
    """Return how many layers a request runs: the adapters' own, 0 for the base's."""
    return max((record.loaded.facts.num_layers for record in records if record.loaded), default=0)


def request_notes(records: Sequence[AdapterRecord], token_ids: Sequence[int]) -> Iterator[str]:
    """Yield what the caller should know: adapters that were not invoked."""
    outcome = "the base answers" if len(records) == 1 else "it does not act"
    for record in records:
        wanted = record.loaded.facts.invocation_tokens if record.loaded else ()
        if wanted and activation_start(token_ids, wanted) is None:
            yield (
                f"adapter {record.name!r} was not invoked: its invocation tokens are not in the "
                f"prompt; {outcome}"
            )


def _check_weight(weight: float, field: str) -> None:
    if not abs(weight) <= MAX_WEIGHT:  # so written, NaN is refused too
        raise InvalidRequest(
            f"{field} is {weight!r}; it must be from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}",
            field=field,
        )
