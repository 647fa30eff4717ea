"""What happens to each field of an adapter_config.json, all of them at once. Plain Python."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from lora_runtime.adapters.config.fields import FIELDS, Treatment
from lora_runtime.adapters.config.values import Config, is_neutral, shown
from lora_runtime.errors import AdapterRefused


@dataclass(frozen=True, slots=True)
class FieldVerdict:
    """One field of a config, as the table of fields judges it before any base is known."""

    name: str
    value: object
    treatment: Treatment
    reason: str


def field_verdicts(config: Config) -> Iterator[FieldVerdict]:
    """Judge every field of a config, in its order; null, false and empty ones are inert."""
    for name, value in config.items():
        rule = FIELDS.get(name)
        if is_neutral(value):
            yield FieldVerdict(name, value, Treatment.INERT, "the same as absent")
        elif rule is None:
            reason = "no such field is known, so its effect cannot be honoured"
            near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
            reason += f": did you mean {near[0]!r}?" if near else ". Remove it if it has none"
            yield FieldVerdict(name, value, Treatment.REFUSED, reason)
        elif rule.accepted:
            accepted = Treatment.HONOURED if rule.treatment is Treatment.REFUSED else rule.treatment
            treatment = accepted if value in rule.accepted else Treatment.REFUSED
            yield FieldVerdict(name, value, treatment, rule.reason)
        else:
            yield FieldVerdict(name, value, rule.treatment, rule.reason)


def field_refusals(config: Config) -> Iterator[AdapterRefused]:
    """The error of every field that is refused for its name or value alone."""
    for verdict in field_verdicts(config):
        if verdict.treatment is Treatment.REFUSED:
            name = shown(verdict.name) if verdict.name not in FIELDS else verdict.name
            yield AdapterRefused(
                f"{name} is {shown(verdict.value)}: {verdict.reason}", field=verdict.name[:80]
            )
