"""A foreign template cannot take time, memory or anything else from the process or from others."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_runtime.errors import AdapterRefused, InvalidRequest, Overloaded, Unavailable
from lora_runtime.temporary_folder import temporary_folder
from lora_runtime.text import text_workers, worker_processes
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.text_workers import TextWorkers
from tests.tiny_tokenizer import BAD_TEMPLATES, VOCAB_SIZE, write_tokenizer

CHAT = [{"role": "user", "content": "hi"}]
GROW = (
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(SIZE) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i * j }}{% endfor %}{% endfor %}"
POWERS = [
    "{{ 7**60000000 }}",
    "{% set x = 7 %}{{ x ** x ** x }}",
    "{% macro f(n) %}{{ n ** 9 }}{% endmacro %}",
    "{% if false %}{{ (2 ** 3) | string }}{% endif %}",
    "{{ 'x' * 1400000000 }}",
    "{{ 1400000000 * 'x' }}",
    "{% for i in [0] * 100000000 %}{% endfor %}",
]
HUNGRY = [
    LOOP,
    GROW.replace("SIZE", "40"),
    "{{ '%2000000000d' % 1 }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ ('x' | length) * 'y' * 2000000000 }}",
    "{% set n = 100000000 %}{{ (n * n * n * n * 'y' | length) * 'x' }}",
    "{{ ((('x' * 99999) | list) * 99999) | length }}",
    "{% macro f() %}{% for i in range(9) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def workers(base: Path) -> Iterator[TextWorkers]:
    """Processes that have started."""
    workers = TextWorkers(base, VOCAB_SIZE)
    asyncio.run(read(workers, "{{ messages[0].content }}"))
    yield workers
    workers.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_workers, "RENDERING_S", 0.8)


def side_of(template: str) -> TextSide:
    """As an adapter's that passed its trial, and does otherwise later."""
    return TextSide(
        template=template, variables={}, is_own_template=True, tokenizer=None, added=None,
        eos_token_ids=(), key=template,
    )  # fmt: skip


async def read(workers: TextWorkers, template: str) -> tuple[str, ...]:
    return (await workers.read({"chat_template.jinja": template.encode()}))[1]


async def longest_gap(work: Callable[[], object]) -> float:
    """The longest time for which the event loop did nothing else meanwhile."""
    gaps, is_over = [0.0], asyncio.Event()

    async def tick() -> None:
        last = time.monotonic()
        while not is_over.is_set():
            await asyncio.sleep(0.005)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    ticking = asyncio.create_task(tick())
    await work()
    is_over.set()
    await ticking
    return max(gaps)


@pytest.mark.parametrize("template", POWERS)
def test_what_is_certain_to_be_too_much_is_refused_unseen(
    workers: TextWorkers, template: str
) -> None:
    async def check() -> None:
        begun = time.monotonic()
        with pytest.raises(AdapterRefused) as refusal:
            await read(workers, template)
        assert refusal.value.field == "chat_template.jinja"
        assert time.monotonic() - begun < 1

    asyncio.run(check())


def test_products_and_calls_with_named_arguments_are_no_powers(workers: TextWorkers) -> None:
    async def check() -> None:
        template = (
            "{{ '=' * 80 }}{% set d = dict(x=1) %}{{ dict(**d).x * 3 }}{{ messages[0].content }}"
        )
        side, notes = await workers.read({"chat_template.jinja": template.encode()})
        assert notes == () and await workers.render(side, CHAT) == "=" * 80 + "3hi"

    asyncio.run(check())


@pytest.mark.parametrize("template", HUNGRY)
def test_a_hungry_template_is_refused_at_load_and_the_loop_goes_on(
    workers: TextWorkers, template: str, quick: None
) -> None:
    async def check() -> None:
        await read(workers, "{{ messages[0].content }}")

        async def load() -> None:
            try:
                (note,) = await read(workers, template)
            except AdapterRefused as refusal:
                assert refusal.field == "chat_template"
            else:
                assert "trial" in note  # jinja or Python itself set the limit

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.monotonic()
        assert await longest_gap(load) < 0.5
        assert time.monotonic() - begun < 10
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown_kib < 100 << 10

    asyncio.run(check())


