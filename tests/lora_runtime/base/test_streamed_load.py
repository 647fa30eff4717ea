"""A load that never holds the inner linears unquantised gives transformers' and bitsandbytes'
bits."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from lora_runtime.base.loader import configured_length, load_base, prepare_base
from lora_runtime.base.model.adapted_linear import AdaptedLinear
from lora_runtime.base.model.parts import inner_linears
from lora_runtime.base.outline import outline
from lora_runtime.base.streamed_load import read_model, visiting
from lora_runtime.config import BaseConfig
from lora_runtime.errors import BaseRefused
from tests.tiny import CONFIGS, HYBRIDS, tiny_base, tiny_checkpoint, tiny_model

GEMMA = dict(
    vocab_size=300, hidden_size=96, intermediate_size=160, num_hidden_layers=3, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, sliding_window=20,
)  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def gemma_checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    """A model that multiplies its embedding by √96, which bfloat16 rounds."""
    config = AutoConfig.for_model("gemma3_text", **GEMMA)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def whole(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, attn_implementation="eager"
    )


WITHOUT_BUFFERS = {"granite-h", "nemotron-h"}  # their tokens have no rotary positions


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("shape", [*CONFIGS, *sorted(HYBRIDS.keys() - WITHOUT_BUFFERS)])
def test_a_float32_model_is_transformers_own(tmp_path, shape):
    folder = tiny_checkpoint(tmp_path, shape)
    assert_equal_models(read_model(folder, torch.float32), whole(folder, torch.float32))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_any_dtype_is_transformers_own(tmp_path, stored, dtype):
    folder = gemma_checkpoint(tmp_path, stored)
    assert_equal_models(read_model(folder, dtype), whole(folder, dtype))


def assert_equal_models(model, expected) -> None:
    inner = {id(linear.weight) for linear in inner_linears(model).values()}
    parameters = dict(expected.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(parameters)
    for name, found in model.named_parameters():
        is_inner = id(found) in inner
        found = found.to(expected.dtype) if is_inner else found
        assert same_bits(found, parameters[name]), name
    buffers = dict(expected.named_buffers())
    assert len(buffers) > 0
    for name, found in model.named_buffers():
        assert same_bits(found, buffers.pop(name)), name
    assert not buffers and model.config.to_dict() == expected.config.to_dict()
    assert model.dtype == expected.dtype


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "fp4", "int8", "none"])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_the_base_has_the_bits_of_quantising_the_whole_model(tmp_path, quantization, stored, dtype):
    folder = gemma_checkpoint(tmp_path, stored)
    config = BaseConfig(model=str(folder), quantization=quantization, dtype=dtype, device="cpu")
    base = load_base(config)
    twin = whole(folder, getattr(torch, dtype))
    for path in base.spec.linears:
        weight, ours = twin.get_submodule(path).weight, base.model.get_submodule(path).linear
        if quantization == "none":
            assert same_bits(ours.weight, weight)
        elif quantization == "int8":
            absmax = weight.bfloat16().float().abs().amax(1)
            codes = (weight.bfloat16().float() * (127 / absmax[:, None])).round().to(torch.int8)
            assert same_bits(ours.codes, codes) and same_bits(ours.absmax, absmax)
        else:
            packed, state = bnb.quantize_4bit(
                weight.bfloat16(),
                blocksize=64,
                quant_type=quantization.removesuffix("-double"),
                compress_statistics=quantization == "nf4-double",
            )
            assert same_bits(ours.packed, packed.flatten()) and same_bits(ours.absmax, state.absmax)
            if quantization == "nf4-double":
                assert same_bits(ours.nested_absmax, state.state2.absmax)
                assert same_bits(ours.nested_offset, state.offset)


class DenseCopies(TorchDispatchMode):
    """The most bytes that were alive at once in tensors of the given shapes."""

    def __init__(self, shapes) -> None:
        super().__init__()
        self.shapes, self.alive, self.most, self.num_made = set(shapes), {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape in self.shapes and out.dtype.itemsize == 4:
            storage = out.untyped_storage()
            if out.device.type == "cpu" and storage.data_ptr() not in self.living():
                self.num_made += 1
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
                self.most = max(self.most, sum(self.living().values()))
        return out

    def living(self) -> dict[int, int]:
        """Address → bytes."""
        self.alive = {at: one for at, one in self.alive.items() if not one[0].expired()}
        return {address: num_bytes for address, (_, num_bytes) in self.alive.items()}


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "int8"])
def test_one_linear_at_a_time_is_unquantised(tmp_path, monkeypatch, quantization):
    """float32 copies of the 21 linears are made for the original, for the check, to quantise. What
    works on blocks of rows, and makes as much of a tiny layer as of a large one, is left out.
    """
    monkeypatch.setattr("lora_runtime.base.weights.BaseWeights.measure_rows", lambda weights: None)
    monkeypatch.setattr("lora_runtime.base.model.int8_linear.ROW_BLOCK", 5)
    folder = gemma_checkpoint(tmp_path, torch.bfloat16)
    linears = inner_linears(whole(folder, torch.bfloat16))
    sizes = [linear.weight.numel() * 4 for linear in linears.values()]
    copies = DenseCopies(linear.weight.shape for linear in linears.values())
    config = BaseConfig(
        model=str(folder), quantization=quantization, dtype="float32", device="cpu",
        dequantized_cache=False,
    )  # fmt: skip
    with copies:
        base = load_base(config)
    assert copies.num_made >= 3 * len(sizes)
    assert copies.most == max(sizes)
    assert copies.living() == {}
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in base.model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_in_the_files_until_they_are_wanted(tmp_path, dtype):
    """In the address space, the weights of inner linears lie in the mapping of the checkpoint."""
    model = read_model(gemma_checkpoint(tmp_path, torch.bfloat16), dtype)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path) in line:
            first, last = line.split()[0].split("-")
            mapped.append((int(first, 16), int(last, 16)))
    for linear in inner_linears(model).values():
        address = linear.weight.data_ptr()
        assert any(first <= address < last for first, last in mapped)


def test_a_loaded_base_holds_no_file(tmp_path):
    """So the checkpoint may be replaced under a running server."""
    folder = gemma_checkpoint(tmp_path, torch.bfloat16)
    base = load_base(BaseConfig(model=str(folder), dtype="bfloat16", device="cpu"))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert base.dtype == torch.bfloat16


def test_a_visit_ends_when_its_layer_fails():
    linear = nn.Linear(4, 3)
    stored = linear.weight.data = linear.weight.data.bfloat16()
    linear.bias.data = linear.bias.data.double()
    with visiting([linear], torch.device("cpu"), torch.float64):
        assert linear.weight.data_ptr() == stored.data_ptr()
        assert linear(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
        with pytest.raises(RuntimeError):
            linear(torch.ones(2, 5, dtype=torch.float64))
        assert linear.weight.data_ptr() == stored.data_ptr()
    with pytest.raises(RuntimeError):
        linear(torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_against_the_original_still_refuses(tmp_path, monkeypatch, dtype):
    """With one linear that multiplies by something else, in any dtype."""
    folder = tiny_checkpoint(tmp_path)
    forward = AdaptedLinear.forward

    def wrong(self, x):
        return forward(self, x) * (1.5 if self.path.endswith("1.mlp.up_proj") else 1)

    monkeypatch.setattr(AdaptedLinear, "forward", wrong)
    with pytest.raises(BaseRefused, match="does not give its own logits"):
        load_base(BaseConfig(model=str(folder), dtype=dtype, device="cpu"))


def test_a_checkpoint_in_shards_is_the_same_base(tmp_path):
    folder = tiny_checkpoint(tmp_path / "one")
    whole(folder, torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    prints = {
        load_base(BaseConfig(model=str(each), dtype=dtype, device="cpu")).spec.fingerprint
        for each in (folder, tmp_path / "shards")
        for dtype in ("float32", "bfloat16")
    }
    assert len(prints) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path, dtype):
    """transformers would fill it with other random numbers at every load."""
    folder = tiny_checkpoint(tmp_path, "llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseRefused, match=r"no tensor model\.layers\.1\.self_attn\.q_proj\.weight"):
        read_model(folder, dtype)


@pytest.mark.parametrize("family", ["llama", "mixtral", *HYBRIDS])
def test_a_config_alone_says_what_state_rows_will_have(tmp_path, family):
    folder = tiny_checkpoint(tmp_path, family)
    for dtype in (torch.float32, torch.bfloat16):
        expected = tiny_base(family, dtype=dtype).spec.state_bytes
        (folder / "model.safetensors").unlink(missing_ok=True)
        assert outline(folder, dtype).state_bytes == expected


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def with_tensor(name: str, value: torch.Tensor | None):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def with_fields(**fields):
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return edit


EXPERT = "model.layers.0.mlp.experts.1.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "cannot load the checkpoint"),
        (with_tensor(EXPERT, torch.zeros(64, 32)), "cannot load the checkpoint"),
        (with_tensor(EXPERT, None), "cannot load the checkpoint"),
        (with_tensor("model.layers.0.mlp.gate.weight", torch.zeros(9, 64)), "cannot load"),
        (with_tensor("model.layers.0.mlp.gate.weight", None), "has no tensor .*mlp.gate.weight"),
        (with_tensor("model.norm.weight", torch.full((64,), torch.nan)), "not finite"),
        (with_fields(hidden_act="wat"), "cannot load the checkpoint"),
        (with_fields(num_local_experts="eight", num_experts="eight"), "cannot read the config"),
        (with_fields(num_hidden_layers=0), "none of its layers attends"),
    ],
)
def test_a_damaged_checkpoint_of_a_mixture_is_refused(tmp_path, damage, message):
    damage(tiny_checkpoint(tmp_path, "qwen3-moe"))
    with pytest.raises(BaseRefused, match=message):
        load_base(BaseConfig(model=str(tmp_path), dtype="float32", device="cpu"))


UNUSED_EXPERT, UNUSED_TOKEN = 3, 299


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
@pytest.mark.parametrize(
    ("parameter", "row", "named"),
    [
        ("embed_tokens.weight", UNUSED_TOKEN, "model.embed_tokens.weight"),
        ("layers.0.mlp.experts.down_proj", UNUSED_EXPERT, "expert 3 of model.*.experts.down_proj"),
        ("layers.2.mlp.experts.gate_up_proj", UNUSED_EXPERT, "expert 3 of .*gate_up_proj"),
        ("layers.0.mlp.experts.down_proj_bias", UNUSED_EXPERT, "model.*.experts.down_proj_bias"),
    ],
)
def test_a_number_that_is_not_finite_is_found_where_no_token_of_the_check_meets_it(
    parameter, row, named, number, quantization
):
    model = tiny_model("gpt-oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[UNUSED_EXPERT] = -1e4
        model.model.get_parameter(parameter)[row].view(-1)[5] = number
    with pytest.raises(BaseRefused, match=f"^{named} holds numbers that are not finite"):
        prepare_base(model, BaseConfig(quantization=quantization), "x", Path("."))


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "wat"}, {"vocab_size": -5}, {"hidden_size": "64"}, {"hidden_size": -4},
        {"num_attention_heads": 0}, {"pad_token_id": 1000},
        {"rope_parameters": {"rope_type": "wat", "rope_theta": 1e4}},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_makes_no_model_is_refused_before_the_weights_are_read(tmp_path, fields):
    with_fields(**fields)(tiny_checkpoint(tmp_path, "llama"))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BaseRefused, match="transformers cannot"):
        outline(tmp_path, torch.float32)
    configured_length(tmp_path)  # raises nothing


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        *(OSError(number, "x") for number in (errno.ENOMEM, errno.EMFILE, errno.ENOSPC)),
    ],
    ids=repr,
)
def test_what_the_machine_lacks_is_no_fault_of_the_checkpoint(tmp_path, monkeypatch, error):
    def lacking(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lacking)
    with pytest.raises(type(error)) as raised:
        read_model(tiny_checkpoint(tmp_path, "llama"), torch.float32)
    assert raised.value is error
