"""What counts as a hang, as a stall, as failing, and what does not; time is the watchdog's own."""

from __future__ import annotations

import pytest

from loramux.server.watchdog import MAX_FAILED_IN_A_ROW, RETRY_S, STALL_S, TICK_S, Watchdog
from tests.fakes import ScriptedEngine

HANG_S = 10.0


@pytest.fixture
def engine():
    return ScriptedEngine()


@pytest.fixture
def watchdog(engine):
    return Watchdog(engine, hang_s=HANG_S)


def look(watchdog: Watchdog, seconds: float) -> None:
    for _ in range(int(seconds / TICK_S)):
        watchdog.look(TICK_S)


def test_an_idle_engine_may_stand_still_for_ever(engine, watchdog):
    look(watchdog, 1000)
    assert watchdog.is_ready and watchdog.is_alive


def test_a_busy_engine_may_not(engine, watchdog):
    engine.is_busy = True
    look(watchdog, STALL_S - TICK_S)
    assert watchdog.is_ready
    look(watchdog, 2 * TICK_S)
    assert not watchdog.is_ready and watchdog.is_alive
    look(watchdog, HANG_S - STALL_S)
    assert not watchdog.is_alive


def test_a_step_of_an_hour_whose_layers_go_on_is_no_hang(engine, watchdog):
    engine.is_busy = True
    for _ in range(3600):
        engine.num_beats += 1
        look(watchdog, 1)
        assert watchdog.is_ready


def test_a_stall_that_ends_is_forgotten(engine, watchdog):
    engine.is_busy = True
    look(watchdog, HANG_S - 1)
    assert not watchdog.is_ready
    engine.num_beats += 1
    look(watchdog, STALL_S - TICK_S)
    assert watchdog.is_ready


def test_the_probes_turn_within_five_seconds_also_when_the_limit_is_shorter(engine):
    assert STALL_S + 2 * TICK_S < 5
    engine.is_busy = True
    watchdog = Watchdog(engine, hang_s=1)
    look(watchdog, 1.5)
    assert not watchdog.is_ready and not watchdog.is_alive


def test_death_is_seen_without_a_tick(engine, watchdog):
    engine.is_alive = False
    assert not watchdog.is_alive and not watchdog.is_ready


def test_a_server_on_which_every_request_fails_is_not_ready_for_a_while(engine, watchdog):
    look(watchdog, 1)
    engine.num_failed_in_a_row = MAX_FAILED_IN_A_ROW - 1
    look(watchdog, 1)
    assert watchdog.is_ready
    engine.num_failed_in_a_row += 1
    look(watchdog, 1)
    assert not watchdog.is_ready and watchdog.is_alive
    look(watchdog, RETRY_S)
    assert watchdog.is_ready, "nothing comes to a server that is not ready; it must be tried again"
    engine.num_failed_in_a_row += 1
    look(watchdog, 1)
    assert not watchdog.is_ready
    engine.num_failed_in_a_row = 0
    look(watchdog, 1)
    assert watchdog.is_ready