def test_others_are_served_while_templates_use_up_their_limits(
    workers: TextWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two templates that never end: one of them only at a time, and then neither for a while."""
    monkeypatch.setattr(text_workers, "RENDERING_S", 4)  # a busy machine starts a process in 1.6 s

    async def check() -> None:
        good, _ = await workers.read({"chat_template.jinja": b"{{ messages[0].content }}!"})
        several = [
            side_of("{{ messages[0].content }}" + "x" * n) for n in range(4)
        ]  # so that each process runs
        await asyncio.gather(*(workers.render(side, CHAT) for side in several))
        bad = side_of(LOOP)
        greedy = [asyncio.create_task(workers.render(bad, CHAT)) for _ in range(50)]
        await asyncio.sleep(0.2)
        waits = []
        while not all(task.done() for task in greedy):
            begun = time.monotonic()
            assert await workers.render(good, CHAT) == "hi!"
            waits.append(time.monotonic() - begun)
            await asyncio.sleep(0.01)
        assert len(waits) > 20 and max(waits) < text_workers.RENDERING_S
        refused = [task.exception() for task in greedy]
        assert all(isinstance(e, InvalidRequest) and e.field == "messages" for e in refused)
        begun = time.monotonic()
        with pytest.raises(InvalidRequest, match="not run for"):
            await workers.render(bad, CHAT)
        assert time.monotonic() - begun < 0.1
        both = [workers.render(side_of(LOOP + "!" * n), CHAT) for n in (1, 2, 3, 4)]
        ended = await asyncio.gather(*both, return_exceptions=True)
        assert all(isinstance(error, InvalidRequest) for error in ended)
        assert await workers.render(good, CHAT) == "hi!"

    asyncio.run(check())


def test_a_long_prompt_that_takes_too_much_is_refused_alone(
    workers: TextWorkers, quick: None
) -> None:
    """Whose prompt it is pays for it, not everybody who uses the adapter."""
    every = "{% for c in messages[0].content %}"
    side = side_of(2 * every + 2 * "{% endfor %}" + "{{ messages[0].content }}")

    async def check() -> None:
        long = [{"role": "user", "content": "x" * text_workers.LONG_PROMPT}]
        with pytest.raises(InvalidRequest, match="Send less"):
            await workers.render(side, long)
        assert await workers.render(side, CHAT) == "hi"

    asyncio.run(check())


def test_callers_of_a_slow_template_wait_up_to_a_number(workers: TextWorkers, quick: None) -> None:
    """They hold places of the server's queue, which are for everybody."""

    async def check() -> None:
        most = text_workers.MAX_WAITING_PER_SIDE
        calls = [workers.render(side_of(LOOP + "many"), CHAT) for _ in range(most + 20)]
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(error, Overloaded) for error in ended) == 19

    asyncio.run(check())


def test_callers_that_go_away_do_not_multiply_the_work(workers: TextWorkers, quick: None) -> None:
    """What they asked for still runs, and keeps others of the same text waiting, not all texts."""

    async def check() -> None:
        bad = side_of(LOOP + "cancelled")
        for _ in range(2 * text_workers.NUM_RENDERING):
            gone = asyncio.create_task(workers.render(bad, CHAT))
            await asyncio.sleep(0.05)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
        assert workers._rendering._idle.qsize() == text_workers.NUM_RENDERING - 1
        with pytest.raises(InvalidRequest, match="not run for"):
            await workers.render(bad, CHAT)
        assert workers._rendering._idle.qsize() == text_workers.NUM_RENDERING

    asyncio.run(check())


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_failing_or_escaping_template_is_noted_and_refused(
    workers: TextWorkers, template: str
) -> None:
    async def check() -> None:
        side, (note,) = await workers.read({"chat_template.jinja": template.encode()})
        assert "trial" in note
        with pytest.raises(InvalidRequest, match="the adapter's chat template") as refusal:
            await workers.render(side, CHAT)
        assert refusal.value.field == "messages"

    asyncio.run(check())


