"""From a checkpoint folder to a base ready for adapters.

transformers owns the model's definition; its inner linears, attention and rotary tables are
replaced by ours. Before quantising, the result is compared with the untouched model. The weights of
inner linears visit the device one at a time, so that it never holds all of them unquantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_runtime.base.catalog import Progress, ResolvedBase, resolve_base
from lora_runtime.base.device import dtype_name, resolve_device, resolve_dtype
from lora_runtime.base.fingerprint import exceeds_bfloat16, fingerprint
from lora_runtime.base.freed_memory import give_back_freed_memory
from lora_runtime.base.model import attention
from lora_runtime.base.model.adapted_linear import (
    AdaptedEmbedding,
    AdaptedHead,
    AdaptedLinear,
    StepContext,
)
from lora_runtime.base.model.attention import Attention, KVCache, KVLayout
from lora_runtime.base.model.experts import (
    AdaptedExperts,
    freeze_experts,
    replace_experts,
    require_whole_blocks,
)
from lora_runtime.base.model.finite import require_finite
from lora_runtime.base.model.fused_modules import fuse_modules
from lora_runtime.base.model.head_model import head_model
from lora_runtime.base.model.int8_linear import Int8Linear
from lora_runtime.base.model.parts import (
    decoder_layers,
    decoder_of,
    drop_towers,
    expert_modules,
    inner_linears,
    path_of,
    set_attention,
)
from lora_runtime.base.model.quant_linear import DenseLinear, FrozenLinear, QuantLinear
from lora_runtime.base.model.recurrence import StatePool
from lora_runtime.base.model.recurrent_layers import (
    allocate_states,
    replace_recurrent_layers,
    state_bytes,
)
from lora_runtime.base.model.reordered_model import LayerSteps, reordering
from lora_runtime.base.model.rotary import fix_rotary
from lora_runtime.base.model.routers import (
    UNQUANTISED,
    AdaptedRouter,
    RouterLinear,
    replace_routers,
)
from lora_runtime.base.model.stacked_linears import stack_linears
from lora_runtime.base.refusals import refuse_unsupported
from lora_runtime.base.self_check import (
    Findings,
    observe,
    original_logits,
    refusing_errors,
    self_check,
)
from lora_runtime.base.streamed_load import (
    holds_more,
    parts_besides_text,
    place,
    read_config,
    read_model,
    visiting,
)
from lora_runtime.base.weights import BaseWeights
from lora_runtime.config import BaseConfig
from lora_runtime.core import BaseSpec, LinearShape
from lora_runtime.errors import BaseRefused
from lora_runtime.kernels import can_fuse, can_use_panels, huge_pages
from lora_runtime.kernels.cpu_library import num_threads, threads

SMALL_CHECKPOINT = 1 << 30
"""Bytes of a checkpoint up to which torch loads it for a CPU in one thread, beside the compiled
library's. Its ops are so short there that a second thread gains 0.3 of 2.4 s; but each op waits for
it, which takes ten times as long as all of them where other programs want its core.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A frozen base whose inner linears accept adapters through `context`."""

    model: PreTrainedModel
    spec: BaseSpec
    context: StepContext
    weights: BaseWeights
    reordered: Callable[[tuple[int, ...]], PreTrainedModel]
    """The model with these base layers instead of its own; see `reordered_model`."""
    head: PreTrainedModel
    """The model behind its decoder; see `head_model`."""
    kv_layout: KVLayout
    """What its layers keep of every token."""
    folder: Path
    device: torch.device
    dtype: torch.dtype

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        attention: Attention | LayerSteps,
        logits_at: Tensor,
    ) -> Tensor:
        """Run all rows laid end to end: token_ids, position_ids (T,) → logits (n, vocab).

        `logits_at` (n,) int64 picks the tokens whose logits are wanted. With an Attention every
        layer runs once, for all tokens; LayerSteps say which layers run, and for which tokens.
        Differentiable in the adapters of `context`.
        """
        return self.logits(self.hidden_states(token_ids, position_ids, attention)[logits_at])

    def hidden_states(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        attention: Attention | LayerSteps,
    ) -> Tensor:
        """The first part of `forward`: what the output layer is given of each token, (T, H)."""
        model: Any = self.model
        if isinstance(attention, LayerSteps):
            model = self.reordered(attention.layers)
        out = decoder_of(model)(
            input_ids=token_ids[None],
            position_ids=position_ids[None],
            use_cache=False,
            attention=attention,
        )
        return out.last_hidden_state[0]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The second part of `forward`: hidden_states (n, H) → logits (n, vocab)."""
        return self.head(inputs_embeds=hidden_states[None], use_cache=False).logits[0]

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take, private copies of weights included."""
        storages = {}
        for module in self.model.modules():
            held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
            for tensor in held:
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def allocate_kv(self, num_cache_slots: int) -> KVCache:
        """An empty paged cache with room for the keys and values of `num_cache_slots` tokens."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return KVCache.allocate(self.kv_layout, num_cache_slots, like)

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes in all layers."""
        return self.kv_layout.values_per_token * self.dtype.itemsize

    def allocate_states(self, num_slots: int) -> StatePool | None:
        """Room for the recurrent states of `num_slots` rows or snapshots; None for a base whose
        layers have none.
        """
        return allocate_states(self.model, num_slots)


def load_base(
    config: BaseConfig,
    on_progress: Progress | None = None,
    resolved: ResolvedBase | None = None,
) -> Base:
    """Find, load, check and quantise a base; `resolved` is what was found already.

    Raises BaseRefused for a model that cannot be served, ConfigError for a setting that cannot
    be used on this machine.
    """
    say = on_progress or (lambda _: None)
    resolved = resolved or resolve_base(config.model, on_progress=on_progress)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    say(f"loading {resolved.name}")
    with _threads_of_a_load(resolved.folder, device):
        model = read_model(resolved.folder, dtype)
        left_out: tuple[str, ...] = ()
        if holds_more(resolved.folder, model):
            left_out = parts_besides_text(resolved.folder)
            say("serving its text only")
        base = prepare_base(
            model,
            config,
            resolved.name,
            resolved.folder,
            name_or_path=resolved.name_or_path,
            device=device,
            dtype=dtype,
            left_out=left_out,
            on_progress=say,
        )
    give_back_freed_memory()
    return base


def _threads_of_a_load(folder: Path, device: torch.device) -> AbstractContextManager[object]:
    """In how many threads torch loads the checkpoint in `folder`: see `SMALL_CHECKPOINT`."""
    files = (file for file in folder.glob("*.safetensors") if file.is_file())  # not: a dead link
    if device.type == "cpu" and sum(file.stat().st_size for file in files) <= SMALL_CHECKPOINT:
        return threads(of_torch=1, of_library=num_threads())
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is known of a base that would be served, before anything of it is quantised."""

    model_type: str
    kv_bytes_per_token: int
    state_bytes: int
    """As `BaseSpec.state_bytes`."""


