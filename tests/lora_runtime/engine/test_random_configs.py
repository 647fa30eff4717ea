"""Random combinations of every field that PEFT writes, beside neighbours in every slot order.

PEFT says what each adapter does, or that a combination is none. Three adapters and the base share a
batch; then the neighbours are unloaded one by one and the rest must still say the same.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.errors import AdapterRefused
from tests.driver import greedy, run, teacher_forced, tiny_engine
from tests.tiny import VOCAB_SIZE, dense_twin, tiny_base
from tests.variants import INVOCATION, write_plain

NUM_STEPS = 3
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUM_LAYERS = 3


def random_config(rng: random.Random) -> dict:
    """Options of a LoraConfig, not all of which PEFT accepts."""
    maybe = lambda share: rng.random() < share  # noqa: E731
    config: dict = {
        "r": rng.choice([1, 2, 5, 8]),
        "lora_alpha": rng.choice([4, 8, 12.5]),
        "use_rslora": maybe(0.3),
        "fan_in_fan_out": maybe(0.2),
        "use_dora": maybe(0.3),
        "lora_bias": maybe(0.15),
        "lora_dropout": rng.choice([0.0, 0.1]),
        "bias": rng.choice(["none", "none", "lora_only"]),
        "init_lora_weights": rng.choice([True, False, "gaussian", "orthogonal"]),
        "target_modules": rng.choice(["all-linear", rf".*\.[0{rng.randint(1, 3)}]\..*(q|up)_proj"]),
    }
    if maybe(0.6):
        config["target_modules"] = rng.sample(MODULES, rng.randint(1, len(MODULES)))
        if maybe(0.3):
            config["target_modules"].append(rng.choice(["embed_tokens", "lm_head"]))
        if maybe(0.3):
            config["target_modules"].append("c_attn")  # of no module: PEFT passes over it
    depth = NUM_LAYERS
    if maybe(0.5):
        ranges = [sorted(rng.sample(range(NUM_LAYERS + 1), 2)) for _ in range(rng.randint(1, 3))]
        config["layer_replication"] = ranges
        depth = sum(end - start for start, end in ranges)
    if isinstance(config["target_modules"], list) and maybe(0.5):
        config["layers_to_transform"] = rng.sample(range(depth), rng.randint(1, depth))
        if maybe(0.3):
            config["layers_pattern"] = "layers"
    if maybe(0.3):
        config["exclude_modules"] = rng.choice([["k_proj"], r".*\.1\..*down_proj"])
    if maybe(0.4):
        config["rank_pattern"] = {rng.choice(MODULES): 3, r".*\.1\..*_proj": 4}
        config["alpha_pattern"] = {rng.choice(MODULES): 6}
    if maybe(0.2):
        config["modules_to_save"] = [rng.choice(["lm_head", "embed_tokens"])]
    if maybe(0.2):
        config["trainable_token_indices"] = rng.sample(range(VOCAB_SIZE), 40)
    if maybe(0.15):
        config["alora_invocation_tokens"] = list(INVOCATION)
    return config


def random_adapters(base, shape, folder, rng, count):
    """[(variant, form)]: what both PEFT and we accept; our refusals name a field of the config."""
    found, num_refused = [], 0
    while len(found) < count:
        config = random_config(rng)
        name = f"{len(found)}-{num_refused}"
        try:
            variant = write_plain(base, shape, folder, name, seed=rng.randrange(1000), **config)
            variant.adapted(torch.float32)
        except (ValueError, TypeError, AttributeError, RuntimeError, KeyError):
            continue  # PEFT has no such adapter, or cannot load what it wrote
        try:
            found.append((variant, load_adapter(variant.folder, base.spec, base.weights)))
        except AdapterRefused as error:
            print(f"refused: {error.field}: {error}")
            assert error.field in config, error
            num_refused += 1
    return found


class Group:
    """Some adapters on one base, with a prompt and the tokens that PEFT gives for each."""

    def __init__(self, shape, seed, folder):
        self.base = tiny_base(shape)
        rng = random.Random(f"{shape} {seed}")
        self.adapters = random_adapters(self.base, shape, folder, rng, 3)
        self.prompts = [
            [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(2, 9))] for _ in self.adapters
        ]
        for prompt, (_, form) in zip(self.prompts, self.adapters, strict=True):
            prompt += [*form.facts.invocation_tokens, 5]
        self.twin = dense_twin(self.base, shape)

    def assert_right(self, engine, members, salt):
        """Run `members` (indices; None is the base) together against PEFT."""
        requests = []
        for index in members:
            prompt = self.prompts[index or 0]
            digest = None if index is None else self.adapters[index][1].digest
            request = greedy(str(index), prompt, digest, NUM_STEPS)
            requests.append(replace(request, cache_salt=salt))
        for request_id, trace in run(engine, requests).items():
            assert trace.error is None, trace.error
            index = None if request_id == "None" else int(request_id)
            prompt = self.prompts[index or 0]
            base = teacher_forced(self.twin, prompt, trace.token_ids)
            if index is None:
                expected = base
            else:
                variant = self.adapters[index][0]
                expected = variant.expected(prompt, trace.token_ids, torch.float32)
                assert (expected - base).abs().max() > 0.01, f"{variant.config} does nothing"
            error = (torch.stack(trace.logits) - expected).abs().max()
            config = {} if index is None else self.adapters[index][0].config
            assert error <= 2e-4, f"off by {error:.1e}: {config}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", ["llama", "llama-bias"])
def test_whatever_peft_writes_is_right_beside_any_neighbours(shape, seed, tmp_path):
    group = Group(shape, seed, tmp_path)
    for order in permutations(range(len(group.adapters))):
        engine = tiny_engine(group.base, max_slots=len(order))
        for index in order:
            engine.add_adapter(group.adapters[index][1])
        members = [*order, None]
        group.assert_right(engine, members, salt="together")
        while len(members) > 1:
            engine.drop_adapter(group.adapters[members.pop(0)][1].digest)
            group.assert_right(engine, members, salt=f"{len(members)} are left")
