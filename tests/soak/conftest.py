"""`make soak` runs every attack at full size and prints its figures; `make test` a small one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from tests.server.conftest import pytest_pyfunc_call  # noqa: F401  async test functions

FULL_S = 170.0
"""What one attack may take at full size, broken folders three times as long: all of them stay
within half an hour. The figure says how far an attack came."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the attacks at full size")


class Size:
    """How often an attack is made: up to the full number, as far as its time goes."""

    def __init__(self, is_full: bool) -> None:
        self.is_full = is_full
        self.begun = time.monotonic()

    def of(self, full: int, fast: int) -> int:
        return full if self.is_full else fast

    def is_over(self, share: int = 1) -> bool:
        """Tell whether the attack has had its time, or `share` times as much."""
        return self.is_full and time.monotonic() > self.begun + share * FULL_S


@pytest.fixture
def size(request: pytest.FixtureRequest) -> Size:
    return Size(bool(request.config.getoption("--soak", default=False)))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Print what an attack has measured as one line of JSON."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(**facts: object) -> None:
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}
        name = request.node.originalname.removeprefix("test_")
        with capture.global_and_fixture_disabled():
            print(json.dumps({"attack": name, **rounded}), flush=True)

    return say
