"""How deep an adapter may make a row is a setting: beyond it its load is refused by name."""

from __future__ import annotations

import asyncio

import pytest

from lora_runtime.config import AdapterConfig, CacheConfig, EngineConfig
from lora_runtime.engine.engine import Engine
from lora_runtime.engine.loop import InThreadEngine
from lora_runtime.errors import AdapterRefused, ConfigError
from tests.driver import greedy
from tests.peft_adapters import write_adapter
from tests.tiny import tiny_model


def run(*arguments):
    return asyncio.run(load(*arguments))


async def load(base, folder, num_layers, max_layers=None):
    """Loads an adapter of so many layers, and gives the tokens of a row under it."""
    deep, rest = divmod(num_layers, base.spec.num_layers)
    ranges = [[0, base.spec.num_layers]] * deep + ([[0, rest]] if rest else [])
    write_adapter(tiny_model("llama"), folder, seed=1, layer_replication=ranges)
    adapters = AdapterConfig(pool_bytes=8 << 20, max_layers=max_layers)
    config = EngineConfig(cache=CacheConfig(num_blocks=64), adapters=adapters)
    engine = InThreadEngine(Engine(base, config))
    try:
        loaded = await engine.load_adapter(folder)
        assert loaded.facts.num_layers == num_layers
        request = greedy("r", [5, 6, 7], loaded.digest, 3)
        return [token async for out in engine.generate(request) for token in out.token_ids]
    finally:
        await engine.close(drain_s=0)


@pytest.mark.parametrize(("over_base", "max_layers"), [(4, None), (6, 6), (2, 2)])
def test_up_to_the_limit_it_is_served_and_beyond_refused(base, tmp_path, over_base, max_layers):
    limit = over_base * base.spec.num_layers
    max_layers = None if max_layers is None else limit
    assert len(run(base, tmp_path / "at", limit, max_layers)) == 3
    with pytest.raises(
        AdapterRefused, match=rf"{limit + 1} layers.*{limit}.*max_adapter_layers"
    ) as e:
        run(base, tmp_path / "beyond", limit + 1, max_layers)
    assert e.value.field == "layer_replication"


@pytest.mark.parametrize("max_layers", [0, -1])
def test_a_limit_is_positive(max_layers):
    with pytest.raises(ConfigError, match="max_layers"):
        AdapterConfig(max_layers=max_layers)
