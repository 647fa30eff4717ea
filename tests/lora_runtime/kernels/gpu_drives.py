"""What a GPU is asked to do: steps of real models' shapes, serving, training, the benchmark.

Run within `fake_gpu.launches_on`. Shapes of real models live on "meta", where a tensor has a size
but no memory, so that a whole step of an 8B model takes milliseconds; what has to read values runs
on the tiny models of the other tests.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lora_runtime import kernels
from lora_runtime.adapters import packed_adapter
from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey, RowPatch, ServingForm
from lora_runtime.base import loader, self_check
from lora_runtime.base.loader import Base, prepare_base
from lora_runtime.base.model.attention import KVLayout
from lora_runtime.base.self_check import Findings
from lora_runtime.config import BaseConfig
from lora_runtime.core import (
    AdapterUse,
    Request,
    Row,
    SamplingParams,
    ScheduledBatch,
    ScheduledRow,
)
from lora_runtime.engine import engine
from lora_runtime.engine.engine import USUAL_MAX_RANK, Engine
from lora_runtime.engine.memory_budget import largest_step
from lora_runtime.engine.model_runner import ModelRunner
from lora_runtime.engine.probe import probe_logits
from lora_runtime.kernels import cpu
from tests.driver import run, tiny_engine
from tests.tiny import tiny_base

DTYPES = (torch.bfloat16, torch.float32)
ROWS = (1, 2, 3, 7, 16, 33, 64, 65, 133)
BLOCK_SIZE = 16
MAX_ROWS, MAX_LENGTH = 256, 8192
FORMATS = ("nf4", "nf4-double", "fp4", "int8", "none")
LLAMA = "llama-3.1-8b"
SHAPES = {
    LLAMA: dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    ),
    "smollm2-135m": dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
    "mistral-7b": dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, sliding_window=4096,
    ),
    "qwen2.5-7b": dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064,
    ),
    "qwen3-8b": dict(
        model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936,
    ),
    "gemma2-9b": dict(
        model_type="gemma2", hidden_size=3584, intermediate_size=14336, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, vocab_size=256000, sliding_window=4096,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3-1b": dict(
        model_type="gemma3_text", hidden_size=1152, intermediate_size=6912, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, vocab_size=262144, sliding_window=512,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3-mini": dict(
        model_type="phi3", hidden_size=3072, intermediate_size=8192, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32064, pad_token_id=0,
    ),
    "qwen3.5-9b": dict(
        model_type="qwen3_5_text", hidden_size=4096, intermediate_size=12288,
        num_attention_heads=16, num_key_value_heads=4, head_dim=256, vocab_size=248320,
        layer_types=["linear_attention", "full_attention"],
    ),
    "granite-4-h-micro": dict(
        model_type="granitemoehybrid", hidden_size=2048, shared_intermediate_size=8192,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=100352, num_local_experts=0,
        num_experts_per_tok=0, mamba_n_heads=64, mamba_d_head=64, mamba_d_state=128,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2-1.2b": dict(
        model_type="lfm2", hidden_size=2048, intermediate_size=12288, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=65536, layer_types=["conv", "full_attention"],
    ),
    "falcon-h1-7b": dict(
        model_type="falcon_h1", hidden_size=3072, intermediate_size=12288, num_attention_heads=12,
        num_key_value_heads=2, head_dim=128, vocab_size=130049, mamba_d_ssm=3072, mamba_n_heads=24,
        mamba_d_head=128, mamba_n_groups=1, mamba_d_state=256, mamba_chunk_size=256,
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, vocab_size=151936, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
    ),
    "one key head": dict(
        model_type="llama", hidden_size=4544, intermediate_size=18176, num_attention_heads=71,
        num_key_value_heads=1, vocab_size=65024,
    ),
}  # fmt: skip
"""Of the families that are served, and queries that are no power of two over one key head. Not of
gpt-oss, whose attention with sinks is torch's, and reads how long rows are.
"""


RECURRENT = {
    "qwen3.5-9b": (16, 32, 128, 128, True, 8192, 4, False),
    "granite-4-micro": (1, 64, 128, 64, False, 4352, 4, True),
    "falcon-h1-7b": (1, 24, 256, 128, False, 3584, 4, True),
    "lfm2-1.2b": (0, 0, 0, 0, False, 2048, 3, False),
    "of no power of two": (3, 9, 72, 80, True, 1296, 4, True),
    "of one": (1, 1, 1, 1, True, 1, 2, True),
}
"""Recurrent layers: heads of keys, heads, numbers of a key and of a value, whether there is a β,
channels and taps of the convolution, whether it has a bias."""


def sizeless_base(
    shape: str, dtype: torch.dtype, quantization: str = "nf4", num_layers: int | None = None
) -> Base:
    """A base of a real model's shape without memory, by default of one layer of each kind. The
    checks of a loaded model that read values are left out.
    """
    options = {"max_position_embeddings": 131072} | SHAPES[shape]
    options["num_hidden_layers"] = num_layers or len(options.get("layer_types", [None]))
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    finally:
        torch.set_default_dtype(before)
    model.config.dtype = dtype
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "embed_scale"):  # one number, which is read
        embedding.embed_scale = torch.tensor(config.hidden_size**0.5)
    with (
        mock.patch.multiple(
            loader,
            place=lambda model, device: None,  # it has no memory, but for that one number
            original_logits=lambda model: [],
            observe=lambda model, original: (Findings(layout_of(config), True), None),
            self_check=lambda model, original, observed: None,
            fingerprint=lambda model, quantization: "",
        ),
        mock.patch.object(loader.BaseWeights, "measure_rows", lambda self: None),
    ):
        settings = BaseConfig(quantization=quantization, dequantized_cache=False)
        return prepare_base(model, settings, shape, Path("."))


def layout_of(config: PreTrainedConfig) -> KVLayout:
    """What the layers keep of a token, by the config: all of these models' layers are alike."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KVLayout.uniform(config.num_hidden_layers, config.num_key_value_heads, head_dim)


