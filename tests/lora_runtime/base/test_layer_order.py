"""The order of layers against brute force, and what it promises for sets of any size."""

from __future__ import annotations

import random
import time
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.base.model.layer_order import replicas, shortest_order


def maps_of(num_layers, longest, num_maps):
    layer_map = st.lists(st.integers(0, num_layers - 1), max_size=longest).map(tuple)
    return st.lists(layer_map, min_size=1, max_size=num_maps)


def stacked(*ranges):
    """PEFT's layer_replication: [[start, end), …] one after the other."""
    return tuple(layer for start, end in ranges for layer in range(start, end))


def is_within(layer_map, order):
    rest = iter(order)
    return all(layer in rest for layer in layer_map)


def brute_force_length(maps):
    """Try every order of layers, shorter ones first."""
    layers = sorted({layer for layer_map in maps for layer in layer_map})
    length = max(map(len, maps))
    while not any(
        all(is_within(layer_map, order) for layer_map in maps)
        for order in product(layers, repeat=length)
    ):
        length += 1
    return length


def check_serves(steps, maps):
    """Every map visits its layers, all of them and in order; no step is for nobody."""
    visited = {layer_map: [] for layer_map in maps}
    for step in steps:
        assert step.positions
        for layer_map, index in step.positions:
            assert layer_map[index] == step.layer
            visited[layer_map].append(index)
    assert visited == {layer_map: list(range(len(layer_map))) for layer_map in maps}


@given(maps_of(num_layers=2, longest=4, num_maps=3) | maps_of(3, longest=3, num_maps=3))
def test_up_to_three_maps_have_the_shortest_plan(maps):
    steps = shortest_order(frozenset(maps))
    check_serves(steps, maps)
    assert len(steps) == brute_force_length(maps)


@given(maps_of(num_layers=5, longest=12, num_maps=7))
def test_any_number_of_maps_is_served_within_the_sum(maps):
    steps = shortest_order(frozenset(maps))
    check_serves(steps, maps)
    distinct = set(maps)
    assert max(map(len, distinct)) <= len(steps) <= sum(map(len, distinct))


def test_a_single_map_is_its_own_plan():
    layer_map = (0, 1, 1, 0, 2)
    steps = shortest_order(frozenset([layer_map]))
    assert [(step.layer, dict(step.positions)) for step in steps] == [
        (layer, {layer_map: index}) for index, layer in enumerate(layer_map)
    ]


def test_no_map_needs_no_step():
    assert shortest_order(frozenset()) == ()


@given(maps_of(num_layers=4, longest=8, num_maps=5))
def test_the_order_of_the_maps_does_not_matter(maps):
    plans = {shortest_order(frozenset(order)) for order in list(permutations(maps))[:24]}
    assert len(plans) == 1


def test_a_plan_is_kept_for_the_next_step_of_the_engine():
    maps = [stacked((0, 30)), stacked((0, 20), (10, 30))]
    assert shortest_order(frozenset(maps)) is shortest_order(frozenset(reversed(maps)))


@pytest.mark.parametrize(
    ("maps", "length"),
    [
        ([stacked((0, 80)), stacked((0, 60), (20, 80))], 120),
        ([stacked((0, 60)), stacked((0, 40), (20, 60)), stacked((0, 30), (10, 50), (30, 60))], 110),
        ([stacked((0, 80)), stacked((0, 60), (20, 80)), stacked((0, 70), (30, 80))], 130),
    ],
)
def test_deep_bases_are_planned_fast(maps, length):
    """A few milliseconds here; a table of every place would take seconds."""
    start = time.perf_counter()
    assert len(shortest_order(frozenset(maps))) == length
    assert time.perf_counter() - start < 1


def textbook_length(a, b):
    """Of the shortest common supersequence of two, row by row."""
    above = list(range(len(b) + 1))
    for i, layer in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(1 + (above[j - 1] if layer == other else min(above[j], row[-1])))
        above = row
    return above[-1]


def test_two_long_maps_have_the_shortest_plan_at_once():
    generator = random.Random(0)
    maps = [tuple(generator.choices(range(16), k=length)) for length in (1500, 1200)]
    start = time.perf_counter()
    steps = shortest_order(frozenset(maps))
    assert time.perf_counter() - start < 3
    check_serves(steps, maps)
    assert len(steps) == textbook_length(*maps)


@pytest.mark.parametrize("num_maps", [3, 12])
def test_maps_without_any_order_in_common_do_not_stall_the_engine(num_maps):
    generator = random.Random(0)
    maps = [tuple(generator.choices(range(32), k=120)) for _ in range(num_maps)]
    start = time.perf_counter()
    steps = shortest_order(frozenset(maps))
    assert time.perf_counter() - start < 5
    check_serves(steps, maps)
    assert len(steps) < sum(map(len, maps)) * 0.85


@given(st.lists(st.integers(0, 4), max_size=20).map(tuple))
def test_replicas_number_the_visits_to_each_layer(layer_map):
    assert replicas(layer_map) == tuple(
        layer_map[:index].count(layer) for index, layer in enumerate(layer_map)
    )
