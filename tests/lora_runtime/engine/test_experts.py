"""Adapters written by peft over mixtures of experts, all in one mixed batch, against peft itself.

float32: greedy tokens equal and every logit within 2e-4 of peft on the dequantised base, where each
adapter's own effect is at least 1.0 and any two differ by at least 0.5; in every order of slots.
bfloat16: our error against float32 is at most 1.25 times peft's own.
"""

from __future__ import annotations

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from tests.driver import greedy, run, teacher_forced, tiny_engine
from tests.peft_adapters import load_in_peft, write_adapter
from tests.tiny import MIXTURES, VOCAB_SIZE, dense_twin, tiny_base

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROUTERS = {"granite-moe": "router.weight", "gpt-oss": "mlp.router.weight"}
SHARED = {
    "qwen2-moe": "shared_expert",
    "glm4-moe": "shared_experts",
    "qwen3.5-moe": "shared_expert",
}
SERVED = list(MIXTURES)


def adapters(shape):
    """Name → a LoraConfig's settings. Where PEFT has no name for shared experts' layers but that of
    a parameter, they are given as such.
    """
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    router = ROUTERS.get(shape, "mlp.gate.weight")
    found = {
        "lora": dict(r=4, lora_alpha=16, target_modules=ATTENTION),
        "dora": dict(r=6, lora_alpha=6, target_modules=["q_proj", "o_proj"], use_dora=True),
        "rslora": dict(r=16, lora_alpha=8, target_modules=ATTENTION, use_rslora=True),
        "experts": dict(
            r=3, lora_alpha=12, target_modules=[], target_parameters=experts, scale=12.0
        ),
        "experts-rslora": dict(
            r=5, lora_alpha=5, target_modules=["o_proj"], target_parameters=[experts[1], router],
            rank_pattern={"down_proj": 2}, use_rslora=True, scale=8.0,
        ),
    }  # fmt: skip
    if shape in SHARED:
        layers = [f"{SHARED[shape]}.{name}.weight" for name in ("gate_proj", "down_proj")]
        found["shared"] = dict(
            r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=[experts[0], *layers],
            scale=4.0,
        )  # fmt: skip
    return found


class Mixture:
    """A base, its adapters on disk, and peft's reading of them."""

    def __init__(self, shape, folder, *, quantization="nf4", dtype=torch.float32):
        self.shape = shape
        self.base = tiny_base(shape, quantization=quantization, dtype=dtype)
        self.twin = dense_twin(self.base, shape, dtype=torch.float32)
        self.names = list(adapters(shape))
        self.folders = {
            name: write_adapter(self.twin, folder / name, seed=seed, **settings)
            for seed, (name, settings) in enumerate(adapters(shape).items())
        }
        self.oracles = {
            name: load_in_peft(self.twin, folder) for name, folder in self.folders.items()
        }
        self.forms = {
            name: load_adapter(folder, self.base.spec, self.base.weights)
            for name, folder in self.folders.items()
        }

    def prompt(self, index):
        generator = torch.Generator().manual_seed(index)
        length = (5, 33, 12, 50, 3, 9, 21, 2)[index % 8]
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    def serve(self, owners, max_tokens, **options):
        """A row of each owner, None for the base, in one engine."""
        engine = tiny_engine(self.base, **options)
        for form in self.forms.values():
            engine.add_adapter(form)
        requests = [
            greedy(str(i), self.prompt(i), None if o is None else self.forms[o].digest, max_tokens)
            for i, o in enumerate(owners)
        ]
        traces = run(engine, requests, arrivals={str(i): i % 3 for i in range(len(owners))})
        return [traces[str(i)] for i in range(len(owners))]


@pytest.mark.parametrize("shape", SERVED)
def test_float32_logits_and_greedy_tokens_equal_peft(shape, tmp_path):
    world = Mixture(shape, tmp_path)
    owners = [*world.names, None, *reversed(world.names), None]
    for index, (owner, trace) in enumerate(zip(owners, world.serve(owners, 20), strict=True)):
        oracle = world.twin if owner is None else world.oracles[owner]
        expected = teacher_forced(oracle, world.prompt(index), trace.token_ids)
        error = (torch.stack(trace.logits) - expected).abs().max()
        print(f"{shape} {owner}: {error:.1e}")
        assert error <= 2e-4, f"{owner} is off by {error:.1e}"
        assert trace.token_ids == expected.argmax(1).tolist(), owner
        models = {None: world.twin, **world.oracles} if index < len(world.names) else {}
        for other, model in models.items():
            if other != owner:
                theirs = teacher_forced(model, world.prompt(index), trace.token_ids)
                least = 1.0 if other is None else 0.5
                assert (expected - theirs).abs().max() >= least, f"{owner} and {other} are alike"


