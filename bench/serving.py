"""How fast is a mixed batch of many adapters, beside the base alone, PEFT and the machine's floor?

32 requests of 90 prompt and 64 new tokens on SmolLM2-135M, in turn over 8 adapters (rank 16, all
linear layers) and the base. The contenders run one after another, several rounds, in one process:
our engine mixed and base-only, PEFT's mixed batch and transformers' generate, both on the
dequantised base in the compute dtype that is fastest here; and one request alone, on the base and
under an adapter. No prompt is found in a prefix cache.

The floor of a step is the larger of bytes / read bandwidth (packed base, lm_head, the distinct
adapters and the keys and values of that step) and multiply-adds / the rate of a large matrix
product, both measured in the same run. The last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench import machine
from lora_runtime.adapters.files.peft_writer import peft_files
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.loader import Base, load_base
from lora_runtime.config import (
    AdapterConfig,
    BaseConfig,
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
)
from lora_runtime.core import AdapterUse, Request, SamplingParams
from lora_runtime.engine.engine import Engine


def write_random_adapters(base: Base, folder: Path, count: int, rank: int) -> list[Path]:
    """PEFT folders of small random adapters on every inner linear layer."""
    folders = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        tensors = {
            path: (
                torch.randn(rank, shape.in_features, generator=generator) / shape.in_features**0.5,
                0.02 * torch.randn(shape.out_features, rank, generator=generator),
            )
            for path, shape in base.spec.linears.items()
        }
        names = sorted({path.rpartition(".")[2] for path in tensors})
        files = peft_files(
            rank=rank, alpha=rank, use_rslora=False, target_modules=names,
            tensors=tensors, base=base.spec,
        )  # fmt: skip
        folders.append(folder / f"adapter-{index}")
        files.write(folders[-1])
    return folders


def dense_model(base: Base) -> PreTrainedModel:
    """The plain transformers model with the base's dequantised weights."""
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=base.dtype).eval()
    with torch.no_grad():
        for path in base.spec.linears:
            weight = base.model.get_submodule(path).linear.weight_values()
            model.get_submodule(path).weight.copy_(weight)
    return model


class Workload:
    """The requests, and every contender's way to run them. Each returns output tokens a second."""

    def __init__(self, args: argparse.Namespace, base: Base, folders: list[Path]) -> None:
        self.args, self.base = args, base
        generator = torch.Generator().manual_seed(0)
        shape = (args.requests, args.prompt_tokens)
        self.prompts = torch.randint(5, base.spec.vocab_size, shape, generator=generator)
        self.owners = [i % (len(folders) + 1) - 1 for i in range(args.requests)]
        self.engine = Engine(
            base,
            EngineConfig(
                cache=CacheConfig(prefix_cache=False),
                scheduler=SchedulerConfig(max_num_seqs=args.requests),
                adapters=AdapterConfig(pool_bytes=args.pool_mib << 20),
            ),
        )
        self.digests = []
        for folder in folders:
            form = load_adapter(folder, base.spec, base.weights)
            self.engine.add_adapter(form)
            self.digests.append(form.digest)
        self.dense = dense_model(base)
        self.peft = PeftModel.from_pretrained(copy.deepcopy(self.dense), folders[0], "adapter-0")
        for folder in folders[1:]:
            self.peft.load_adapter(folder, folder.name)
        self.peft.eval()

    def ours_mixed(self) -> float:
        return self._serve(is_mixed=True)

    def ours_base_only(self) -> float:
        return self._serve(is_mixed=False)

    def ours_alone(self) -> float:
        return self._serve(is_mixed=False, num_requests=1)

    def ours_alone_adapted(self) -> float:
        return self._serve(is_mixed=True, num_requests=1, first=1)

    def transformers_alone(self) -> float:
        return self._generate(self.dense, num_requests=1)

    def peft_mixed(self) -> float:
        names = ["__base__" if i < 0 else f"adapter-{i}" for i in self.owners]
        return self._generate(self.peft, adapter_names=names)

    def transformers_base_only(self) -> float:
        return self._generate(self.dense)

    def _serve(self, *, is_mixed: bool, num_requests: int | None = None, first: int = 0) -> float:
        """`num_requests` of the requests, None: all, from the `first` on."""
        sampling = SamplingParams(max_tokens=self.args.new_tokens, temperature=0.0)
        chosen = list(zip(self.prompts.tolist(), self.owners, strict=True))[first:][:num_requests]
        for index, (prompt, owner) in enumerate(chosen):
            request = Request(
                request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling
            )
            if is_mixed and owner >= 0:
                request = replace(request, adapters=(AdapterUse(digest=self.digests[owner]),))
            self.engine.add_request(request)
        num_tokens, start = 0, time.perf_counter()
        while not self.engine.is_idle:
            num_tokens += sum(len(output.token_ids) for output in self.engine.step())
        return num_tokens / (time.perf_counter() - start)

    @torch.inference_mode()
    def _generate(
        self, model: torch.nn.Module, num_requests: int | None = None, **kwargs: object
    ) -> float:
        new_tokens, start = self.args.new_tokens, time.perf_counter()
        prompts = self.prompts[:num_requests]
        out = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0, **kwargs,
        )  # fmt: skip
        num_tokens = (out.shape[1] - prompts.shape[1]) * out.shape[0]
        return num_tokens / (time.perf_counter() - start)

    def floor(self, bandwidth: float, rate: float, *, is_mixed: bool) -> float:
        """Output tokens a second that the machine's ceilings allow, over the whole run."""
        args, spec = self.args, self.base.spec
        linear_size = sum(s.in_features * s.out_features for s in spec.linears.values())
        head_size = spec.hidden_size * spec.vocab_size
        adapter_size = args.rank * sum(
            s.in_features + s.out_features for s in spec.linears.values()
        )
        adapter_rows = sum(owner >= 0 for owner in self.owners) if is_mixed else 0
        num_distinct = len({owner for owner in self.owners if owner >= 0}) if is_mixed else 0
        item_bytes = self.base.dtype.itemsize
        prompt_work = args.prompt_tokens * (
            args.requests * linear_size + adapter_rows * adapter_size
        )
        seconds = prompt_work / rate
        for position in range(args.new_tokens):
            kv_tokens = args.requests * (args.prompt_tokens + position)
            moved = (
                linear_size * 9 / 16
                + head_size * item_bytes
                + num_distinct * adapter_size * 4
                + kv_tokens * self.base.kv_bytes_per_token()
            )
            work = args.requests * (linear_size + head_size) + adapter_rows * adapter_size
            work = work if position else args.requests * head_size
            seconds += max(moved / bandwidth, work / rate)
        return args.requests * args.new_tokens / seconds


