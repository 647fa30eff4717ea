"""Five kinds of adapters trained at once on SmolLM2-135M in NF4 learn what each learns alone."""

from __future__ import annotations

import pytest

from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import load_dataset
from lora_runtime.training.units import Unit
from tests.lora_runtime.training.tiny_runs import ragged_data, train_until_done

KINDS = {
    "lora": dict(rank=8, learning_rate=1e-3),
    "rslora": dict(rank=16, variant="rslora", alpha=8.0, learning_rate=5e-4),
    "dora": dict(rank=4, use_dora=True, learning_rate=2e-3),
    "pissa": dict(rank=8, init="pissa_niter_4", alpha=8.0, learning_rate=2e-4),
    "replicated": dict(rank=8, layer_replication=((0, 16), (14, 30)), learning_rate=3e-4),
}


def configs_of(folder, num_steps):
    """Each with its own learning rate and its own two rows, which every update sees again, so that
    only what is learned changes the loss.
    """
    return [
        UnitConfig(
            name=name, data=ragged_data(folder / f"{name}.jsonl", 2, seed=seed), warmup=0,
            max_steps=num_steps, micro_batch_size=2, **options,
        )
        for seed, (name, options) in enumerate(KINDS.items())
    ]  # fmt: skip


def losses_of(base, tokenizer, configs):
    """Name → the training loss of every update, of units trained at once."""
    units = [
        Unit(config, load_dataset(config.data, tokenizer, 24), base, seed=config.rank)
        for config in configs
    ]
    train_until_done(base, units)
    return {unit.name: [record.loss for record in unit.records] for unit in units}


def curves(base, tokenizer, folder, num_steps):
    """Of the units (at once, each alone)."""
    configs = configs_of(folder, num_steps)
    together = losses_of(base, tokenizer, configs)
    alone = {}
    for config in configs:
        alone |= losses_of(base, tokenizer, [config])
    return together, alone


def differences(together, alone):
    """Name → the largest difference of any update's loss."""
    return {
        name: max(abs(one - other) for one, other in zip(losses, alone[name], strict=True))
        for name, losses in together.items()
    }


@pytest.mark.timeout(600)  # 40 seconds of one core, which on a busy machine is more
def test_losses_of_every_update_are_those_of_each_alone(smollm2, tmp_path, capsys):
    together, alone = curves(*smollm2, tmp_path, num_steps=3)
    found = differences(together, alone)
    with capsys.disabled():
        print("\nSmolLM2 NF4, 3 updates together and alone, largest difference of a loss:")
        for name, difference in found.items():
            first, last = together[name][0], together[name][-1]
            print(f"  {name} {difference:.1e} (loss {first:.2f} to {last:.2f})")
    assert max(found.values()) <= 1e-3
    for losses in together.values():
        assert len(losses) == 3 and losses[0] - losses[-1] >= 0.3
