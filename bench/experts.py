"""How fast is a mixture of experts in 4 bits with adapters, beside its floor and PEFT?

A random model of Qwen3-MoE's form, tiny but wide: 16 layers of 32 experts, 4 a token. 32 rows
decode together; in turn they have one of 8 adapters or none. Four adapters change the experts too
(PEFT's `target_parameters`), the others attention alone.

Floor of a step: bytes of what it must read (4-bit layers, of the experts those that its tokens
chose, the output layer, the blocks of the adapters that its pairs chose, keys and values) over the
read bandwidth, or multiply-adds over the rate of a large product, whichever is larger; both are
measured in every round, and their medians taken. PEFT cannot mix adapters of experts in a batch,
nor quantise them: it runs the same rows in bfloat16 without adapters of experts, and transformers
without any. The last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench import machine
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.loader import Base, load_base
from lora_runtime.base.model.experts import AdaptedExperts
from lora_runtime.base.model.routing import Routing
from lora_runtime.config import (
    AdapterConfig,
    BaseConfig,
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
)
from lora_runtime.core import AdapterUse, Request, SamplingParams
from lora_runtime.engine.engine import Engine

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
NUM_ADAPTERS = 8


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """A random checkpoint in bfloat16."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=8192, hidden_size=args.hidden, head_dim=64, num_attention_heads=8,
        num_key_value_heads=2, num_hidden_layers=args.layers, num_experts=args.experts,
        num_experts_per_tok=args.chosen, moe_intermediate_size=args.inner, norm_topk_prob=True,
        intermediate_size=args.inner, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def write_adapters(model: PreTrainedModel, folder: Path, rank: int) -> list[Path]:
    """PEFT's folders: the even ones adapt attention, the odd ones experts too."""
    folders = []
    for index in range(NUM_ADAPTERS):
        parameters = EXPERTS if index % 2 else None
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=ATTENTION, target_parameters=parameters,
            init_lora_weights=False,
        )  # fmt: skip
        folders.append(folder / f"adapter-{index}")
        get_peft_model(copy.deepcopy(model), config).save_pretrained(folders[-1])
    return folders