def judge_base(
    config: BaseConfig, resolved: ResolvedBase, on_progress: Progress = lambda _: None
) -> Judgement:
    """Do all that `load_base` does before it quantises: read a base, replace its parts, see that
    its quantisation can hold them and that it gives its own logits.

    Raises as `load_base`.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    with _threads_of_a_load(resolved.folder, device):
        model = read_model(resolved.folder, dtype).eval().requires_grad_(False)
        _, found, _ = _operate(model, config, StepContext(), device, dtype, on_progress)
    kv_bytes = found.layout.values_per_token * dtype.itemsize
    return Judgement(model.config.model_type, kv_bytes, state_bytes(model))


def configured_length(folder: Path) -> int | None:
    """`max_model_len` of the base in `folder`, before it is loaded; None where that takes more than
    its config.
    """
    try:
        return int(read_config(folder).get_text_config().max_position_embeddings)
    except (BaseRefused, ValueError, TypeError, AttributeError):
        return None  # `load_base` says what is wrong


def prepare_base(
    model: PreTrainedModel,
    config: BaseConfig,
    name: str,
    folder: Path,
    *,
    name_or_path: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    left_out: tuple[str, ...] = (),
    on_progress: Progress = lambda _: None,
) -> Base:
    """Operate on a loaded transformers model, which becomes the base; `config.model` is not read.

    The base computes on `device` in `dtype`; None keeps those of the model. `left_out`: paths of
    what its checkpoint has besides it.
    """
    device, dtype = device or model.device, dtype or model.dtype
    model.eval().requires_grad_(False)
    context = StepContext()
    layers, found, dropped = _operate(model, config, context, device, dtype, on_progress)
    linears = _linears_of(layers)
    on_progress(f"freezing the linear layers ({config.quantization})")
    keep_copies = config.dequantized_cache and device.type == "cpu"
    freeze = partial(_freezer(config.quantization), keep_copies=keep_copies)
    _freeze_layers(layers.values(), freeze, device, dtype)
    _freeze_head(model)
    _refuse_non_finite_rest(model)
    _settle_weights(model, linears)
    on_progress("fingerprinting")
    left_out = (*left_out, *dropped)
    spec = _spec(model, config.quantization, name, name_or_path, layers, found, left_out)
    _adapt_vocabulary(model, spec, context)
    on_progress("measuring the rows of the linear layers")
    weights = BaseWeights(model, spec, folder)
    weights.measure_rows()
    return Base(
        model=model,
        spec=spec,
        context=context,
        weights=weights,
        reordered=reordering(model, context),
        head=head_model(model),
        kv_layout=found.layout,
        folder=folder,
        device=model.device,
        dtype=model.dtype,
    )


def _operate(
    model: PreTrainedModel,
    config: BaseConfig,
    context: StepContext,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Progress,
) -> tuple[dict[str, AdaptedLinear | AdaptedExperts], Findings, tuple[str, ...]]:
    """Change the model's modules in place, nothing quantised yet, and see that it is still itself.

    Returns path → what adapters act on there, what was found out about the model, and the paths of
    what was no part of its text. Raises BaseRefused.
    """
    with refusing_errors(model, "looking at its parts"):
        refuse_unsupported(model)
    place(model, device)
    with refusing_errors(model, "fixing its rotary frequencies"):
        fix_rotary(model, int(model.config.get_text_config().max_position_embeddings))
    on_progress("checking against the original model")
    visitors = [*inner_linears(model).values(), *expert_modules(model).values()]
    with visiting(visitors, device, dtype):
        original = original_logits(model)
    if dropped := drop_towers(model):
        on_progress(f"serving its text only; left out: {', '.join(dropped)}")
    with refusing_errors(model, "replacing its layers"):
        layers = _replace_layers(model, context, device, dtype)
    for layer in layers.values():
        if isinstance(layer, AdaptedExperts):
            require_whole_blocks(layer, config.quantization)
    with visiting([adapted.linear for adapted in _linears_of(layers)], device, dtype):
        found, observed = observe(model, original)
        set_attention(model, attention.NAME)
        fuse_modules(model)
        self_check(model, original, observed)
    return layers, found, dropped


def _linears_of(layers: Mapping[str, AdaptedLinear | AdaptedExperts]) -> list[AdaptedLinear]:
    """Those that were nn.Linear in transformers' model."""
    kinds = AdaptedExperts | AdaptedRouter
    return [layer for layer in layers.values() if not isinstance(layer, kinds)]