@pytest.mark.parametrize(
    "template",
    [r"{{ '\ud800' }}", "{{ messages[0].content[:0] ~ '\\udfff' }}", r"{{ '\ud800'*9 }}"],
)
def test_half_a_surrogate_pair_is_noted_and_refused(workers: TextWorkers, template: str) -> None:
    async def check() -> None:
        side, (note,) = await workers.read({"chat_template.jinja": template.encode()})
        assert "Unicode" in note
        with pytest.raises(InvalidRequest, match="Unicode"):
            await workers.render(side, CHAT)

    asyncio.run(check())


def test_an_output_beyond_all_use_is_refused(workers: TextWorkers) -> None:
    async def check() -> None:
        grown = GROW.replace("SIZE", "21")
        _, (note,) = await workers.read({"chat_template.jinja": grown.encode()})
        assert str(8 << 21) in note

    asyncio.run(check())


def test_a_process_sees_nothing_of_this_one(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its environment nor its open files."""
    monkeypatch.setenv("LORAMUX_SECRET", "x")

    async def check() -> None:
        kept, workers = os.open(base, os.O_RDONLY), TextWorkers(base, VOCAB_SIZE)
        try:
            await read(workers, "{{ messages[0].content }}")
            for pool in (workers._loading, workers._rendering):
                for process in pool._processes:
                    if process._running is None:
                        continue
                    proc = Path(f"/proc/{process._running.pid}")
                    assert b"LORAMUX_SECRET" not in (proc / "environ").read_bytes()
                    links = [os.readlink(link) for link in (proc / "fd").iterdir()]
                    assert str(base) not in links and not any("socket" in x for x in links)
        finally:
            workers.close()
            os.close(kept)

    asyncio.run(check())


def test_what_a_killed_process_was_reading_is_removed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "loramux-text-killed" / "own").mkdir(parents=True)
    (tmp_path / "others").mkdir()
    with temporary_folder(tmp_path, "loramux-text-") as running:
        TextWorkers(base, VOCAB_SIZE).close()
        assert set(tmp_path.iterdir()) == {running, tmp_path / "others"}


def test_closing_ends_what_runs_at_once(base: Path) -> None:
    async def check() -> None:
        workers = TextWorkers(base, VOCAB_SIZE)
        await read(workers, "{{ messages[0].content }}")
        hung = asyncio.create_task(workers.render(side_of(LOOP), CHAT))
        await asyncio.sleep(0.3)
        begun = time.monotonic()
        workers.close()
        assert time.monotonic() - begun < 1
        with pytest.raises((Unavailable, InvalidRequest)):
            await hung
        with pytest.raises((Unavailable, RuntimeError)):
            await workers.render(side_of("{{ 1 }}"), CHAT)

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(check())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_no_more_wait_than_may(workers: TextWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_processes, "MAX_WAITING", 4)

    async def check() -> None:
        sides = [side_of("{{ messages[0].content }}" + "x" * n) for n in range(9)]
        ended = await asyncio.gather(
            *(workers.render(side, CHAT) for side in sides), return_exceptions=True
        )
        assert sum(isinstance(reply, Overloaded) for reply in ended) == 5
        assert sum(isinstance(reply, str) for reply in ended) == 4

    asyncio.run(check())


def test_a_tokenizer_that_never_ends_is_refused(
    base: Path, workers: TextWorkers, quick: None
) -> None:
    """A regular expression that backtracks without end, in a pre-tokeniser."""

    async def check() -> None:
        content = json.loads((base / "tokenizer.json").read_text())
        content["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated",
                 "invert": False},
                content["pre_tokenizer"],
            ],
        }  # fmt: skip
        side, _ = await workers.read({"tokenizer.json": json.dumps(content).encode()})
        assert await workers.encode(side, "plain")

        async def encode() -> None:
            with pytest.raises(InvalidRequest) as refusal:
                await workers.encode(side, "x" * 4000)
            assert refusal.value.field == "text"

        assert await longest_gap(encode) < 0.5

    asyncio.run(check())
