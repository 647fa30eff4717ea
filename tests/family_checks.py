"""What is done with one family on tiny random models, each against PEFT: a column of the matrix.

A check returns a Verdict. A family that is refused at load says why; everything else that a base or
an adapter raises is a failure of ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_runtime.adapters.config.expert_sites import TAKEN_FOR_EXPERTS
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.dense_checkpoint import dense_tensors
from lora_runtime.base.loader import Base, prepare_base
from lora_runtime.base.model.parts import decoder_layers
from lora_runtime.base.model.rotary import fix_rotary
from lora_runtime.base.recompute import recomputed
from lora_runtime.config import BaseConfig
from lora_runtime.engine.state_slots import SNAPSHOT_INTERVAL
from lora_runtime.errors import AdapterRefused, BaseRefused
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.export import adapter_files
from lora_runtime.training.losses import window_losses
from tests.driver import greedy, run, teacher_forced, tiny_engine
from tests.families import VOCAB_SIZE, tiny_family
from tests.lora_runtime.training.tiny_runs import (
    make_tokenizer,
    make_unit,
    ragged_data,
    randomise,
)
from tests.lora_runtime.training.trained_variants import mean_loss
from tests.peft_adapters import load_in_peft, random_adapter

TOLERANCE = 2e-4
LEAST_EFFECT = 0.5
ADAPTERS = {
    "lora": dict(r=8, lora_alpha=8),
    "dora": dict(r=4, lora_alpha=4, use_dora=True),
    "rslora": dict(r=12, lora_alpha=8, use_rslora=True),
}
"""Every row of the mixed batch but the base's."""
IN_FLOAT64 = ("apertus", "gemma4_text (experts)")
"""Families whose gradients are compared in float64. Apertus' activation has a step in its slope, at
0: in float32 a rounding moves values across it, and gradients differ by 0.3 %. Those of Gemma 4's
mixture differ by 0.01 %."""
PEFTS_MAMBAS = ("falcon_h1", "nemotron_h")
"""Families whose out_proj PEFT leaves alone, as transformers' kernels for them pass it by."""
LENGTHS = (27, 5, 40, 13)
"""Of the prompts: the base's first. Beyond a step's 32 tokens, and beyond a window of 20."""


@dataclass(frozen=True)
class Verdict:
    """`is_good`: as PEFT. Else `why`: refused with these words, or what went wrong."""

    is_good: bool
    why: str = ""
    has_nothing: bool = False
    """There is nothing that could be done."""

    @property
    def is_refused(self) -> bool:
        return not self.is_good and self.why.startswith("refused: ")


GOOD = Verdict(True)


def verdict_of(check: Callable[[], None]) -> Verdict:
    """GOOD if `check` returns; refusals of a typed error are told apart from all else."""
    try:
        check()
    except NoExperts:
        return Verdict(False, "–", has_nothing=True)
    except (BaseRefused, AdapterRefused) as error:
        return Verdict(False, f"refused: {error}")
    except Exception as error:
        return Verdict(False, f"FAILED: {type(error).__name__}: {str(error)[:200]}")
    return GOOD


def base_of(model: PreTrainedModel, quantization: str) -> Base:
    config = BaseConfig(quantization=quantization)
    return prepare_base(model, config, model.config.model_type, Path("."))


def twin_of(family: str, base: Base) -> PreTrainedModel:
    """The untouched model with the base's dequantised weights.

    The frequencies of `longrope` are those of the longest row, as everywhere in the base:
    transformers takes others for a row that is short.
    """
    twin = tiny_family(family)
    if "longrope" in str(twin.config):
        fix_rotary(twin, base.spec.max_model_len)
    if base.spec.quantization != "none":
        twin.load_state_dict(dict(dense_tensors(base)), strict=False)
    return twin


def targets_of(model: PreTrainedModel, base: Base) -> dict[str, Any]:
    """Every linear layer, by PEFT's own word for it. Each by its path in a model that has other
    parts than its text, experts or recurrent layers: PEFT's word means those as well. It takes
    names like gate_proj for those of experts, and refuses the output projections of Mamba layers.
    """
    facts = model.config.to_dict()
    parts = {path for path, shape in base.spec.linears.items() if shape.experts is None}
    linears = [path for path in parts if type(model.get_submodule(path)) is nn.Linear]
    if any("expert" in key for key in facts):
        linears = [path for path in linears if path.rpartition(".")[2] not in TAKEN_FOR_EXPERTS]
    elif "text_config" not in facts and not base.spec.state_bytes:
        return {}
    if facts["model_type"] in PEFTS_MAMBAS:
        linears = [path for path in linears if not path.endswith("out_proj")]
    return {"target_modules": sorted(linears)}


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    model.config.dtype = torch.float64
    model.set_experts_implementation("eager")  # torch's grouped products take no float64
    return model


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def serves(
    family: str,
    folder: Path,
    *,
    quantization: str = "none",
    adapters: dict[str, dict] = ADAPTERS,
    num_tokens: int = 6,
) -> None:
    """A base row and one row of each adapter in a batch: tokens and logits of PEFT."""
    base = base_of(tiny_family(family), quantization)
    twin = twin_of(family, base)
    targets = targets_of(twin, base)
    oracles = [twin]
    for seed, (name, options) in enumerate(adapters.items()):
        oracles.append(random_adapter(twin, seed=seed, **{**targets, **options}))
        oracles[-1].save_pretrained(folder / name)
    engine = tiny_engine(base, pool_bytes=8 << 20)
    forms = [load_adapter(folder / name, base.spec, base.weights) for name in adapters]
    for form in forms:
        engine.add_adapter(form)
    digests = [None, *(form.digest for form in forms)]
    rows = [
        greedy(str(i), prompt, digest, num_tokens)
        for i, (prompt, digest) in enumerate(zip(prompts(), digests, strict=False))
    ]
    traces = run(engine, rows)
    for i, (row, oracle) in enumerate(zip(rows, oracles, strict=True)):
        assert traces[str(i)].error is None, traces[str(i)].error
        same_as(oracle, list(row.prompt_token_ids), traces[str(i)], None if i == 0 else twin)