def _spec(
    model: PreTrainedModel,
    quantization: str,
    name: str,
    name_or_path: str | None,
    layers: Mapping[str, AdaptedLinear | AdaptedExperts],
    found: Findings,
    left_out: tuple[str, ...],
) -> BaseSpec:
    """Facts of a model whose layers are frozen; embedding and output layer are still its own."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    kinds = AdaptedRouter | RouterLinear
    return BaseSpec(
        name=name,
        name_or_path=name_or_path,
        fingerprint=fingerprint(model, quantization),
        linears={path: _shape(layer) for path, layer in layers.items()},
        embedding=path_of(model, embedding),
        head=path_of(model, head),
        is_tied=embedding.weight.data_ptr() == head.weight.data_ptr(),
        num_layers=len(decoder_layers(model)),
        can_reorder_layers=found.can_reorder,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_model_len=int(config.max_position_embeddings),
        quantization=quantization,
        dtype=dtype_name(model.dtype),
        device=str(model.device),
        model_type=model.config.model_type,
        routers=tuple(p for p, layer in layers.items() if isinstance(layer, kinds)),
        state_bytes=state_bytes(model),
        left_out=left_out,
        exceeds_bfloat16=model.dtype != torch.bfloat16 and exceeds_bfloat16(model),
    )


def _shape(layer: AdaptedLinear | AdaptedExperts) -> LinearShape:
    layout = layer.layout if isinstance(layer, AdaptedExperts) else None
    return LinearShape(layer.in_features, layer.out_features, layout)


def _adapt_vocabulary(model: PreTrainedModel, spec: BaseSpec, context: StepContext) -> None:
    """Let adapters act on the embedding and the output layer too."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    model.set_input_embeddings(AdaptedEmbedding(spec.embedding, embedding, context))
    model.set_output_embeddings(AdaptedHead(spec.head, head, context))


