"""The key of a block separates exactly what changes its keys and values."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.core import AdapterUse, Request
from lora_runtime.engine.block_key import BlockInfluence, block_key, influence_within

BASE = BlockInfluence()


def request(*adapters: AdapterUse) -> Request:
    return Request(request_id="r", prompt_token_ids=(1,), adapters=adapters)


def test_effect_follows_activation_and_not_the_order_of_adapters():
    late, whole = AdapterUse(digest="b"), AdapterUse(digest="a", weight=0.5, start_position=6)
    both = request(late, whole)
    assert influence_within(both, 0, 4) == BlockInfluence(adapters=(("b", 1.0, 0),))
    assert influence_within(both, 2, 6) == BlockInfluence(adapters=(("b", 1.0, 0),))
    assert influence_within(both, 4, 8) == BlockInfluence(adapters=(("a", 0.5, 2), ("b", 1.0, 0)))
    assert influence_within(both, 8, 12) == BlockInfluence(adapters=(("a", 0.5, 0), ("b", 1.0, 0)))
    assert influence_within(request(whole), 0, 4) == BASE
    assert influence_within(request(whole, late), 4, 8) == influence_within(both, 4, 8)


def test_an_adapter_of_weight_zero_is_not_the_base():
    assert influence_within(request(AdapterUse(digest="a", weight=0.0)), 0, 4) != BASE


@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), max_size=3), st.data())
def test_effects_of_blocks_are_equal_exactly_where_those_of_their_tokens_are(uses, data):
    """A block's effect tells as much as the list of adapters at each of its tokens."""
    others = data.draw(st.just(uses) | st.lists(st.tuples(st.integers(0, 12), st.just("a"))))
    start, size = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 5))

    def adapters_of(uses, position):
        return sorted(digest for first, digest in uses if position >= first)

    def influence(uses):
        made = request(*(AdapterUse(digest=d, start_position=first) for first, d in uses))
        return influence_within(made, start, start + size)

    positions = range(start, start + size)
    is_same = all(adapters_of(uses, p) == adapters_of(others, p) for p in positions)
    assert (influence(uses) == influence(others)) == is_same


def test_key_separates_everything_that_changes_keys_and_values():
    plain = block_key(None, [1, 2], BASE, "")
    others = [
        block_key(plain, [1, 2], BASE, ""),
        block_key(None, [1, 3], BASE, ""),
        block_key(None, [12], BASE, ""),
        block_key(None, [1, 2], BASE, "tenant"),
        block_key(None, [1, 2], BlockInfluence(adapters=(("d", 1.0, 0),)), ""),
        block_key(None, [1, 2], BlockInfluence(adapters=(("d", 0.5, 0),)), ""),
        block_key(None, [1, 2], BlockInfluence(adapters=(("d", 1.0, 1),)), ""),
        block_key(None, [1, 2], BlockInfluence(adapters=(("d", 1.0, 0), ("d", 1.0, 0))), ""),
        block_key(None, [1, 2], BlockInfluence(layer_map=(0, 1, 1)), ""),
        block_key(None, [1, 2], BlockInfluence(layer_map=(0, 1, 1), adapters=(("d", 1.0, 0),)), ""),
    ]
    assert len({plain, *others}) == len(others) + 1
    assert plain == block_key(None, (1, 2), BlockInfluence(), "")
