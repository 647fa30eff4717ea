"""Every family of causal language models in the installed transformers, as a tiny random model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_runtime.base.streamed_load import auto_class
from tests.tiny import randomised

VOCAB_SIZE = 300
TEXT_TOWERS = [
    "gemma3", "gemma4", "glm4v", "internvl", "lfm2_vl", "llava", "mistral3", "paligemma",
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
]  # fmt: skip
"""Models of text and images."""
FAMILIES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in TEXT_TOWERS]
"""The `model_type`s of the others."""

SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    initializer_range=0.15, init_std=0.15, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    sliding_window=20, attention_dropout=0.0, hidden_dropout=0.0, dropout=0.0,
    # Other words for the same.
    ffn_dim=96, n_inner=96, ffn_hidden_size=96, d_model=64, d_ff=96, d_kv=16, num_layers=4,
    n_embd=64, n_layer=4, n_head=4, n_positions=512, embedding_size=64, decoder_layers=4,
    encoder_layers=2, decoder_attention_heads=4, encoder_attention_heads=4, decoder_ffn_dim=96,
    encoder_ffn_dim=96, rotary_dim=8,
    # Latent attention.
    kv_lora_rank=24, q_lora_rank=32, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16,
    # Experts.
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64,
    first_k_dense_replace=1, n_group=1, topk_group=1,
    # State spaces and other recurrences.
    mamba_n_heads=4, mamba_num_heads=4, mamba_d_head=32, mamba_head_dim=32, mamba_d_state=16,
    mamba_n_groups=1, n_groups=1, ssm_state_size=16, state_size=16, mamba_d_ssm=128,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, chunk_size=8, lru_width=64,
    # Of single families.
    query_pre_attn_scalar=16, vocab_size_per_layer_input=VOCAB_SIZE, hidden_size_per_layer_input=8,
    global_head_dim=32, num_kv_shared_layers=2, use_double_wide_mlp=True, laurel_rank=8,
    encoder_hash_byte_group_vocab=50,
)  # fmt: skip
"""Sizes by the names that configs have for them; a config is given those that it knows."""

_MROPE = dict(
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
)
_GEMMA4 = dict(
    num_hidden_layers=6, num_key_value_heads=1, global_head_dim=32, num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 3, hidden_size_per_layer_input=8,
    use_double_wide_mlp=True,
)  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1, 3]),
    "cohere": dict(logit_scale=0.5),
    "cohere2": dict(logit_scale=0.5),
    "cohere2_moe": dict(logit_scale=0.5),
    "cohere_compass_text": dict(
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        }
    ),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=10000.0)),
    "dots1": dict(n_shared_experts=1),
    "falcon": dict(head_dim=None),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"] * 2),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=8, head_dim=16),
    "glm4v_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen2_vl_vision": dict(embed_dim=32, depth=1, num_heads=2),
    "recurrent_gemma": dict(layer_types=None),
    "qwen2_5_vl_text": _MROPE,
    "xlstm": dict(v_head_dim=None, num_heads=4),
    "zaya": dict(num_experts_per_tok=1),
}
"""What a family needs besides, for a model that has all of its parts; None: not to be given."""


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **options}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama (linear)": ("llama", dict(rope_parameters=_rope("linear", factor=4.0))),
    "llama (dynamic)": ("llama", dict(rope_parameters=_rope("dynamic", factor=4.0))),
    "llama (yarn)": (
        "llama",
        dict(rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    ),
    "llama (llama3)": (
        "llama",
        dict(
            rope_parameters=_rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
        ),
    ),
    "phi3 (longrope)": (
        "phi3",
        dict(
            original_max_position_embeddings=64,
            rope_parameters=_rope(
                "longrope", short_factor=[1.0 + 0.1 * i for i in range(8)],
                long_factor=[2.0 + 0.5 * i for i in range(8)], partial_rotary_factor=1.0,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    "glm (a quarter rotated)": (
        "glm",
        dict(rope_parameters=_rope("default", partial_rotary_factor=0.25)),
    ),
    "gemma3_text (linear)": (
        "gemma3_text",
        dict(
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "sliding_attention": _rope("default"),
                "full_attention": _rope("linear", factor=8.0),
            },
        ),
    ),
    "deepseek_v2 (dense)": ("deepseek_v2", dict(first_k_dense_replace=4)),
    "deepseek_v3 (dense)": ("deepseek_v3", dict(first_k_dense_replace=4)),
    "granitemoehybrid (dense)": (
        "granitemoehybrid",
        dict(num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=96),
    ),
    "nemotron_h (dense)": (
        "nemotron_h",
        dict(layer_types=["linear_attention", "mlp", "full_attention", "linear_attention"]),
    ),
    "gemma4_text (K is V)": (
        "gemma4_text",
        dict(
            attention_k_eq_v=True, num_kv_shared_layers=0, hidden_size_per_layer_input=0,
            num_global_key_value_heads=1, num_key_value_heads=2, use_double_wide_mlp=False,
        ),
    ),
    "gemma4_text (experts)": (
        "gemma4_text",
        dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64),
    ),
}  # fmt: skip
"""Other models of a family: what is changed in its config."""


def tiny_config(family: str) -> PreTrainedConfig:
    """A small config; one that holds others is made of small ones."""
    model_type, options = VARIANTS.get(family, (family, {}))
    return _config_of(CONFIG_MAPPING[model_type], options)


def is_composite(family: str) -> bool:
    """True for a model that has other parts than its text."""
    config = tiny_config(family)
    return config.get_text_config() is not config


def _config_of(kind: Any, changes: dict[str, Any]) -> PreTrainedConfig:
    known = kind()
    options = {name: value for name, value in SMALL.items() if _knows(known, name)}
    kinds = list(dict.fromkeys(getattr(known, "layer_types", None) or ()))
    if len(kinds) > 1 and not isinstance(getattr(kind, "layer_types", None), property):
        options["layer_types"] = (4 * kinds)[: options["num_hidden_layers"]]
    if "kv_lora_rank" in options:  # latent attention: every head has keys of its own, half rotated
        options |= {"num_key_value_heads": options["num_attention_heads"], "head_dim": 8}
    options |= SPECIAL.get(kind.model_type, {}) | changes
    for name, declared in getattr(kind, "sub_configs", {}).items():
        part = getattr(known, name, None)
        made_by = type(part) if isinstance(part, PreTrainedConfig) else declared
        if made_by is not AutoConfig:
            options.setdefault(name, _config_of(made_by, {}).to_dict())
    return kind(**{name: value for name, value in options.items() if value is not None})


def _knows(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # it has one for every layer
        return True


def tiny_family(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of the family."""
    torch.manual_seed(seed)
    config = tiny_config(family)
    model = auto_class(config).from_config(config, attn_implementation="eager")
    return randomised(model)