def same_as(oracle, prompt: list[int], trace, base=None) -> None:
    """The oracle's tokens and logits; and, over `base`, an effect that can be seen."""
    expected = teacher_forced(oracle, prompt, trace.token_ids)
    error = float((torch.stack(trace.logits) - expected).abs().max())
    assert error <= TOLERANCE, f"logits differ by {error:.2g}"
    assert trace.token_ids == expected.argmax(1).tolist(), "other tokens"
    if base is not None:
        effect = float((expected - teacher_forced(base, prompt, trace.token_ids)).abs().max())
        assert effect >= LEAST_EFFECT, f"the adapter moves the logits by {effect:.2g} only"


def serves_a_prefix(family: str, folder: Path) -> None:
    """A second request that begins as the first computes what is its own, to the same logits; on
    a base with recurrent layers it goes on from the last snapshot of their states before that.
    """
    base = base_of(tiny_family(family), "none")
    twin = twin_of(family, base)
    oracle = random_adapter(twin, seed=1, **targets_of(twin, base))
    oracle.save_pretrained(folder)
    engine = tiny_engine(base, pool_bytes=8 << 20)
    form = load_adapter(folder, base.spec, base.weights)
    engine.add_adapter(form)
    (shared,) = prompts((SNAPSHOT_INTERVAL + 8,))
    kept = SNAPSHOT_INTERVAL if base.spec.state_bytes else len(shared)
    for name, ending in (("first", [7, 9]), ("second", [8, 11, 4])):
        prompt = [*shared, *ending]
        trace = run(engine, [greedy(name, prompt, form.digest, 4)])[name]
        same_as(oracle, prompt, trace, twin)
    assert engine.blocks.num_prefix_hits == kept, "the shared prompt is computed again"


def trains(family: str, folder: Path) -> None:
    """The gradients of every module's A and B are PEFT's, and layers may be computed again."""
    exact = in_double if family in IN_FLOAT64 else lambda model: model
    base = base_of(exact(tiny_family(family)), "none")
    twin = exact(twin_of(family, base))
    targets = {name: tuple(paths) for name, paths in targets_of(twin, base).items()}
    config = UnitConfig(
        name="unit", data=ragged_data(folder / "data.jsonl", 4), rank=4, alpha=6.0, warmup=0,
        adapter_dtype="float32", **targets,
    )  # fmt: skip
    unit = make_unit(base, make_tokenizer(folder / "tokenizer"), config)
    randomise(unit)
    adapter_files(config, base.spec, unit.modules, {}).write(folder / "unit")
    oracle = load_in_peft(twin, folder / "unit")
    examples = unit.next_micro_batches()[0]
    for name, parameter in oracle.named_parameters():
        parameter.requires_grad_("lora_" in name)
    mean_loss(lambda ids: oracle(ids[None]).logits[0], examples).backward()
    for each in (base, recomputed(base)):
        for parameter in unit.parameters:
            parameter.grad = None
        window_losses(each, [unit], [examples]).sum().backward()
        for path, module in unit.modules.items():
            theirs: Any = oracle.base_model.model.get_submodule(path)
            pairs = ((module.a, theirs.lora_A), (module.b, theirs.lora_B))
            for ours, layer in pairs:
                expected = layer["default"].weight.grad
                error = float((ours.grad - expected).norm() / expected.norm())
                assert error <= 1e-4, f"the gradient of {path} differs by {error:.2g}"


def serves_experts(family: str, folder: Path) -> None:
    """Adapters on the fused weights of experts (PEFT's `target_parameters`), beside a base row."""
    model = tiny_family(family)
    layers = decoder_layers(model)
    names = [n for n, p in layers.named_parameters() if p.ndim == 3 and "expert" in n]
    if not names:
        raise NoExperts
    del model
    targets = sorted({re.sub(r"^\d+\.", "", name) for name in names})
    options = dict(r=4, lora_alpha=4, scale=4.0, target_modules=[], target_parameters=targets)
    serves(family, folder, adapters={"experts": options})


class NoExperts(Exception):
    """The family has no experts, so nothing can be said of adapters on them."""
