"""One order of layers for rows that visit the base's layers in different orders.

A layer map lists base layers in the order in which a row visits them: the plain map of L layers
is (0, 1, …, L − 1), PEFT's `layer_replication` repeats some. One forward serves rows of several
maps by running a common supersequence of them; each of its steps serves every map that wants its
layer next, so the shortest one runs the fewest layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import combinations

LayerMap = tuple[int, ...]
"""Base layers in visiting order."""

MAX_EXACT_MAPS = 3
MAX_SEARCHED_PLACES = 20_000
"""Three maps without order in common would search for seconds; these are searched in about 0.3 s,
while three maps of a few ranges of 60 to 120 layers need 100 to 10 000."""
MAX_CACHED_ORDERS = 1024

_Place = tuple[int, ...]
"""How many layers each sequence has left."""


@dataclass(frozen=True, slots=True)
class OrderStep:
    """One step of the order: base layer `layer` runs."""

    layer: int
    positions: tuple[tuple[LayerMap, int], ...]
    """The maps that this step serves, each with its index in that map."""


def replicas(layer_map: LayerMap) -> tuple[int, ...]:
    """How often each entry's layer occurred before it: (0, 1, 1, 2) → (0, 0, 1, 0)."""
    seen: Counter[int] = Counter()
    found = []
    for layer in layer_map:
        found.append(seen[layer])
        seen[layer] += 1
    return tuple(found)


def shortest_order(maps: Iterable[LayerMap]) -> tuple[OrderStep, ...]:
    """The shortest common supersequence of `maps`, each step with the maps that it serves.

    Exact for up to three distinct maps. Beyond, and for three that MAX_SEARCHED_PLACES does not
    settle, the two with the shortest supersequence are merged first: for any number of sequences
    the problem is NP-complete (Maier, doi:10.1145/322063.322075). The result depends on the set of
    maps only, and is kept for the next call.
    """
    return _plan(tuple(sorted(set(maps))))


@lru_cache(MAX_CACHED_ORDERS)
def _plan(maps: tuple[LayerMap, ...]) -> tuple[OrderStep, ...]:
    """Each map takes the first steps that it can; those that none takes are left out."""
    taken = dict.fromkeys(maps, 0)
    steps = []
    for layer in _supersequence(maps):
        takers = [m for m, index in taken.items() if m[index : index + 1] == (layer,)]
        if takers:
            steps.append(OrderStep(layer, tuple((m, taken[m]) for m in takers)))
        for layer_map in takers:
            taken[layer_map] += 1
    return tuple(steps)


def _supersequence(sequences: tuple[LayerMap, ...]) -> LayerMap:
    found = None
    while found is None:
        if len(sequences) <= MAX_EXACT_MAPS:
            found = _shortest(sequences)
        if found is None:
            sequences = _with_nearest_merged(sequences)
    return found


def _with_nearest_merged(sequences: tuple[LayerMap, ...]) -> tuple[LayerMap, ...]:
    """Put the shortest supersequence of any two in the place of both."""
    pair = min(combinations(sequences, 2), key=_pair_length)
    others = [sequence for sequence in sequences if sequence not in pair]
    return tuple(sorted({*others, _supersequence(pair)}))


def _shortest(sequences: tuple[LayerMap, ...]) -> LayerMap | None:
    """The shortest common supersequence, or None for three that take too long.

    An A* search. A place says how much of each sequence is left; a step runs one layer and takes it
    off every sequence that wants it next. The lower bound of the steps still to come is the longest
    of the shortest supersequences of every two remainders: exact for two sequences, never too high
    for three, so that the first complete path is a shortest one.
    """
    pairs = [
        (p, q, _unmatched(sequences[p], sequences[q]))
        for p, q in combinations(range(len(sequences)), 2)
    ]
    start = tuple(len(sequence) for sequence in sequences)
    came_from: dict[_Place, tuple[_Place, int]] = {}
    # (steps so far + bound, bound, place, how it was reached): of equal sums the one with the least
    # left comes first, so that a search among many equally short orders goes straight to an end.
    waiting = [(0, 0, start, (start, -1))]
    while waiting and (len(came_from) < MAX_SEARCHED_PLACES or len(sequences) < MAX_EXACT_MAPS):
        total, left, place, origin = heappop(waiting)
        if place in came_from:
            continue
        came_from[place] = origin
        if not any(place):
            return _layers_to(place, start, came_from)
        num_steps = total - left + 1
        for layer, after in _moves(sequences, place):
            if after not in came_from:
                left = max((_left(bits, after[p], after[q]) for p, q, bits in pairs), default=0)
                heappush(waiting, (num_steps + left, left, after, (place, layer)))
    return None


def _moves(sequences: tuple[LayerMap, ...], place: _Place) -> Iterator[tuple[int, _Place]]:
    """Each layer that some sequence wants next, and what is left once all that want it had it."""
    ends = list(zip(sequences, place, strict=True))
    for layer in {sequence[-left] for sequence, left in ends if left}:
        yield layer, tuple(left - (left > 0 and s[-left] == layer) for s, left in ends)


def _layers_to(
    place: _Place, start: _Place, came_from: dict[_Place, tuple[_Place, int]]
) -> LayerMap:
    layers = []
    while place != start:
        place, layer = came_from[place]
        layers.append(layer)
    return tuple(reversed(layers))


def _unmatched(a: LayerMap, b: LayerMap) -> list[int]:
    """Longest common subsequences of all endings of `a` and `b`, as bits.

    Bit j of entry i is 0 where the last j + 1 of `b` have one more layer in common with the last i
    of `a` than the last j have. Source: Hyyrö, Bit-parallel LCS-length computation revisited, 2004.
    """
    places = dict.fromkeys(a, 0)
    for j, layer in enumerate(reversed(b)):
        places[layer] = places.get(layer, 0) | 1 << j
    every = (1 << len(b)) - 1
    rows = [every]
    # One addition does a whole row of the dynamic program: its carries move each match to the next
    # free place on its left.
    for layer in reversed(a):
        row, matched = rows[-1], rows[-1] & places[layer]
        rows.append(((row + matched) | (row - matched)) & every)
    return rows


def _left(unmatched: list[int], i: int, j: int) -> int:
    """Length of the shortest common supersequence of the last i of `a` and the last j of `b`."""
    return i + (unmatched[i] & ((1 << j) - 1)).bit_count()


def _pair_length(pair: tuple[LayerMap, LayerMap]) -> int:
    return _left(_unmatched(*pair), len(pair[0]), len(pair[1]))
