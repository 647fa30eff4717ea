"""Adapters with a parity record are loaded while a stream runs, which takes steps meanwhile."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from itertools import pairwise

import pytest
import torch

from lora_runtime.adapters.files.parity_record import write_parity_record
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.parity import measure
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.config import AdapterConfig, CacheConfig, EngineConfig
from lora_runtime.core import FinishReason
from lora_runtime.engine import load, loop
from lora_runtime.engine.engine import Engine
from lora_runtime.engine.loop import InThreadEngine
from lora_runtime.engine.probe import KnownRows, adapter_logits, probe_logits
from lora_runtime.errors import ParityFailed, Unavailable
from tests.driver import greedy
from tests.peft_adapters import write_adapter
from tests.tiny import VOCAB_SIZE, tiny_base, tiny_checkpoint, tiny_model

NUM_ADAPTERS = 4
NUM_ROWS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base("llama", folder=tiny_checkpoint(tmp_path_factory.mktemp("base")))


def recorded_adapter(base, folder, seed, honest=True):
    """PEFT's, with a record of what it does, or of what another one does."""
    write_adapter(tiny_model("llama"), folder, seed=seed)
    form = load_adapter(folder, base.spec, base.weights)
    logits = adapter_logits(base, pack_for(base, form))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCAB_SIZE, (NUM_ROWS, 40), generator=generator).tolist()
    record = measure(rows, logits, logits, fingerprint=base.spec.fingerprint)
    if not honest:
        folder = write_adapter(tiny_model("llama"), folder.with_name("other"), seed=seed + 50)
    write_parity_record(folder, record)
    return folder


async def stream(engine, length):
    request = greedy("long", [5, 6, 7], None, length)
    return [token async for out in engine.generate(request) for token in out.token_ids]


async def serve(base, folders, monkeypatch, length=120):
    """Load all folders at once during a stream: its tokens, the loads' results, and what the
    engine's thread did in its order.
    """
    log = []
    config = EngineConfig(
        cache=CacheConfig(num_blocks=64), adapters=AdapterConfig(pool_bytes=1 << 20)
    )
    inner = Engine(base, config)
    step, forwards = inner.step, load.forwards

    def logged(name, action):
        log.append(name)
        return action()

    monkeypatch.setattr(inner, "step", partial(logged, "step", step))
    monkeypatch.setattr(
        load,
        "forwards",
        lambda *args: [partial(logged, "forward", part) for part in forwards(*args)],
    )
    engine = InThreadEngine(inner)
    running = asyncio.create_task(stream(engine, length))
    await asyncio.sleep(0.02)
    loads = await asyncio.gather(
        *(engine.load_adapter(folder) for folder in folders), return_exceptions=True
    )
    tokens = await running
    log.append("over")
    later = await engine.load_adapter(folders[0])
    await engine.close(drain_s=5.0)
    return tokens, loads, log, later


def test_a_stream_takes_a_step_between_any_two_forwards(base, tmp_path, monkeypatch):
    folders = [recorded_adapter(base, tmp_path / str(s), s) for s in range(NUM_ADAPTERS)]
    tokens, loads, log, later = asyncio.run(serve(base, folders, monkeypatch))
    assert len(tokens) == 120 and later.digest == loads[0].digest
    assert len({adapter.digest for adapter in loads}) == NUM_ADAPTERS
    during = log[: log.index("over")]
    assert during.count("forward") == NUM_ADAPTERS * 2
    first, last = during.index("step"), len(during) - 1 - during[::-1].index("step")
    assert ("forward", "forward") not in set(pairwise(during[first : last + 1]))
    assert log.count("forward") == (NUM_ADAPTERS + 1) * 2
    monkeypatch.undo()
    alone, *_ = asyncio.run(serve(base, folders[:1], monkeypatch))
    assert alone == tokens


def test_an_adapter_that_does_something_else_is_refused_alone(base, tmp_path, monkeypatch):
    wrong = recorded_adapter(base, tmp_path / "wrong", 1, honest=False)
    right = recorded_adapter(base, tmp_path / "right", 2)
    tokens, (loaded, refused), _, _ = asyncio.run(serve(base, [right, wrong], monkeypatch))
    assert isinstance(refused, ParityFailed) and not isinstance(loaded, Exception)
    assert len(tokens) == 120


def test_logits_are_made_of_the_recorded_positions_only(base, tmp_path):
    """Never all rows times a vocabulary; the same numbers as those of every position."""
    folder = recorded_adapter(base, tmp_path / "a", 3)
    form = load_adapter(folder, base.spec, base.weights)
    made = []
    hook = base.head.register_forward_hook(lambda *given: made.append(given[-1].logits.shape[1]))
    rows, logits_at = [[5, 9, 200, 17, 3, 44, 8], [7, 30, 11]], [8, 1, 4, 6]
    with hook:
        for with_adapter in (False, True):
            found = adapter_logits(base, pack_for(base, form))(rows, logits_at, with_adapter)
            every = torch.cat(
                [
                    *probe_logits(base, form if with_adapter else None, rows[:1]),
                    *probe_logits(base, form if with_adapter else None, rows[1:]),
                ]
            )
            assert torch.allclose(found, every[logits_at], atol=1e-5)
            assert found.shape == (4, VOCAB_SIZE)
    assert made == [4, 7, 3, 4, 7, 3]


