"""Any combination of PEFT's fields gives PEFT's logits or is refused by name; nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.core import activation_start
from lora_runtime.errors import AdapterRefused
from tests.lora_runtime.adapters.dense_form import form_logits
from tests.lora_runtime.adapters.peft_oracle import base_spec, base_weights
from tests.tiny import tiny_checkpoint, tiny_model
from tests.variants import randomise

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

INVOCATION = [7, 11]
PROMPT, IDS = [5, 9, *INVOCATION, 44, 7, 77, 130], [3, 8, 100, 12]
MODELS = {"tied": tiny_model("llama"), "untied": tiny_model("llama-bias")}
SHAPES = {"tied": "llama", "untied": "llama-bias"}

TARGETS = st.sampled_from([
    ["q_proj"], ["q_proj", "down_proj"], "all-linear", ["embed_tokens", "v_proj"],
    ["lm_head", "up_proj"], ["embed_tokens", "lm_head"], ".*(q_proj|embed_tokens)",
    r".*\.1\..*proj", ["layers.0.self_attn.k_proj", "o_proj"],
])  # fmt: skip
FIELDS = {
    "r": st.integers(1, 6),
    "lora_alpha": st.sampled_from([1, 3.5, 16, -2]),
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "lora_bias": st.booleans(),
    "modules_to_save": st.sampled_from(
        [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]]
    ),
    "trainable_token_indices": st.sampled_from(
        [[5, 7, 3], {"lm_head": [3, 8]}, {"embed_tokens": [5, 8], "lm_head": [5, 8]}]
    ),
    "ensure_weight_tying": st.booleans(),
    "layer_replication": st.sampled_from([[[0, 2], [1, 3]], [[2, 3], [0, 1]], [[0, 3]]]),
    "layers_to_transform": st.sampled_from([[0], [1, 2], 2]),
    "exclude_modules": st.sampled_from([["down_proj"], ".*v_proj"]),
    "rank_pattern": st.sampled_from([{"q_proj": 3}, {r".*\.1\..*": 5}, {"embed_tokens": 2}]),
    "alpha_pattern": st.sampled_from([{"q_proj": 9}, {"lm_head": 2.5}]),
    "init_lora_weights": st.sampled_from(
        [False, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora", "eva"]
    ),
    "alora_invocation_tokens": st.just(INVOCATION),
    "lora_dropout": st.just(0.1),
}  # fmt: skip


@st.composite
def configs(draw) -> dict[str, object]:
    chosen = draw(st.sets(st.sampled_from(sorted(FIELDS)), max_size=4))
    config = {name: draw(FIELDS[name]) for name in sorted(chosen)}
    return {"target_modules": draw(TARGETS), "task_type": "CAUSAL_LM", "r": 4, **config}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: tiny_checkpoint(root / kind, shape) for kind, shape in SHAPES.items()}


@given(kind=st.sampled_from(sorted(MODELS)), config=configs())
@settings(max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
def test_pefts_logits_or_a_refusal(tmp_path_factory, checkpoints, kind: str, config: dict) -> None:
    folder = tmp_path_factory.mktemp("any")
    expected = written_and_read_by_peft(kind, config, folder)
    assume(expected is not None)
    spec = base_spec(MODELS[kind])
    weights = base_weights(MODELS[kind], spec, checkpoints[kind])
    try:
        form = load_adapter(folder, spec, weights)
    except AdapterRefused as refusal:
        event(f"refused: {refusal.field}")
        assert refusal.field and len(refusal.message) < 500
        return
    event("honoured")
    found = form_logits(form, spec, MODELS[kind], PROMPT, IDS)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def written_and_read_by_peft(kind: str, config: dict, folder: Path) -> torch.Tensor | None:
    """The logits of the adapter after PEFT loads it; None where PEFT itself refuses."""
    torch.manual_seed(0)
    try:
        adapted = peft.get_peft_model(copy.deepcopy(MODELS[kind]), peft.LoraConfig(**config))
        randomise(adapted, 3, with_bias=config.get("bias", "none") != "none")
        adapted.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(MODELS[kind]), folder).eval()
        offset = {}
        if config.get("alora_invocation_tokens"):
            start = activation_start(PROMPT, INVOCATION)
            offset = {"alora_offsets": [len(PROMPT) + len(IDS) - 1 - start]}
        with torch.no_grad():
            ids = torch.tensor([[*PROMPT, *IDS[:-1]]])
            return loaded(ids, use_cache=False, **offset).logits[0, len(PROMPT) - 1 :]
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError):
        return None