def sizeless_runner(
    base: Base, *, max_rank: int = USUAL_MAX_RANK, max_vocabulary_rows: int = 0, replicas: int = 1
) -> ModelRunner:
    """A runner over `base`, any module of which may have adapters of up to `max_rank`."""
    like = torch.empty(0, dtype=base.dtype, device=base.device)
    paths = base.spec.shapes if max_vocabulary_rows else base.spec.linears
    pool = AdapterPool(base.spec.shapes, 1 << 30, 256, like, bound=paths, max_rank=max_rank)
    if replicas > 1:
        pool.extents = torch.empty(pool.extents.shape[0], 256, replicas, 8, dtype=torch.int64).to(
            "meta"
        )
    pool.memory = replace(pool.memory, max_rows=max_vocabulary_rows)
    pool._bind()
    cache = base.allocate_kv(MAX_ROWS * BLOCK_SIZE)
    states = base.allocate_states(MAX_ROWS)
    return ModelRunner(base, cache, BLOCK_SIZE, pool, {}, MAX_ROWS, states)


class Captured:
    """Stands for a capture: runs now, and nothing at every replay."""

    def __call__(self, run: Callable[[], object]) -> Callable[[], None]:
        run()
        return lambda: None

    def drop(self, replays: object) -> None:
        """There is nothing to free."""