CONTENDERS = (
    "ours_mixed", "ours_base_only", "peft_mixed", "transformers_base_only",
    "ours_alone", "ours_alone_adapted", "transformers_alone",
)  # fmt: skip


def compared(workload: Workload, num_rounds: int) -> dict[str, list[float]]:
    """Every contender's output tokens a second in each round; a round before warms ours up."""
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for round_number in range(num_rounds + 1):
        for name in CONTENDERS:
            if round_number or name.startswith("ours"):
                speed = getattr(workload, name)()
                if round_number:
                    speeds[name].append(round(speed, 1))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=90)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool-mib", type=int, default=512)
    args = parser.parse_args()
    base = load_base(BaseConfig(model=args.base))
    with tempfile.TemporaryDirectory() as folder:
        folders = write_random_adapters(base, Path(folder), args.adapters, args.rank)
        workload = Workload(args, base, folders)
    speeds = compared(workload, args.rounds)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ceilings = machine.read_bandwidth(), machine.gemm_rate(base.dtype)
    floors = {
        "mixed": round(workload.floor(*ceilings, is_mixed=True), 1),
        "base_only": round(workload.floor(*ceilings, is_mixed=False), 1),
    }
    result = {
        **machine.facts(),
        "question": "output tokens a second of a mixed batch",
        "workload": vars(args),
        "dtype": base.spec.dtype,
        "tokens_per_s": speeds,
        "median": median,
        "read_bytes_per_s": round(ceilings[0]),
        "multiply_adds_per_s": round(ceilings[1]),
        "floor": floors,
        "mixed_over_peft": round(median["ours_mixed"] / median["peft_mixed"], 2),
        "base_only_over_transformers": round(
            median["ours_base_only"] / median["transformers_base_only"], 2
        ),
        "base_only_over_floor": round(median["ours_base_only"] / floors["base_only"], 3),
        "mixed_over_base_only": round(median["ours_mixed"] / median["ours_base_only"], 3),
        "mixed_over_floor": round(median["ours_mixed"] / floors["mixed"], 3),
    }
    machine.save("serving", result)


if __name__ == "__main__":
    main()
