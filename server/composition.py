"""The adapters of one request: which may stand together, and what follows from their content.

Pure functions of names, weights and records; what a composition computes is the engine's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_runtime.core import AdapterUse, activation_start
from lora_runtime.errors import InvalidRequest
from server.calls import AdapterChoice, AdapterRecord, ChatPrompt, Prompt

MAX_ADAPTERS = 8
MAX_WEIGHT = 100.0
"""Far beyond any useful strength, and small enough that products stay finite."""


def check_choices(choices: Sequence[AdapterChoice]) -> None:
    """Refuse too many adapters, one named twice, and a weight that is no number in range.

    Raises InvalidRequest naming the field: `adapters`, `adapters[i].name`, `adapters[i].weight`.
    """
    if len(choices) > MAX_ADAPTERS:
        raise InvalidRequest(
            f"adapters names {len(choices)}; at most {MAX_ADAPTERS} may act on one request",
            field="adapters",
        )
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


def chat_template(records: Sequence[AdapterRecord]) -> str | None:
    """Return the template of the adapters' own that a conversation is rendered with.

    None is the base's: with no adapter, or where they bring none or do not agree.
    """
    templates = _templates(records)
    return templates.pop() if len(templates) == 1 else None


def depth(records: Sequence[AdapterRecord]) -> int:
    """Return how many layers a request runs: the adapters' own, 0 for the base's."""
    return max((record.loaded.num_layers for record in records if record.loaded), default=0)


def request_notes(
    records: Sequence[AdapterRecord], prompt: Prompt, token_ids: Sequence[int]
) -> Iterator[str]:
    """Yield what the caller should know: adapters that were not invoked, templates not used."""
    outcome = "the base answers" if len(records) == 1 else "it does not act"
    for record in records:
        wanted = record.loaded.invocation_tokens if record.loaded else ()
        if wanted and activation_start(token_ids, wanted) is None:
            yield (
                f"adapter {record.name!r} was not invoked: its invocation tokens are not in the "
                f"prompt; {outcome}"
            )
    if isinstance(prompt, ChatPrompt) and len(_templates(records)) > 1:
        yield "the adapters do not bring one chat template; the base's rendered the messages"


def _templates(records: Sequence[AdapterRecord]) -> set[str | None]:
    return {record.loaded.chat_template if record.loaded else None for record in records}


def _check_weight(weight: float, field: str) -> None:
    if not abs(weight) <= MAX_WEIGHT:  # so written, NaN is refused too
        raise InvalidRequest(
            f"{field} is {weight!r}; it must be from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}",
            field=field,
        )
