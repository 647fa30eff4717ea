"""Measurements taken by turns in rounds: each one's figure and the time left are said as they go,
and what an interruption leaves is whole rounds.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console

Key = TypeVar("Key", bound=Hashable)
INTERRUPTED = 130
"""The exit code of a program that Ctrl-C has ended."""


@dataclass(frozen=True)
class Turn:
    """One measurement of every round."""

    label: str
    run: Callable[[], float]
    figure: Callable[[float], str]
    """What was found, for people."""
    expected_s: float = 0.0
    """How long it takes on two cores, about: the time left goes by it until it has run once."""


def rounds(
    turns: Mapping[Key, Turn], num_rounds: int, console: Console
) -> Iterator[dict[Key, float]]:
    """Yield what every turn found, round by round, in an order drawn anew each time.

    A round before them, which is not yielded, warms all up.
    """
    took = {key: turn.expected_s for key, turn in turns.items()}
    say(
        console,
        f"{num_rounds + 1} rounds of {len(turns)} measurements, the first to warm up: expected to "
        f"take about {minutes(sum(took.values()) * (num_rounds + 1))} on two cores; Ctrl-C keeps "
        "the rounds that are whole",
    )
    for number in range(num_rounds + 1):
        name = f"round {number} of {num_rounds}" if number else "warm-up"
        order = random.Random(number).sample([*turns], len(turns))
        found: dict[Key, float] = {}
        for place, key in enumerate(order, 1):
            turn, begun = turns[key], time.monotonic()
            found[key] = turn.run()
            took[key] = time.monotonic() - begun
            left = sum(took[each] for each in order[place:])
            left += (num_rounds - number) * sum(took.values())
            figure = f"{turn.label}: {turn.figure(found[key])}"
            then = f"; next: {turns[order[place]].label}" if place < len(order) else ""
            say(console, f"{name}, {place}/{len(turns)}: {figure}; {minutes(left)} left{then}")
        if number:
            yield found


@contextlib.contextmanager
def kept(path: Path, console: Console) -> Iterator[None]:
    """Ctrl-C ends what is inside and nothing else, if `path` has a result by then."""
    try:
        yield
    except KeyboardInterrupt:
        if not path.exists():
            say(console, "interrupted before a round was whole: there is no result")
            raise SystemExit(INTERRUPTED) from None
        say(console, f"interrupted: the rounds that are whole are kept in {path}")


def say(console: Console, line: str) -> None:
    """One line as it is, however wide the terminal: a log is read by programs too."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def minutes(seconds: float) -> str:
    """For people: seconds below two minutes, minutes above."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
