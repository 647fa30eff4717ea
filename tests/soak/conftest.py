"""`make soak` runs every attack at full size and prints their figures in one table beside those of
the review that found the faults; `make test` runs a small one with the same checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.server.conftest import pytest_pyfunc_call  # noqa: F401  async test functions
from tests.soak.served import Running, running, write_world

FEW = ("--max-num-seqs", "8", "--max-queued-requests", "40")
"""Eight rows, and forty that wait."""
NARROW = (*FEW, "--max-num-batched-tokens", "64", "--adapter-pool-bytes", "200000")
"""The same, and room for about five adapters."""
ROWS = pytest.StashKey[list[tuple[str, ...]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the attacks at full size")


@dataclass(frozen=True)
class Size:
    """How often an attack is made."""

    is_full: bool

    def of(self, full: int, fast: int) -> int:
        return full if self.is_full else fast


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Size:
    return Size(bool(request.config.getoption("--soak", default=False)))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Note what an attack has measured, what the review measured, and what is asked."""
    rows = request.config.stash.setdefault(ROWS, [])
    capture = request.config.pluginmanager.getplugin("capturemanager")
    begun, name = time.monotonic(), request.node.originalname.removeprefix("test_")

    def say(here: str, *, before: str, bound: str) -> None:
        rows.append((name, here, before, bound, f"{time.monotonic() - begun:.0f} s"))
        with capture.global_and_fixture_disabled():
            print(f"\n{name}: {here}", flush=True)

    return say


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    if config.getoption("--soak", default=False):
        heads = ("attack", "here", "in the review", "asked", "took")
        for row in (heads, ("---",) * len(heads), *config.stash.get(ROWS, [])):
            terminalreporter.write_line(f"| {' | '.join(row)} |")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A tiny base and eight adapters of it."""
    return write_world(tmp_path_factory.mktemp("soak"))


@pytest.fixture(scope="session")
def roomy(folder) -> Iterator[Running]:
    """A server that several attacks are made on."""
    with running(folder) as server:
        yield server


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One with little room, over a base whose vocabulary is as large as a real one's."""
    folder = write_world(tmp_path_factory.mktemp("narrow"), vocab_size=49_152)
    with running(folder, *NARROW) as server:
        yield server


@pytest.fixture
def overloaded(folder, size, request: pytest.FixtureRequest) -> Iterator[Running]:
    """At full size a real base as it is served by default. The tiny one makes a token in a third
    of a millisecond; to refuse a call takes the same interpreter half of one, and the client on the
    same cores another half, so that 432 refusals are a tenth of all that it does in two seconds.
    """
    if not size.is_full:
        yield request.getfixturevalue("narrow")
        return
    with running(folder, *FEW, base="smollm2-135m") as server:
        yield server