def bfloat16_errors(world, owners, max_tokens):
    """Owner → our errors against float32 and peft's own, each (n, vocab) of its rows' tokens."""
    half = dense_twin(world.base, world.shape)
    models = {name: load_in_peft(half, folder) for name, folder in world.folders.items()}
    exact, theirs = {None: world.twin, **world.oracles}, {None: half, **models}
    sizes = dict(max_num_seqs=64, max_num_batched_tokens=256, num_blocks=1500)
    served = world.serve(owners, max_tokens, **sizes)
    found = {owner: ([], []) for owner in owners}
    for index, (owner, trace) in enumerate(zip(owners, served, strict=True)):
        row = world.prompt(index), trace.token_ids
        expected = teacher_forced(exact[owner], *row)
        found[owner][0].append(torch.stack(trace.logits).float() - expected)
        found[owner][1].append(teacher_forced(theirs[owner], *row).float() - expected)
    return {owner: tuple(map(torch.cat, pair)) for owner, pair in found.items()}


def rms(errors):
    return float(torch.cat(errors).square().mean().sqrt())


@pytest.mark.parametrize("shape", SERVED)
def test_bfloat16_error_is_within_a_quarter_of_pefts(shape, tmp_path):
    """A choice between experts that is tipped by rounding moves a row by tens of times the rest, in
    peft as here, and few rows of one adapter have one. So the root mean square is over the rows of
    all, base included; of each the typical error, its median, must be as good.
    """
    world = Mixture(shape, tmp_path, dtype=torch.bfloat16)
    errors = bfloat16_errors(world, [*world.names, None] * 20, 12)
    for owner, (ours, theirs) in errors.items():
        ratio = float(ours.abs().median() / theirs.abs().median())
        print(f"{shape} {owner}: median error {ratio:.2f} of peft's")
        assert ratio <= 1.25, owner
    ours, theirs = (rms(parts) for parts in zip(*errors.values(), strict=True))
    print(f"{shape}: bfloat16 error {ours:.4f}, peft's {theirs:.4f}")
    assert ours <= 1.25 * theirs


@pytest.mark.parametrize("shape", SERVED)
def test_bfloat16_error_of_each_adapter_where_no_choice_can_tip(shape, tmp_path, monkeypatch):
    """Every token takes every expert. Adapters that make one expert's weight nearly 1 or 0, on
    routers, are left to the test above.
    """
    facts = MIXTURES[shape]
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    every = next(facts[name] for name in counts if name in facts)
    monkeypatch.setitem(MIXTURES, f"{shape}, all", {**facts, "num_experts_per_tok": every})
    for table in (ROUTERS, SHARED):
        if shape in table:
            monkeypatch.setitem(table, f"{shape}, all", table[shape])
    world = Mixture(f"{shape}, all", tmp_path, dtype=torch.bfloat16)
    owners = [None, *(name for name in world.names if name != "experts-rslora")]
    for owner, (ours, theirs) in bfloat16_errors(world, owners * 4, 24).items():
        ratio = rms([ours]) / rms([theirs])
        print(f"{shape} {owner}: bfloat16 error {ratio:.2f} of peft's")
        assert ratio <= 1.25, owner


@pytest.mark.parametrize("quantization", ["fp4", "int8", "none"])
def test_other_formats_of_the_base_are_served_as_exactly(quantization, tmp_path):
    world = Mixture("qwen3-moe", tmp_path, quantization=quantization)
    owners = [*world.names, None]
    for index, (owner, trace) in enumerate(zip(owners, world.serve(owners, 8), strict=True)):
        oracle = world.twin if owner is None else world.oracles[owner]
        expected = teacher_forced(oracle, world.prompt(index), trace.token_ids)
        assert (torch.stack(trace.logits) - expected).abs().max() <= 2e-4, owner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_independent_of_neighbours_order_and_slots(dtype, tmp_path):
    """Tokens of a row alone, beside others, and with adapters that take each other's slots."""
    world = Mixture("qwen3-moe", tmp_path, dtype=dtype)
    owners = [*world.names, None]
    together = [trace.token_ids for trace in world.serve(owners, 12)]
    few = world.serve(owners, 12, max_slots=2, max_num_batched_tokens=16)
    assert [trace.token_ids for trace in few] == together
    world.forms = dict(reversed(world.forms.items()))
    again = world.serve(owners, 12, prefix_cache=False)
    assert [trace.token_ids for trace in again] == together