@contextmanager
def chosen_experts() -> Iterator[list[int]]:
    """How many experts each mixture reads, while inside."""
    counts: list[int] = []
    original = AdaptedExperts.product

    def product(self: AdaptedExperts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        counts.append(len(routing.experts.unique()))
        return original(self, x, routing)

    AdaptedExperts.product = product  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        AdaptedExperts.product = original  # type: ignore[method-assign]


class Workload:
    """The rows, and every contender's way to decode them."""

    def __init__(self, args: argparse.Namespace, base: Base, folders: list[Path]) -> None:
        self.args, self.base = args, base
        generator = torch.Generator().manual_seed(0)
        shape = (args.rows, args.prompt_tokens)
        self.prompts = torch.randint(5, base.spec.vocab_size, shape, generator=generator)
        self.owners = [i % (len(folders) + 1) - 1 for i in range(args.rows)]
        self.engine = Engine(
            base,
            EngineConfig(
                cache=CacheConfig(prefix_cache=False, num_blocks=1024),
                scheduler=SchedulerConfig(max_num_seqs=args.rows),
                adapters=AdapterConfig(pool_bytes=args.pool_mib << 20),
            ),
        )
        self.forms = [load_adapter(folder, base.spec, base.weights) for folder in folders]
        for form in self.forms:
            self.engine.add_adapter(form)

    def step_seconds(self, *, is_mixed: bool) -> list[float]:
        """Wall time of every decode step of all rows together."""
        sampling = SamplingParams(max_tokens=self.args.new_tokens, temperature=0.0)
        for index, owner in enumerate(self.owners):
            prompt = tuple(self.prompts[index].tolist())
            request = Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling)
            if is_mixed and owner >= 0:
                use = AdapterUse(digest=self.forms[owner].digest)
                request = replace(request, adapters=(use,))
            self.engine.add_request(request)
        times = []
        while not self.engine.is_idle:
            start = time.perf_counter()
            num_tokens = sum(len(output.token_ids) for output in self.engine.step())
            if num_tokens == self.args.rows:
                times.append(time.perf_counter() - start)
        return times[1:]  # the first one ends the prompts

    def floor(self, bandwidth: float, rate: float, *, is_mixed: bool, num_chosen: float) -> float:
        """Seconds that the machine's ceilings allow a step in the middle of the run."""
        args, spec = self.args, self.base.spec
        plain = sum(s.in_features * s.out_features for s in spec.linears.values() if not s.experts)
        expert = sum(s.in_features * s.out_features for s in spec.linears.values() if s.experts)
        head = spec.hidden_size * spec.vocab_size
        kv_tokens = args.rows * (args.prompt_tokens + args.new_tokens // 2)
        moved = (plain + num_chosen * expert) * 9 / 16 + head * 2
        moved += kv_tokens * self.base.kv_bytes_per_token()
        work = args.rows * (plain + args.chosen * expert + head)
        if is_mixed:
            sides = sum(s.in_features + s.out_features for s in spec.linears.values() if s.experts)
            rows = [self.owners.count(index) for index in range(NUM_ADAPTERS)]
            for index, form in enumerate(self.forms):
                whole = sum(
                    m.a.nbytes + m.b.nbytes for m in form.modules.values() if m.num_experts > 1
                )
                blocks = min(args.experts, rows[index] * args.chosen) / args.experts
                moved += form.nbytes - whole * (1 - blocks)
                work += rows[index] * args.rank * args.chosen * (sides if index % 2 else 0)
        return max(moved / bandwidth, work / rate)

    @torch.inference_mode()
    def generate_seconds(self, model: torch.nn.Module, **kwargs: object) -> float:
        """Wall time of a decode step of transformers' generate, prompts left out; the median over
        the rounds.
        """

        def run(new_tokens: int) -> float:
            start = time.perf_counter()
            model.generate(
                input_ids=self.prompts, attention_mask=torch.ones_like(self.prompts),
                do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens,
                pad_token_id=0, **kwargs,
            )  # fmt: skip
            return time.perf_counter() - start

        times = [(run(1), run(1 + self.args.peer_tokens)) for _ in range(self.args.rounds)]
        return statistics.median(long - short for short, long in times) / self.args.peer_tokens


def resident_share(base: Base) -> float:
    """Bytes that the experts take over those of their codes and scales."""
    packed = resident = 0.0
    for path, shape in base.spec.linears.items():
        if shape.experts is not None:
            size = shape.experts.count * shape.in_features * shape.out_features
            packed += size / 2 + size / 64 * 4
            resident += base.model.get_submodule(path).linear.resident_bytes
    return resident / packed


def measured(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    write_model(folder / "base", args)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).eval()
    folders = write_adapters(model, folder, args.rank)
    base = load_base(BaseConfig(model=str(folder / "base"), dtype="bfloat16"))
    with chosen_experts() as counts:  # an engine that is asked for them plays no step again
        Workload(args, base, folders).step_seconds(is_mixed=True)
    num_chosen = statistics.fmean(counts[len(counts) // 2 :])
    workload = Workload(args, base, folders)
    times, ceilings = {"mixed": [], "base_only": []}, []
    for _ in range(args.rounds):
        ceilings.append((machine.read_bandwidth(), machine.gemm_rate(torch.bfloat16)))
        for name, found in times.items():
            found += workload.step_seconds(is_mixed=name == "mixed")
    attention = folders[::2]
    peft = PeftModel.from_pretrained(copy.deepcopy(model), attention[0], attention[0].name).eval()
    for other in attention[1:]:
        peft.load_adapter(other, other.name)
    names = ["__base__" if o < 0 else attention[o % len(attention)].name for o in workload.owners]
    peers = {
        "transformers_base_only": workload.generate_seconds(model),
        "peft_attention_mixed": workload.generate_seconds(peft, adapter_names=names),
    }
    bandwidth, rate = (statistics.median(found) for found in zip(*ceilings, strict=True))
    step = {name: statistics.median(found) for name, found in times.items()}
    floors = {
        name: workload.floor(bandwidth, rate, is_mixed=name == "mixed", num_chosen=num_chosen)
        for name in times
    }
    return {
        "experts_chosen_a_layer": round(num_chosen, 1),
        "experts_resident_over_packed": round(resident_share(base), 4),
        "step_ms": {name: round(1e3 * value, 2) for name, value in step.items()},
        "floor_ms": {name: round(1e3 * value, 2) for name, value in floors.items()},
        "over_floor": {name: round(step[name] / floors[name], 2) for name in step},
        "mixed_over_base_only": round(step["base_only"] / step["mixed"], 3),
        "peers_ms": {name: round(1e3 * value, 1) for name, value in peers.items()},
        "mixed_over_peft": round(peers["peft_attention_mixed"] / step["mixed"], 2),
        "base_only_over_transformers": round(
            peers["transformers_base_only"] / step["base_only"], 2
        ),
        "read_bytes_per_s": round(bandwidth),
        "multiply_adds_per_s": round(rate),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sizes = {"layers": 16, "experts": 32, "chosen": 4, "hidden": 512, "inner": 512, "rows": 32,
             "prompt-tokens": 32, "new-tokens": 32, "peer-tokens": 8, "rank": 8, "rounds": 3,
             "pool-mib": 1024}  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder of the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(args, Path(folder))
    question = {
        "question": "a decode step of a mixture of experts",
        "workload": machine.asked(args),
    }
    machine.save("experts", {**machine.facts(), **question, **found}, args.out)


if __name__ == "__main__":
    main()
