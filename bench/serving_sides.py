"""Who is measured in the benchmark of serving. Each side runs a whole batch and says how long it
took; none finds a prompt in a prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench import wires
from bench.served import serving
from bench.serving_load import BASE, EIGHT, MIXES, OURS, ROWS, Batch
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.loader import Base
from lora_runtime.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from lora_runtime.core import AdapterUse, Request, SamplingParams
from lora_runtime.engine.engine import Engine
from loramux.server.client import AsyncClient

PATIENCE_S = 600


class Side(Protocol):
    """One contender."""

    name: str
    cells: list[tuple[str, int]]
    """The (mix, number of rows) that it takes part in."""
    step_ms: tuple[float, float]
    """What a step takes on two cores of an AMD EPYC, and each of its rows beside it: roughly, to
    say beforehand how long a run takes.
    """

    def run(self, batch: Batch) -> float:
        """Seconds for every token of a batch."""
        ...


class Ours:
    """The engine in this process."""

    name = OURS
    cells = list(itertools.product(MIXES, ROWS))
    step_ms = 4.0, 1.4

    def __init__(self, base: Base, folders: list[Path]) -> None:
        config = EngineConfig(
            cache=CacheConfig(prefix_cache=False),
            scheduler=SchedulerConfig(max_num_seqs=max(ROWS)),
            adapters=AdapterConfig(pool_bytes=2 << 30),  # all at once, in float32 too
        )
        self._engine = Engine(base, config)
        self._digests = []
        for folder in folders:
            form = load_adapter(folder, base.spec, base.weights)
            self._engine.add_adapter(form)
            self._digests.append(form.digest)

    def run(self, batch: Batch) -> float:
        """See `Side`."""
        sampling = SamplingParams(max_tokens=batch.new_tokens, temperature=0.0)
        begun = time.perf_counter()
        for index, (prompt, owner) in enumerate(zip(batch.prompts(), batch.owners(), strict=True)):
            uses = () if owner is None else (AdapterUse(digest=self._digests[owner]),)
            self._engine.add_request(
                Request(
                    request_id=str(index),
                    prompt_token_ids=tuple(prompt),
                    sampling=sampling,
                    adapters=uses,
                )
            )
        num_tokens = 0
        while not self._engine.is_idle:
            num_tokens += sum(len(output.token_ids) for output in self._engine.step())
        seconds = time.perf_counter() - begun
        _check(self.name, batch, num_tokens)
        return seconds


class OverGrpc:
    """`loramux serve` in a process of its own; its client shares the cores with it."""

    name = "loramux over gRPC"
    cells = [(BASE, 1), (BASE, 32), (EIGHT, 1), (EIGHT, 32)]
    step_ms = 5.0, 1.5

    def __init__(self, runner: asyncio.Runner, client: AsyncClient, folders: list[Path]) -> None:
        self._runner, self._wire = runner, wires.OverGrpc(client)
        self._names = [folder.name for folder in folders]
        self._salts = map(str, itertools.count())
        for folder in folders:
            runner.run(client.load_adapter(folder.name, str(folder)))

    @classmethod
    @contextlib.contextmanager
    def serving(
        cls, args: argparse.Namespace, folder: Path, folders: list[Path]
    ) -> Iterator[OverGrpc]:
        """A server with the same base as `Ours` and with the adapters, until the context ends."""
        cache = "--dequantized-cache" if args.dequantized_cache else "--no-dequantized-cache"
        flags = "--device", "cpu", "--dtype", args.dtype, cache
        with serving(args.base, folder, max(ROWS), *flags) as served, asyncio.Runner() as runner:
            client = AsyncClient(served.grpc)
            runner.run(client.__aenter__())
            try:
                yield cls(runner, client, folders)
            finally:
                runner.run(client.__aexit__(None, None, None))

    def run(self, batch: Batch) -> float:
        """See `Side`."""
        return self._runner.run(self._run(batch))

    async def _run(self, batch: Batch) -> float:
        salt, begun = next(self._salts), time.perf_counter()
        pairs = zip(batch.prompts(), batch.owners(), strict=True)
        streams = [self._stream(prompt, owner, batch.new_tokens, salt) for prompt, owner in pairs]
        counts = await asyncio.gather(*streams)
        seconds = time.perf_counter() - begun
        _check(self.name, batch, sum(counts))
        return seconds

    async def _stream(
        self, prompt: list[int], owner: int | None, num_tokens: int, salt: str
    ) -> int:
        adapter = None if owner is None else self._names[owner]
        return (await self._wire(wires.Prompt(adapter, prompt, salt), num_tokens)).num_tokens


class Transformers:
    """`generate` on the dequantised base, in the same dtype."""

    name = "transformers"
    cells = [(BASE, 1), (BASE, 8), (BASE, 32)]
    step_ms = 24.0, 3.0

    def __init__(self, dense: PreTrainedModel) -> None:
        self._model = dense

    def run(self, batch: Batch) -> float:
        """See `Side`."""
        return _generate(self.name, self._model, batch)


class Peft:
    """PEFT's mixed batch, on the same model as `Transformers`."""

    name = "PEFT"
    cells = [(EIGHT, 32)]
    step_ms = 24.0, 8.0

    def __init__(self, dense: PreTrainedModel, folders: list[Path]) -> None:
        first, *others = folders
        self._model = PeftModel.from_pretrained(copy.deepcopy(dense), first, first.name)
        for folder in others:
            self._model.load_adapter(folder, folder.name)
        self._model.eval()
        self._names = [folder.name for folder in folders]

    def run(self, batch: Batch) -> float:
        """See `Side`."""
        names = ["__base__" if o is None else self._names[o] for o in batch.owners()]
        return _generate(self.name, self._model, batch, adapter_names=names)