@pytest.fixture
def engine_of_steps(base, monkeypatch):
    """An engine whose running streams take a step before every layer of a check."""
    monkeypatch.setattr(loop, "CHECK_SHARE", 0.0)
    config = EngineConfig(
        cache=CacheConfig(num_blocks=64), adapters=AdapterConfig(pool_bytes=1 << 20)
    )
    return Engine(base, config)


def test_steps_within_a_check_change_neither_it_nor_the_streams(
    base, tmp_path, monkeypatch, engine_of_steps
):
    """Streams of base and another adapter take a step in every layer of a check's forwards."""
    running, checked = (recorded_adapter(base, tmp_path / str(seed), seed) for seed in (5, 6))
    read = load.AdapterLoad.read(checked, base)
    packed = read.pack(base.spec.num_layers)
    expected = [forward() for forward in read.parity_forwards(packed, KnownRows(), lambda: None)]
    judged, are_apart = [], []
    judge, step = load.AdapterLoad.check_parity, engine_of_steps.step

    def noted_judge(own, numbers):
        judged.append(numbers)
        return judge(own, numbers)

    def noted_step():
        are_apart.append(base.context.meta is None and not base.context.bindings)
        return step()

    monkeypatch.setattr(load.AdapterLoad, "check_parity", noted_judge)
    monkeypatch.setattr(engine_of_steps, "step", noted_step)

    async def tokens_of(engine, name, digest):
        request = greedy(name, [5, 6, 7], digest, 400)
        return [token async for out in engine.generate(request) for token in out.token_ids]

    async def run(is_loading):
        engine = InThreadEngine(engine_of_steps)
        digest = (await engine.load_adapter(running)).digest
        streams = [
            asyncio.create_task(tokens_of(engine, *given)) for given in (("a", None), ("b", digest))
        ]
        await asyncio.sleep(0.05)
        num_before = len(are_apart)
        if is_loading:
            await engine.load_adapter(checked)
        num_steps = len(are_apart) - num_before
        tokens = await asyncio.gather(*streams)
        await engine.unload_adapter(digest)
        return tokens, num_steps

    alone, _ = asyncio.run(run(is_loading=False))
    beside, num_steps = asyncio.run(run(is_loading=True))
    assert beside == alone
    assert num_steps >= 2 * base.spec.num_layers
    assert all(are_apart)
    for found, own in zip(judged[-1], expected, strict=True):
        assert torch.equal(found, own)


def test_a_request_that_comes_during_a_check_is_begun_in_it(base, tmp_path, monkeypatch):
    folder = recorded_adapter(base, tmp_path / "a", 7)
    config = EngineConfig(
        cache=CacheConfig(num_blocks=64), adapters=AdapterConfig(pool_bytes=1 << 20)
    )
    engine, log = InThreadEngine(Engine(base, config)), []
    pause = engine._pause

    def slow_pause():
        log.append("layer")
        time.sleep(0.05)
        pause()

    monkeypatch.setattr(engine, "_pause", slow_pause)

    async def run():
        loading = asyncio.create_task(engine.load_adapter(folder))
        while not log:
            await asyncio.sleep(0.001)
        tokens = await stream(engine, 1)
        was_first = not loading.done()
        await loading
        await engine.close(drain_s=5.0)
        return tokens, was_first

    tokens, was_first = asyncio.run(run())
    assert len(tokens) == 1 and was_first


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_step_that_ends_the_engine_within_a_check_ends_all(
    base, tmp_path, monkeypatch, engine_of_steps
):
    folder = recorded_adapter(base, tmp_path / "a", 8)
    step = engine_of_steps.step

    def failing_step():
        if engine._running is not None:  # a step within a command
            raise RuntimeError("the device is gone")
        return step()

    monkeypatch.setattr(engine_of_steps, "step", failing_step)
    engine = InThreadEngine(engine_of_steps)

    async def run():
        request = greedy("long", [5, 6, 7], None, 400)

        async def last():
            return [output async for output in engine.generate(request)][-1]

        running = asyncio.create_task(last())
        await asyncio.sleep(0.02)
        with pytest.raises(Unavailable, match="the device is gone"):
            await engine.load_adapter(folder)
        end = await asyncio.wait_for(running, 5)
        assert end.finish_reason is FinishReason.ERROR and isinstance(end.error, Unavailable)
        assert not engine.stats().is_alive

    asyncio.run(run())


def test_the_base_is_run_once_for_rows_that_records_share(base, tmp_path):
    known, made = KnownRows(), []
    row, places = [5, 9, 200, 17, 3, 44, 8], [1, 4, 6]
    hook = base.head.register_forward_hook(lambda *given: made.append(given[-1].logits.shape[1]))
    with hook:
        for seed in (9, 10):
            folder = recorded_adapter(base, tmp_path / str(seed), seed)
            form = load_adapter(folder, base.spec, base.weights)
            made.clear()
            logits = adapter_logits(base, pack_for(base, form), known)
            found = [logits([row], places, with_adapter) for with_adapter in (False, True, False)]
            (every,) = probe_logits(base, None, [row])
            assert torch.allclose(found[0], every[places], atol=1e-5)
            assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1])
            assert made == ([3, 3, 7] if seed == 9 else [3, 7])
        other = logits([row], places[:2], False)
    assert torch.allclose(other, every[places[:2]], atol=1e-5)