def _replace_layers(
    model: PreTrainedModel, context: StepContext, device: torch.device, dtype: torch.dtype
) -> dict[str, AdaptedLinear | AdaptedExperts]:
    """Let adapters act on every linear layer, router and mixture, still unquantised, and recurrent
    layers keep states. Returns path → what adapters act on, in the order in which the model holds
    them, by which PEFT names experts.
    """
    replace_recurrent_layers(model)
    found: dict[str, AdaptedLinear | AdaptedExperts] = {
        **_replace_linears(model, context),
        **replace_routers(model, context),
        **replace_experts(model, context, device, dtype),
    }
    return {path: found[path] for path, _ in model.named_modules() if path in found}


def _replace_linears(model: PreTrainedModel, context: StepContext) -> dict[str, AdaptedLinear]:
    """Put a dense AdaptedLinear in the place of every nn.Linear of the decoder.

    Returns path → the AdaptedLinear there.
    """
    decoder, replaced = decoder_of(model), {}
    prefix = path_of(model, decoder)
    for path, linear in inner_linears(model).items():
        parent, _, name = path.rpartition(".")
        adapted = AdaptedLinear(
            f"{prefix}.{path}", DenseLinear(linear.weight, linear.bias), context
        )
        setattr(decoder.get_submodule(parent), name, adapted)
        replaced[adapted.path] = adapted
    return replaced


def _freezer(quantization: str) -> Callable[..., FrozenLinear]:
    """What makes a frozen layer of a dense weight and a bias."""
    makers: dict[str, Callable[..., FrozenLinear]] = {
        "none": DenseLinear,
        "nf4": QuantLinear,
        "nf4-double": partial(QuantLinear, is_nested=True),
        "fp4": partial(QuantLinear, quant_type="fp4"),
        "int8": Int8Linear,
    }
    return makers[quantization]


def _freeze_layers(
    layers: Iterable[AdaptedLinear | AdaptedExperts],
    freeze: Callable[..., FrozenLinear],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Let each layer's dense weight go to the device, be frozen there and be forgotten in turn; of
    a mixture that of each expert. Routers keep their weights. Raises BaseRefused for weights that
    are not finite.
    """
    # What chooses experts, as what gives logits, must not depend on the rows beside one: in float32
    # on a CPU each has a copy that is multiplied row by row in one order, whatever the settings.
    exact = partial(DenseLinear, keep_copies=True)
    for layer in layers:
        if isinstance(layer, AdaptedExperts):
            freeze_experts(layer, freeze)
        elif isinstance(layer, AdaptedRouter):
            layer.linear.keep_copies = True
        else:
            is_exact = isinstance(layer, RouterLinear) or layer.path.endswith(UNQUANTISED)
            layer.linear = _frozen(layer, exact if is_exact else freeze, device, dtype)


def _frozen(
    layer: AdaptedLinear,
    maker: Callable[..., FrozenLinear],
    device: torch.device,
    dtype: torch.dtype,
) -> FrozenLinear:
    weight = layer.linear.weight_values().to(device, dtype)
    return maker(require_finite(f"{layer.path}.weight", weight), layer.linear.bias)


def _refuse_non_finite_rest(model: PreTrainedModel) -> None:
    """Raise BaseRefused for numbers that are not finite in what is not quantised: the vocabulary.
    Buffers are left alone: in some families they are bounds, which may be infinite.
    """
    for name, parameter in model.named_parameters():
        require_finite(name.replace(".linear.", "."), parameter)


def _settle_weights(model: PreTrainedModel, linears: Iterable[AdaptedLinear]) -> None:
    """Join layers that are given the same x. Let all weights that a step on a CPU reads in full lie
    in huge pages, joined layers' included.
    """
    if can_fuse(cast(Tensor, model.get_input_embeddings().weight)):
        stack_linears(model)
    if model.device.type != "cpu":
        return
    looked_up = _looked_up_weights(model)
    joined = {id(linear.stack.joined): linear.stack.joined for linear in linears if linear.stack}
    modules = [model, *joined.values()]
    huge_pages.move_there(
        tensor
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.data_ptr() not in looked_up
    )


def _looked_up_weights(model: PreTrainedModel) -> set[int]:
    """Where the embedding's table lies, of which a step reads a few rows: unless it is the output
    layer's weight too, and no copy of it is multiplied instead.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    table, weight = embedding.weight, head.weight
    multiplies_copy = isinstance(head, FrozenLinear) and head.keep_copies and can_use_panels(weight)
    if table.data_ptr() == weight.data_ptr() and not multiplies_copy:
        return set()
    return {table.data_ptr()}


def _freeze_head(model: PreTrainedModel) -> None:
    """Give lm_head, which stays unquantised, the kernels of the other layers."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        frozen = DenseLinear(head.weight, head.bias, keep_copies=True)
        model.set_output_embeddings(frozen)