class OpenVino:
    """OpenVINO GenAI's continuous batching of a GGUF file or of a folder in its own form."""

    name = "OpenVINO GenAI"
    cells = [(BASE, rows) for rows in ROWS]
    step_ms = 8.0, 1.1

    def __init__(self, model: str) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = max(ROWS)
        scheduler.cache_size = 1  # GiB
        self._pipeline = openvino_genai.LLMPipeline(model, "CPU", scheduler_config=scheduler)

    def run(self, batch: Batch) -> float:
        """See `Side`."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = batch.new_tokens
        config.do_sample, config.ignore_eos = False, True
        prompts = torch.tensor(batch.prompts()).numpy()
        masks = torch.ones_like(torch.from_numpy(prompts)).numpy()
        inputs = self._genai.TokenizedInputs(
            self._openvino.Tensor(prompts), self._openvino.Tensor(masks)
        )
        begun = time.perf_counter()
        tokens = self._pipeline.generate(inputs, config).tokens
        seconds = time.perf_counter() - begun
        _check(self.name, batch, sum(map(len, tokens)))
        return seconds


class OverOpenai:
    """Any server of OpenAI's API, its first model."""

    cells = [(BASE, rows) for rows in ROWS]
    step_ms = 10.0, 1.5

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self._url = url.rstrip("/")

    def run(self, batch: Batch) -> float:
        """See `Side`."""
        return asyncio.run(self._run(batch))

    async def _run(self, batch: Batch) -> float:
        timeout = aiohttp.ClientTimeout(PATIENCE_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            async with session.get(f"{self._url}/v1/models") as response:
                model = (await response.json())["data"][0]["id"]
            begun = time.perf_counter()
            answers = [
                self._ask(session, model, prompt, batch.new_tokens) for prompt in batch.prompts()
            ]
            counts = await asyncio.gather(*answers)
            seconds = time.perf_counter() - begun
        _check(self.name, batch, sum(counts))
        return seconds

    async def _ask(
        self, session: aiohttp.ClientSession, model: str, prompt: list[int], num_tokens: int
    ) -> int:
        body = {
            "model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0,
            "ignore_eos": True,
        }  # fmt: skip
        async with session.post(f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            return (await response.json())["usage"]["completion_tokens"]


def dense_model(base: Base) -> PreTrainedModel:
    """The plain transformers model with the base's dequantised weights."""
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=base.dtype).eval()
    with torch.no_grad():
        for path in base.spec.linears:
            weight = base.model.get_submodule(path).linear.weight_values()
            model.get_submodule(path).weight.copy_(weight)
    return model


@torch.inference_mode()
def _generate(name: str, model: Any, batch: Batch, **kwargs: object) -> float:
    prompts, begun = torch.tensor(batch.prompts()), time.perf_counter()
    out = model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
        min_new_tokens=batch.new_tokens, max_new_tokens=batch.new_tokens, pad_token_id=0, **kwargs,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    _check(name, batch, out[:, prompts.shape[1] :].numel())
    return seconds


def _check(name: str, batch: Batch, num_tokens: int) -> None:
    if num_tokens != batch.num_output_tokens:
        raise RuntimeError(
            f"{name} made {num_tokens} tokens of {batch.num_output_tokens}: its speed says nothing"
        )
