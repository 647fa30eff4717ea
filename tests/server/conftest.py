"""Async test functions, the fixture `serve`: `async with serve() as world`, logs and commands."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import cache, partial
from pathlib import Path

import pytest
import structlog
import uvicorn.server
from typer import testing

from tests.server.places import Place, certificate
from tests.server.world import World, serving


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[World]]:
    return partial(serving, tmp_path)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A server of files over https whose certificate is trusted."""
    context, trusted = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    with Place(context) as place:
        yield place


@pytest.fixture(scope="session", autouse=True)
def commands_are_built_once() -> Iterator[None]:
    """Typer's CliRunner builds all of a program's commands for every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "_get_command", cache(testing._get_command))
        yield


class QuickAsyncio:
    """asyncio, where a tenth of a second is a hundredth."""

    def __getattr__(self, name: str) -> object:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / 10)


@pytest.fixture(scope="session", autouse=True)
def http_servers_end_at_once() -> Iterator[None]:
    """uvicorn looks every tenth of a second whether it is to end, and then waits for another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", QuickAsyncio())
        yield


@pytest.fixture(autouse=True)
def plain_tracebacks() -> Iterator[None]:
    """As the server logs them; structlog's default draws the locals of every frame for seconds."""
    renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.processors.add_log_level, renderer])
    yield
    structlog.reset_defaults()