def planned_row(length: int, num_tokens: int, slot: int | None) -> ScheduledRow:
    """The last `num_tokens` tokens of a row of `length`, under the adapter in a slot."""
    uses = () if slot is None else (AdapterUse(digest=str(slot)),)
    row = Row.of(Request(request_id="", prompt_token_ids=(1,) * length, adapters=uses))
    row.slots = () if slot is None else (slot,)
    row.block_table = list(range(-(-length // BLOCK_SIZE)))
    return ScheduledRow(row, length - num_tokens, num_tokens)


def step(lengths: Sequence[int], num_tokens: Sequence[int], adapters: int) -> ScheduledBatch:
    """Rows of `lengths` of which the last `num_tokens` are computed; row i is under adapter
    i mod `adapters`, or all under none.
    """
    pairs = enumerate(zip(lengths, num_tokens, strict=True))
    slots = (lambda i: i % adapters) if adapters else (lambda i: None)
    return ScheduledBatch(tuple(planned_row(*sizes, slots(i)) for i, sizes in pairs))


@torch.inference_mode()
def steps_of(runner: ModelRunner, rows: Sequence[int] = ROWS) -> None:
    """Steps that no graph holds: `rows` rows of one token, one of them long; beside a prompt; and
    prompts alone.
    """
    for adapters in (0, 8):
        for n in rows:
            runner.logits(step([40] * n, [1] * n, adapters))
            runner.logits(step([MAX_LENGTH, *[40] * n], [1] * (n + 1), adapters))
            runner.logits(step([17, *[40] * n], [17, *[1] * n], adapters))
            runner.logits(step([n], [n], adapters))
        for prompt in (300, 2048):
            runner.logits(step([prompt], [prompt], adapters))


def use_graphs(runner: ModelRunner, max_rows: int, max_length: int) -> None:
    """As an engine on CUDA does: not over mixtures of experts."""
    if not runner.base.spec.routers:
        runner.use_graphs(max_rows, max_length, Captured())


@torch.inference_mode()
def graphs_of(runner: ModelRunner) -> None:
    """The steps that graphs are captured of, and what else is done before the first request."""
    use_graphs(runner, MAX_ROWS, MAX_LENGTH)
    runner.warm_up(lambda _: None)
    runner.graphs = None


def real_shapes() -> None:
    """Every step of every shape; of one of them in every format, rank and kind of adapter."""
    for dtype in DTYPES:
        for shape in SHAPES:
            for quantization in FORMATS if shape == LLAMA else ("nf4",):
                runner = sizeless_runner(sizeless_base(shape, dtype, quantization))
                graphs_of(runner)
                steps_of(runner)
        base = sizeless_base(LLAMA, dtype)
        for max_rank in (8, 128):
            steps_of(sizeless_runner(base, max_rank=max_rank), (1, 33, 133))
        for replicas in (2, 16):
            steps_of(sizeless_runner(base, replicas=replicas), (1, 33))
        for max_vocabulary_rows in (64, base.spec.vocab_size):
            steps_of(sizeless_runner(base, max_vocabulary_rows=max_vocabulary_rows), (1, 33, 133))
        other_ops(dtype)


def sample() -> None:
    """A little of `real_shapes` that launches every kernel."""
    for dtype in DTYPES:
        for quantization in ("nf4", "nf4-double", "int8"):
            base = sizeless_base(LLAMA, dtype, quantization)
            runner = sizeless_runner(base, max_vocabulary_rows=64)
            steps_of(runner, (1, 33))
        steps_of(sizeless_runner(sizeless_base("one key head", dtype)), (3,))
        other_ops(dtype)


def other_ops(dtype: torch.dtype) -> None:
    """The write of keys that transformers has rotated, draws from a large vocabulary, a layer of
    Qwen3-30B-A3B's experts, and steps of recurrent layers.
    """
    with torch.device("meta"):
        k, slots = torch.empty(3, 8, 128, dtype=dtype), torch.empty(3, dtype=torch.int64)
        scaled, number = torch.empty(3, 128256), torch.empty(3, 1, dtype=torch.float64)
        kernels.write_kv(k, k, k, k, slots)
        kernels.draw_cut(scaled, number, *torch.empty(3, 3, 1))
        x, starts = torch.empty(96, 2048, dtype=dtype), torch.empty(129, dtype=torch.int32)
        codes = torch.empty(128 * 1536, 2048, dtype=torch.int8)
        packed = torch.empty(codes.numel() // 2, dtype=torch.uint8)
        scales, code = torch.empty(codes.numel() // 64), torch.empty(16)
        kernels.grouped_four_bit_product(x, starts, packed, scales, code, 1536)
        kernels.grouped_int8_product(x, starts, codes, scales[: len(codes)])
    for name in RECURRENT:
        for num_rows in (1, 3):
            recurrent_steps(name, num_rows, dtype)


def recurrent_steps(name: str, num_rows: int, dtype: torch.dtype) -> None:
    """A step of a layer of `RECURRENT`, with a snapshot and without; what it is given is cut out of
    a larger product.
    """
    key_heads, heads, keys, values, has_beta, channels, taps, has_bias = RECURRENT[name]
    with torch.device("meta"):
        slots = torch.empty(num_rows, dtype=torch.int64)
        states = torch.empty(9, heads, keys, values)
        histories = torch.empty(9, taps - 1, channels)
        q, k, v, _ = (
            torch.empty(num_rows, (2 * key_heads + 1) * keys + heads * values)
            .split([key_heads * keys] * 2 + [heads * values, keys], 1)
        )  # fmt: skip
        keep = torch.empty(num_rows, heads)
        x = torch.empty(num_rows, channels + heads, dtype=dtype)[:, :channels]
        weight, bias = torch.empty(channels, 1, taps, dtype=dtype), torch.empty(channels).to(dtype)
    q, k = (part.unflatten(1, (key_heads, keys)) for part in (q, k))
    for copies in (None, slots):
        kernels.conv_step(
            histories, slots, x, weight[:, 0], bias if has_bias else None,
            is_silu=heads > 0, copies=copies,
        )  # fmt: skip
        if heads:
            kernels.recurrent_step(
                states, slots, q, k, v.unflatten(1, (heads, values)), keep,
                keep if has_beta else None, copies,
            )  # fmt: skip


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """What an engine does on a CUDA device and not elsewhere, as far as it touches launches."""
    pool = partial(AdapterPool, max_rank=USUAL_MAX_RANK)

    def bound_pool(paths, *args, bound=None, max_rank=0):
        return pool(paths, *args, bound=bound or list(paths))

    with (
        mock.patch.object(packed_adapter, "adapter_dtype", lambda device, compute: compute),
        mock.patch.object(engine, "adapter_dtype", lambda device, compute: compute),
        mock.patch.object(engine, "AdapterPool", bound_pool),
        mock.patch.object(cpu, "can_sort", lambda *tensors: False),
        mock.patch.dict(
            self_check.SELF_CHECK_TOLERANCE, dict.fromkeys(DTYPES, float("inf")), clear=True
        ),
    ):
        yield


def forms_of(base: Base) -> list[ServingForm]:
    """An adapter of every kind that a kernel treats differently."""
    linears = base.spec.linears

    def low_rank(rank: int, path: str, **parts) -> ModuleForm:
        shape = base.spec.shapes[path]
        num_experts = shape.experts.count if shape.experts else 1
        a = torch.zeros(num_experts * rank, shape.in_features)
        b = torch.zeros(shape.out_features, num_experts * rank)
        return ModuleForm(a=a, b=b, num_experts=num_experts, **parts)

    def form(name: str, modules: dict[str, ModuleForm], **options) -> ServingForm:
        keyed = {ModuleKey(path): module for path, module in modules.items()}
        return ServingForm(facts=AdapterFacts(digest=name, variant=name, **options), modules=keyed)

    patch = RowPatch(torch.zeros(2, base.spec.hidden_size), torch.tensor([3, 9]).int())
    everywhere = {path: low_rank(8, path) for path in linears}
    gains = {
        path: low_rank(4, path, gain=torch.ones(shape.out_features))
        for path, shape in linears.items()
        if not shape.experts
    }
    deep = (0, 1, *range(base.spec.num_layers))
    replicated = [] if base.spec.state_bytes else [form("replicated", everywhere, layer_map=deep)]
    vocabulary = {
        base.spec.embedding: low_rank(4, base.spec.embedding, patch=patch),
        base.spec.head: low_rank(4, base.spec.head, patch=patch),
    }
    return [
        form("lora", everywhere),
        form("dora", gains),
        form("alora", everywhere, invocation_tokens=(7, 11)),
        form("large", {path: low_rank(96, path) for path in list(linears)[:3]}),
        form("vocabulary", vocabulary),
        *replicated,
    ]


def requests_of(forms: Sequence[ServingForm], lengths: Sequence[int]) -> list[Request]:
    """Greedy and drawn requests: of the base, of every adapter, of two at once."""
    owners = [(), *((form.digest,) for form in forms), ("lora", "dora")]
    kinds = [
        dict(temperature=0.0),
        dict(temperature=0.7, top_p=0.9),
        dict(temperature=1.0, top_k=5, min_p=0.1, num_logprobs=3),
        dict(temperature=0.0, min_tokens=2, stop_token_ids=frozenset({1})),
        dict(presence_penalty=0.5, logit_bias=((3, 1.0),), num_prompt_logprobs=2),
    ]
    return [
        Request(
            request_id=str(i),
            prompt_token_ids=(*([5] * length), 7, 11, 9),
            sampling=SamplingParams(max_tokens=6, **kinds[i % len(kinds)]),
            adapters=tuple(AdapterUse(digest=digest) for digest in owners[i % len(owners)]),
        )
        for i, length in enumerate(lengths)
    ]


def cuda_engine(base: Base, forms: Sequence[ServingForm], **options) -> Engine:
    """An engine that holds `forms`, with decode graphs whose capture runs once.

    Its number of slots is odd: when a replicated adapter doubles the extent tables, their stride
    becomes a multiple of 16, and no kernel may be compiled anew for that.
    """
    options = {"max_num_seqs": 24, "max_num_batched_tokens": 48, "max_slots": 15, **options}
    serving = tiny_engine(base, poison=False, steps_ahead=1, **options)
    use_graphs(serving.runner, 24, 512)
    for form in forms:
        serving.add_adapter(form)
    return serving


def varied_load(serving: Engine, forms: Sequence[ServingForm]) -> None:
    """Rows that grow in number and length, prompts in chunks, adapters that come and go."""
    lengths = [1, 2, 3, 5, 9, 17, 33, 60, 120, 200, 4, 4, 7, 31, 64, 90, 11, 3, 2, 1]
    requests = requests_of(forms, lengths)
    arrivals = {request.request_id: 2 * i for i, request in enumerate(requests)}
    run(serving, requests, arrivals=arrivals)


SERVED = (
    "llama-bias", "gemma2", "gemma3", "qwen3", "phi3", "qwen3.5", "granite-h", "lfm2", "falcon-h1",
    "qwen3-moe", "granite-moe",
)  # fmt: skip


def serving(shapes: Sequence[str] = SERVED) -> None:
    """Start, warm-up, the largest step, the parity gate's forwards, and requests of every kind."""
    with as_on_cuda():
        for shape in shapes:
            for dtype in DTYPES:
                base = tiny_base(shape, dtype=dtype, dequantized_cache=False)
                forms = forms_of(base)
                serving = cuda_engine(base, forms)
                serving.runner.warm_up(lambda _: None)
                serving.runner.start(largest_step(base, serving.config)).result()
                probe_logits(base, forms[0], [[5, 6], [7, 8, 9]])
                varied_load(serving, forms)


TRAINED = (
    ("llama", "nf4"), ("llama", "nf4-double"), ("llama", "int8"), ("qwen3-moe", "nf4"),
    ("qwen3-moe", "int8"), ("granite-h", "nf4"), ("qwen3.5", "nf4"),
)  # fmt: skip


def training() -> None:
    """Updates and evaluation of two units on a quantised base without dense copies."""
    from lora_runtime.training.config import UnitConfig
    from tests.lora_runtime.training.tiny_runs import make_tokenizer, ragged_data
    from tests.lora_runtime.training.tiny_runs import run as train

    with as_on_cuda(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer(folder)
        data, held_out = ragged_data(folder / "data", 8), ragged_data(folder / "eval", 4, seed=1)
        for shape, quantization in TRAINED:
            for dtype in DTYPES:
                base = tiny_base(
                    shape, dtype=dtype, quantization=quantization, dequantized_cache=False
                )
                dora: dict = {"use_dora": True}
                if base.spec.routers:  # PEFT has no DoRA on experts
                    dora["target_modules"] = ["q_proj", "o_proj"]
                units = [
                    UnitConfig(name=kind, data=data, eval_data=held_out, max_steps=2, **options)
                    for kind, options in (("lora", {}), ("dora", dora))
                ]
                train(base, tokenizer, folder / f"{shape}-{quantization}-{dtype}", units)


def bench() -> None:
    """The dry run of bench/gpu.py, all stages but training, whose losses are none here: `training`
    has its launches.
    """
    from bench import gpu as benchmark

    with (
        as_on_cuda(),
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        assert benchmark.main(["kernels", "engine", "serve", "--out", folder]) == 0, (
            Path(folder) / "rows.jsonl"
        ).read_text()


def bench_sizes() -> None:
    """The kernels of bench/gpu.py at the sizes that it has on a GPU: the checks on the CPU, what is
    timed without memory. In a process that has not imported the benchmark yet.
    """
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        from bench import gpu_experts, gpu_kernels, gpu_recurrent, gpu_timing
    from bench.gpu import CANDIDATES

    def once(call: Callable[[int], object], num_calls: int) -> float:
        call(0)
        return 1.0

    modules = (gpu_kernels, gpu_recurrent, gpu_experts)
    ceilings = gpu_timing.Ceilings(1.0, 1.0, 1.0)
    candidates = {"triton": CANDIDATES["triton"]}
    timed = {
        "DEVICE": torch.device("meta"),
        "seconds_per_call": once,
        "error": lambda y, expected: 0.0,
        "copies_of": lambda num_bytes: 1,
    }
    with contextlib.ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.object(module, "DEVICE", torch.device("cpu")))
        # A mixture's checks are as many multiplications as experts: fewer launch the same.
        patches.enter_context(mock.patch.object(gpu_experts, "NUM_EXPERTS", 8))
        for module in modules:
            for case in module.check_cases():
                module.check(**case)
    with contextlib.ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.multiple(module, **timed))
        tables = [
            *gpu_kernels.product_tables(ceilings, candidates),
            gpu_kernels.values_table(ceilings),
            gpu_kernels.adapter_table(ceilings),
            gpu_kernels.attention_table(ceilings),
            gpu_recurrent.recurrent_table(ceilings),
            gpu_experts.experts_table(ceilings),
        ]
        for table in tables:
            for case in table.cases():
                table.measure(**case)


DRIVES: dict[str, Callable[[], None]] = {
    drive.__name__: drive for drive in (real_shapes, sample, serving, training, bench, bench_sizes)
}
