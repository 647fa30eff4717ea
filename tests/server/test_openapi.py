"""schemathesis reads /openapi.json and sends the app what it describes and what it does not."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from random import Random

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from loramux.server.openai.routes import OPERATIONS
from tests.server.http_api import serving_http
from tests.server.world import serving

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@contextmanager
def running(folder: Path):
    """A server in a thread with a loop of its own, for callers who block; gives its address."""
    started: list[str] = []
    is_up, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        async with serving(folder) as world, serving_http(world.service) as api:
            await world.load("a", "a")
            started.append(api.url)
            is_up.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=[main()])
    thread.start()
    try:
        assert is_up.wait(20)
        yield started[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def served(body: object) -> object:
    """A body as it was made, but with a model that is there and few fields that may be wrong: of a
    random name, or of one field in thirty, no more would be seen than its refusal.
    """
    if not isinstance(body, dict) or "model" not in body:
        return body
    needed = {"prompt", "messages", "input", "tokens"} & body.keys()
    few = {*needed, *Random(len(str(body))).sample(sorted(body), min(2, len(body)))}
    return {name: body[name] for name in few} | {"model": "tiny"}


def test_every_route_is_described_and_nothing_ends_in_a_servers_fault(tmp_path) -> None:
    with running(tmp_path) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        seen: Counter[str] = Counter()
        statuses: Counter[int] = Counter()
        for result in schema.get_all_operations():
            operation = result.ok()
            seen[f"{operation.method.upper()} {operation.path}"] += 1

            @settings(
                max_examples=8,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy())
            def attack(case) -> None:
                case.body = served(case.body)
                answer = case.call_and_validate(checks=CHECKS)
                statuses[answer.status_code] += 1

            attack()
        paths = {f"{o.method} {o.path.replace(':path', '')}" for o in OPERATIONS}
        assert set(seen) == paths
        assert statuses[200] >= 8 and statuses[400] >= 8
