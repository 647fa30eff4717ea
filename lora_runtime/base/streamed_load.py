"""Bring a model to its device without ever holding it there whole in 16 bits.

The inner linears, most of a model, keep their weights where the checkpoint has them: in its files,
which are mapped into memory, so that the system reads pages when they are wanted and may drop them
again. A weight visits the device, in the compute dtype, while its layer runs or is quantised.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from lora_runtime.base.model.parts import (
    expert_modules,
    expert_weights,
    inner_linears,
    towers,
)
from lora_runtime.base.refusing import refusing, shown
from lora_runtime.errors import BaseRefused

HALF_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
DEQUANTISED = ("fp8", "mxfp4")
"""Formats of quantised checkpoints that transformers dequantises to bfloat16 while it loads."""
FLOAT_NAMES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""How safetensors names dtypes."""


def read_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint's model on the host as transformers loads it in `dtype`; weights of inner
    linears may still have the checkpoint's dtype.

    transformers maps what it need not cast. A 16-bit checkpoint for float32 is therefore loaded in
    its own 16 bits, and all but those weights is cast here; other pairs of dtypes are cast by
    transformers, one whole copy on the host. Raises BaseRefused for a checkpoint that cannot be
    read so.
    """
    disable_progress_bar()  # its bars are for notebooks; progress is told in steps here
    config = read_config(folder)
    kind, stored = auto_class(config), None
    is_quantised = bool(getattr(config, "quantization_config", None))
    with _refusing(f"load the checkpoint in {folder}"):
        if dtype == torch.float32:
            stored = torch.bfloat16 if is_quantised else _half_dtype(folder)
        loaded: Any = kind.from_pretrained(
            folder,
            config=config,
            dtype=stored or dtype,
            local_files_only=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    model, found = loaded
    _check_complete(found)
    return model if stored is None else _in_float32(model)


def holds_more(folder: Path, model: PreTrainedModel) -> bool:
    """True where transformers has read the text alone of a checkpoint that has other parts."""
    return read_config(folder).model_type != model.config.model_type


def parts_besides_text(folder: Path) -> tuple[str, ...]:
    """Paths of what a checkpoint has besides the text that transformers reads of it."""
    config = read_config(folder)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        return ()
    return tuple(towers(empty_model(config, torch.float32, AutoModelForImageTextToText)))


def read_config(folder: Path) -> PreTrainedConfig:
    """Of a checkpoint; of a quantised one it says that its weights are to be dequantised while they
    load. Raises BaseRefused for a model that transformers does not know, or for another format.
    """
    with _refusing(f"read the config in {folder}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    _dequantise(config)
    return config


def _dequantise(config: PreTrainedConfig) -> None:
    """Ask transformers to dequantise a quantised checkpoint: otherwise devices and packages decide.
    Raises BaseRefused for a format that it cannot dequantise.
    """
    given = getattr(config, "quantization_config", None)
    if not given:
        return
    own: Any = given if isinstance(given, dict) else given.to_dict()
    method = str(getattr(own.get("quant_method"), "value", own.get("quant_method")))
    if method not in DEQUANTISED:
        raise BaseRefused(
            f"the checkpoint is quantised ({method}), and only {' and '.join(DEQUANTISED)} are "
            "read: bases are quantised here, by the setting `quantization`. Name the 16-bit "
            "checkpoint that it was made of"
        )
    config.quantization_config = {**own, "dequantize": True}


def _refusing(doing: str) -> AbstractContextManager[None]:
    """See `refusing`: of what transformers cannot do with damaged files."""
    return refusing(lambda error: f"transformers cannot {doing}: {shown(error)}")


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' class that makes a model of `config`. Raises BaseRefused where none makes one
    that gives logits of text.
    """
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            return kind
    raise BaseRefused(
        f"{config.model_type} is no language model in transformers {transformers.__version__}; "
        "only models that give logits of the next token are served"
    )


def _check_complete(found: Mapping[str, Collection[str]]) -> None:
    """transformers fills what a checkpoint lacks with random numbers, and warns."""
    if missing := sorted(map(str, found["missing_keys"])):
        raise BaseRefused(
            f"the checkpoint has no tensor {missing[0]} ({len(missing)} are missing). "
            "Download it again, or name the folder of the whole model"
        )


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Copy all but the weights of inner linears and experts to `device`, out of the checkpoint's
    files; what is no part of its text stays there.
    """
    for tensor in _all_but_inner_weights(model):
        tensor.data = tensor.data.to(device, copy=True)


@contextmanager
def visiting(
    modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype
) -> Iterator[None]:
    """While inside, each of these linears and experts has its weights on `device` in `dtype` when
    it runs.
    """
    stored: dict[nn.Module, list[Tensor]] = {}

    def arrive(module: nn.Module, _args: object) -> None:
        weights = _visiting_weights(module)
        stored[module] = [weight.data for weight in weights]
        for weight in weights:
            weight.data = weight.data.to(device, dtype)

    def leave(module: nn.Module, _args: object, _output: object) -> None:
        for weight, data in zip(_visiting_weights(module), stored.pop(module), strict=True):
            weight.data = data

    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(arrive))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _visiting_weights(module: nn.Module) -> list[nn.Parameter]:
    weight = module._parameters.get("weight")
    return expert_weights(module) if weight is None else [weight]


def _half_dtype(folder: Path) -> torch.dtype | None:
    """The 16-bit dtype of all floating-point tensors of a checkpoint, or None."""
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    floats = names.intersection(FLOAT_NAMES)
    return HALF_DTYPES.get(floats.pop()) if len(floats) == 1 else None


def _in_float32(stored: PreTrainedModel) -> PreTrainedModel:
    """A float32 model with the tensors of `stored`, of which inner linears and experts keep theirs
    as they are.

    Built anew, because a model computes some of its buffers in the dtype it is built in.
    """
    model = empty_model(stored.config, torch.float32)
    model.load_state_dict(stored.state_dict(), assign=True)
    model.tie_weights()
    for tensor in _all_but_inner_weights(model):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, kind: Any = None) -> PreTrainedModel:
    """transformers' model of `config`, whose weights have no memory, by its class `kind`, or the
    one that `auto_class` says. Raises BaseRefused.
    """
    kind = kind or auto_class(config)
    doing = f"build the {config.model_type} that the config describes"
    with _refusing(doing), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = kind.from_config(config, dtype=dtype, attn_implementation="eager")
    return model


def _all_but_inner_weights(model: PreTrainedModel) -> Iterator[Tensor]:
    """Every parameter and buffer of its text once, but for the weights of inner linears and
    experts.
    """
    left_out = {id(linear.weight) for linear in inner_linears(model).values()}
    for experts in expert_modules(model).values():
        left_out |= {id(weight) for weight in expert_weights(experts)}
    for tower in towers(model).values():
        left_out |= {id(tensor) for tensor in chain(tower.parameters(), tower.buffers())}
    return (t for t in chain(model.parameters(), model.buffers()) if id(t) not in left_out)
