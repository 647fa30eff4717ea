"""Tiny random models of every supported shape, and bases made of them. No network, no files."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lora_runtime.base.loader import Base, prepare_base
from lora_runtime.config import BaseConfig

VOCAB_SIZE = 300
_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.15,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
_LINEAR_ATTENTION = dict(
    max_position_embeddings=4096,
    head_dim=32,
    linear_key_head_dim=16,
    linear_value_head_dim=24,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)
_MAMBA = dict(
    max_position_embeddings=4096, mamba_n_heads=8, mamba_d_head=16, mamba_expand=2,
    mamba_d_state=24, mamba_n_groups=2, mamba_chunk_size=16,
)  # fmt: skip
CONFIGS: dict[str, dict] = {
    "llama": dict(model_type="llama", tie_word_embeddings=True),
    "llama-long": dict(model_type="llama", max_position_embeddings=4096),
    "llama-bias": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "mistral": dict(model_type="mistral", sliding_window=24, head_dim=16),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=32),
    "gemma2": dict(
        model_type="gemma2", head_dim=16, sliding_window=20, query_pre_attn_scalar=16,
        attn_logit_softcapping=30.0, final_logit_softcapping=20.0,
    ),
    "gemma3": dict(
        model_type="gemma3_text", head_dim=16, sliding_window=20, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi3": dict(model_type="phi3", rope_parameters={**_ROPE, "partial_rotary_factor": 1.0}),
    "phi3-longrope": dict(
        model_type="phi3",
        original_max_position_embeddings=64,
        rope_parameters={**_LONGROPE, "partial_rotary_factor": 1.0},
    ),
}  # fmt: skip
_EXPERTS = dict(moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2)
MIXTURES: dict[str, dict] = {
    "qwen3-moe": dict(
        model_type="qwen3_moe", head_dim=16, norm_topk_prob=True, mlp_only_layers=[1], **_EXPERTS
    ),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmoe": dict(model_type="olmoe", **{**_EXPERTS, "intermediate_size": 64}),
    "qwen2-moe": dict(
        model_type="qwen2_moe", shared_expert_intermediate_size=128, **_EXPERTS
    ),
    "granite-moe": dict(
        model_type="granitemoe", intermediate_size=64, num_local_experts=6, num_experts_per_tok=3,
        attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=0.5,
    ),
    "glm4-moe": dict(
        model_type="glm4_moe", head_dim=16, n_routed_experts=8, n_shared_experts=1,
        moe_intermediate_size=64, num_experts_per_tok=2, first_k_dense_replace=1, n_group=1,
        topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.5,
    ),
    "qwen3.5-moe": dict(
        model_type="qwen3_5_moe_text", head_dim=16, layer_types=["full_attention"] * 3,
        shared_expert_intermediate_size=64, **_EXPERTS,
    ),
    "gpt-oss": dict(
        model_type="gpt_oss", head_dim=16, intermediate_size=64, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=24,
    ),
}  # fmt: skip
"""Mixtures of experts. The dense shapes' tests do not run over them."""
HYBRIDS: dict[str, dict] = {
    "qwen3.5": dict(model_type="qwen3_5_text", **_LINEAR_ATTENTION),
    "qwen3-next": dict(model_type="qwen3_next", mlp_only_layers=[0, 1, 2], **_LINEAR_ATTENTION),
    "lfm2": dict(
        model_type="lfm2", max_position_embeddings=4096, block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "granite-h": dict(
        model_type="granitemoehybrid", num_local_experts=0, num_experts_per_tok=0,
        shared_intermediate_size=128, attention_multiplier=0.2, residual_multiplier=0.7,
        layer_types=["linear_attention", "full_attention", "linear_attention"], **_MAMBA,
    ),
    "bamba": dict(model_type="bamba", attn_layer_indices=[1], **_MAMBA),
    "falcon-h1": dict(
        model_type="falcon_h1", head_dim=16, mamba_d_ssm=128, ssm_in_multiplier=1.3,
        ssm_multipliers=[0.9, 1.1, 1.2, 0.8, 1.05], **_MAMBA,
    ),
    "nemotron-h": dict(
        model_type="nemotron_h", max_position_embeddings=4096, head_dim=16, mamba_num_heads=8,
        mamba_head_dim=16, n_groups=2, ssm_state_size=24, chunk_size=16,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
    ),
}  # fmt: skip
"""Families with recurrent layers."""
SHAPES = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3"]
"""One of every family that must be served."""


def tiny_model(shape: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose weights are exact in bfloat16, so that every dtype starts equal."""
    options = {**_COMMON, **(CONFIGS | MIXTURES | HYBRIDS)[shape]}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return _cast_parameters(randomised(model), dtype)


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with noise on its vectors, of which many begin as ones and zeros, and on matrices of
    zeros; every weight is exact in bfloat16.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    return model.eval()


def _cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast as loading with `dtype=` does: parameters only, rotary buffers stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def tiny_base(
    shape: str,
    *,
    quantization: str = "nf4",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    folder: Path = Path("."),
    dequantized_cache: bool = True,
    device: str = "cpu",
) -> Base:
    """A served base made of `tiny_model(shape)`."""
    model = tiny_model(shape, seed=seed, dtype=dtype).to(device)
    config = BaseConfig(quantization=quantization, dequantized_cache=dequantized_cache)
    return prepare_base(model, config, shape, folder)


def in_float64(model):
    """Nothing of `model` rounds to float32, as transformers' norms and eager softmax do."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            is_shifted = "Gemma" in type(module).__name__  # 1 + weight
            epsilon = module.eps if is_shifted else module.variance_epsilon
            norm = torch.nn.RMSNorm(len(module.weight), epsilon)
            weight = module.weight.data + is_shifted
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, norm)
    return model


def tiny_checkpoint(folder: Path, shape: str = "llama", *, seed: int = 0) -> Path:
    """The same model as a bfloat16 checkpoint on disk, without a tokenizer."""
    tiny_model(shape, seed=seed, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def float32_checkpoint(folder: Path, shape: str) -> Path:
    """A model on disk that is exact in no 16 bits, as most float32 checkpoints."""
    model = tiny_model(shape)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.008 * (torch.rand_like(tensor) - 0.5))
    model.save_pretrained(folder)
    return folder


def lengthen(folder: Path, max_position_embeddings: int = 2048) -> None:
    """Let a checkpoint take longer sequences."""
    config = folder / "config.json"
    longer = {"max_position_embeddings": max_position_embeddings}
    config.write_text(json.dumps(json.loads(config.read_text()) | longer))


_untouched = cache(lambda shape, seed, dtype: tiny_model(shape, seed=seed, dtype=dtype))


def dense_twin(base: Base, shape: str, *, seed: int = 0, dtype: torch.dtype | None = None):
    """The untouched transformers model with the base's dequantised weights: PEFT's oracle base."""
    twin = copy.deepcopy(_untouched(shape, seed, dtype or base.dtype))
    with torch.no_grad():
        for path, linear in base.spec.linears.items():
            values = base.model.get_submodule(path).linear.weight_values()
            if linear.experts is None:
                twin.get_submodule(path).weight.copy_(values)
            else:
                values = values.unflatten(0, (linear.experts.count, -1))
                is_transposed = linear.experts.is_transposed
                parameter = twin.get_parameter(path)
                parameter.copy_(values.transpose(1, 2) if is_transposed else values)
    return twin
