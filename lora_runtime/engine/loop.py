"""Gives an engine a thread of its own, and asyncio callers a way to talk to it.

Commands go in through one inbox and run between steps; outputs go out to one asyncio queue per
request, with one wake-up of the event loop per step. The engine never runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lora_runtime.config import EngineConfig
from lora_runtime.core import ANY_FOLDER, FinishReason, FolderRules, Request, StepOutput
from lora_runtime.engine.client import EngineInfo, EngineStats, LoadedAdapter
from lora_runtime.engine.engine import Engine, current_device, load_engine
from lora_runtime.engine.failure_streak import FailureStreak
from lora_runtime.engine.load import AdapterLoad
from lora_runtime.engine.probe import KnownRows
from lora_runtime.engine.queue_places import check_place
from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import Unavailable
from lora_runtime.kernels import torch_threads
from lora_runtime.kernels.compiling import is_compiling
from lora_runtime.kernels.cpu_library import before_first_call
from lora_runtime.threads import give_way

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Outputs = asyncio.Queue[StepOutput]
Stream = tuple[asyncio.AbstractEventLoop, Outputs]
POLL_S = 0.02
"""How often `close` looks whether the engine is idle."""
CLOSE_S = 1.0
"""Seconds that the engine's thread has to end after the drain; a stuck one is left behind."""
NUM_READERS = 2
"""Adapters that are read at once."""
MAX_WAITING_READS = 256
CHECK_SHARE = 0.5
"""Of the time of a step: what a parity check may take before running streams get the next one, in
whole layers."""


class _EngineDied(BaseException):
    """A step within a command has failed beyond repair: not the command's error."""


class _Command(NamedTuple):
    """Something to run on the engine thread between steps, and where its result goes."""

    action: Callable[[], object]
    done: Future[Any]
    is_long: bool


def start_engine(
    config: EngineConfig, *, on_progress: Callable[[str], None] | None = None
) -> InThreadEngine:
    """Load the base and start its engine; blocks until it is ready. Raises as `load_base`."""
    return InThreadEngine(load_engine(config, on_progress))


class InThreadEngine:
    """An EngineClient whose engine runs on a thread of this process."""

    def __init__(self, engine: Engine) -> None:
        self.base_folder = engine.base.folder
        self._engine = engine
        self._stats_lock = threading.Lock()
        """Held where `_stats` and `_arriving` change together, and where both are read: no request
        is in both.
        """
        self._stats = engine.stats()
        self._arriving: dict[Stream, str] = {}
        """Clients of the requests that `_stats` does not count yet."""
        self._submitted: list[Stream] = []
        """Streams of those that the engine has, until the end of its next step."""
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._long: deque[_Command] = deque()
        """Long commands out of the inbox, which wait for their turn."""
        self._known_rows = KnownRows()
        self._step_s = self._stepped_at = 0.0
        """How long the last step took, and when it ended."""
        self._has_computed = False
        """Whether a long command has computed something since."""
        self._streams: dict[str, Stream] = {}
        self._undelivered: deque[StepOutput] = deque()
        """Of the last step, until the next one computes: an event loop that wakes up for them
        sooner has the interpreter while the next step is planned, and the cores stand still."""
        self._unloading: dict[str, list[Future[Any]]] = {}
        self._post_lock = threading.Lock()
        self._readers = WorkerPool(
            "reading adapters",
            num_threads=NUM_READERS,
            max_waiting=MAX_WAITING_READS,
            on_start=_read_beside_steps,
        )
        self._failure: Unavailable | None = None
        self._is_draining = False
        self._running: Future[Any] | None = None
        """The future of the command that the engine's thread runs now."""
        self._is_busy = False
        self._num_beats = 0
        self._failures = FailureStreak()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def stats(self) -> EngineStats:
        with self._stats_lock:
            stats, arriving = self._stats, Counter(self._arriving.values())
        return replace(
            stats,
            is_alive=self._failure is None and self._thread.is_alive(),
            num_waiting=stats.num_waiting + arriving.total(),
            waiting_by_client=arriving + Counter(stats.waiting_by_client),
            is_busy=self._is_busy and not is_compiling(),
            num_beats=self._num_beats + self._engine.base.context.num_calls,
            num_failed_in_a_row=self._failures.length,
        )

    async def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        if self._is_draining:
            raise Unavailable("the server is shutting down")
        stats, client = self.stats(), request.client
        limit = self._engine.info.max_queued_requests
        # Refused at once, where the engine would refuse it after its step.
        check_place(limit, stats.num_waiting, stats.waiting_by_client.get(client, 0))
        stream = (asyncio.get_running_loop(), Outputs())
        is_over = False
        try:
            with self._stats_lock:
                self._arriving[stream] = client
            await self._call(lambda: self._submit(request, stream))
            while not is_over:
                output = await stream[1].get()
                is_over = output.finish_reason is not None
                yield output
        finally:
            with self._stats_lock:
                self._arriving.pop(stream, None)
            if not is_over:
                self._post(lambda: self._cancel(request.request_id, stream))

    async def load_adapter(self, folder: Path, rules: FolderRules = ANY_FOLDER) -> LoadedAdapter:
        load = await self._readers.run(AdapterLoad.read, folder, self._engine.base, rules)
        packed = await self._readers.run(load.pack, self.info.max_adapter_layers)
        forwards = await self._readers.run(
            load.parity_forwards, packed, self._known_rows, self._pause
        )
        if forwards:
            check = self._post(lambda: self._run_beside_steps(forwards), is_long=True)
            logits = await asyncio.wrap_future(check)
            await self._readers.run(load.check_parity, logits)
        await self._call(lambda: self._engine.add_packed(packed))
        return load.loaded(packed)

    async def unload_adapter(self, digest: str, *, ending: Collection[str] = ()) -> None:
        freed: Future[None] = Future()
        await self._call(lambda: self._drop(digest, ending, freed))
        await asyncio.wrap_future(freed)

    async def pin_adapter(self, digest: str, *, is_pinned: bool = True) -> None:
        await self._call(lambda: self._engine.pin_adapter(digest, is_pinned=is_pinned))

    def abandon(self, error: Unavailable) -> None:
        with self._post_lock:
            self._failure = self._failure or error
        self._deliver()
        self._end_all(error)
        self._inbox.put(_Command(lambda: None, Future(), is_long=False))  # should it wait for work

    async def close(self, *, drain_s: float) -> None:
        self._is_draining = True
        deadline = time.monotonic() + drain_s
        try:
            async with asyncio.timeout(drain_s + CLOSE_S):
                await self._call(lambda: None)
                while self._streams and time.monotonic() < deadline:
                    await asyncio.sleep(POLL_S)
                await self._call(self._stop)
        except Unavailable:
            pass  # it has died: there is nothing left to drain
        except TimeoutError:
            log.error("the engine does not answer and is left behind")
            self.abandon(Unavailable("the server is shutting down"))
        limit = time.monotonic() + CLOSE_S
        while self._thread.is_alive() and time.monotonic() < limit:
            await asyncio.sleep(POLL_S)

    def _post(self, action: Callable[[], Result], *, is_long: bool = False) -> Future[Result]:
        """Queue `action` for the engine thread; fails at once when the engine is gone. One that
        `is_long` lets others and steps come before it, within it by `_pause`, and behind it.
        """
        done: Future[Result] = Future()
        with self._post_lock:
            if self._failure is None:
                self._inbox.put(_Command(action, done, is_long))
            else:
                done.set_exception(self._failure)
        return done

    async def _call(self, action: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self._post(action))

    # What follows runs on the engine thread.

    def _run(self) -> None:
        torch_threads.keep_number()
        try:
            with current_device(self._engine.base.device):
                while self._failure is None:
                    self._run_once()
            # Of what was between the inbox and the streams, `abandon` saw nothing.
            self._end_all(self._failure)
        except BaseException:  # whatever ends this thread ends the engine
            log.exception("the engine has died")
            self._fail(Unavailable("the engine has died; the server's log says why"))

    def _run_once(self) -> None:
        self._run_commands()
        if self._failure is None:  # else `abandon` may not have seen what a command has begun
            self._step()

    def _step(self) -> None:
        begun = time.monotonic()
        is_idle = self._engine.is_idle
        with before_first_call(self._deliver) as last_delivery:
            outputs = self._engine.take_outputs() if is_idle else self._engine.step()
        self._engine.collect()
        self._num_beats += 1
        stats = self._engine.stats()
        with self._stats_lock:
            self._stats = stats
            for stream in self._submitted:
                self._arriving.pop(stream, None)
        self._submitted.clear()
        self._failures.note(outputs)
        self._undelivered += outputs
        # Without another step, or one that calls the library, nobody would say when.
        if self._engine.is_idle or self._unloading or not last_delivery.is_made:
            self._deliver()
        self._resolve_unloads()
        self._stepped_at = time.monotonic()
        self._step_s = self._stepped_at - begun
        self._has_computed = False

    def _run_commands(self) -> None:
        """Run queued commands and one long one; wait for one when there is nothing else to do."""
        self._run_short(should_wait=self._engine.is_idle and not self._long)
        if self._long:
            self._run_command(self._long.popleft())

    def _run_short(self, *, should_wait: bool = False) -> None:
        """Run queued commands that are not long; set the others aside."""
        while should_wait or not self._inbox.empty():
            self._is_busy = not should_wait  # waiting for work is no hang: the watchdog must know
            command = self._inbox.get()
            self._is_busy, should_wait = True, False
            if command.is_long:
                self._long.append(command)
            else:
                self._run_command(command)

    def _run_command(self, command: _Command) -> None:
        self._deliver()  # the next step waits for the command, and tokens should not
        self._num_beats += 1
        if not command.done.set_running_or_notify_cancel():
            return
        # From here on `abandon` answers it; if it has looked before, its error is there by now.
        outer, self._running = self._running, command.done
        with suppress(InvalidStateError):  # it was answered when the engine was abandoned
            if self._failure is None:
                _do(command)
            else:
                command.done.set_exception(self._failure)
        self._running = outer

    def _run_beside_steps(self, actions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Call all `actions` of a long command; behind each that called `_pause` comes a step."""
        results = []
        for action in actions:
            self._let_others_run(must_step=self._has_computed)
            results.append(action())
        return results

    def _pause(self) -> None:
        """Within a long command: let other commands run, and when it is time for one, a step.

        Raises the error of an engine that has ended.
        """
        spent_s = time.monotonic() - self._stepped_at
        self._let_others_run(must_step=spent_s >= CHECK_SHARE * self._step_s)
        self._has_computed = True

    def _let_others_run(self, *, must_step: bool) -> None:
        has_commands = not self._inbox.empty()
        try:
            self._run_short()
            must_step = has_commands or (must_step and not self._engine.is_idle)
            if must_step and self._failure is None:
                self._step()
                self._deliver()  # the long command goes on next, and no step
        except Exception as error:
            raise _EngineDied from error
        if self._failure is not None:
            raise self._failure

    def _submit(self, request: Request, stream: Stream) -> None:
        self._engine.add_request(request)
        self._streams[request.request_id] = stream
        self._submitted.append(stream)

    def _cancel(self, request_id: str, stream: Stream) -> None:
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._engine.abort(request_id)

    def _drop(self, digest: str, ending: Collection[str], freed: Future[Any]) -> None:
        self._send(self._engine.drop_adapter(digest, ending=ending))
        self._unloading.setdefault(digest, []).append(freed)

    def _resolve_unloads(self) -> None:
        """Tell those who wait for a drop that it is done: the memory is free, or still in use by
        another load of the same content.
        """
        for digest in list(self._unloading):
            if digest not in self._engine.host or self._engine.host.is_referenced(digest):
                for freed in self._unloading.pop(digest):
                    _settle(freed)

    def _deliver(self) -> None:
        """Hand what has been made to its streams."""
        outputs = []
        with suppress(IndexError):  # taken one by one: two threads may be here, see `abandon`
            while True:
                outputs.append(self._undelivered.popleft())
        self._send(outputs)

    def _send(self, outputs: list[StepOutput]) -> None:
        """Put outputs into their streams' queues, waking each event loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Outputs, StepOutput]]] = {}
        for output in outputs:
            is_over = output.finish_reason is not None
            stream = self._streams.get(output.request_id)
            if is_over:
                self._streams.pop(output.request_id, None)
            if stream is not None:
                by_loop.setdefault(stream[0], []).append((stream[1], output))
        for loop, pairs in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_put_all, pairs)

    def _stop(self) -> None:
        self._fail(Unavailable("the server is shutting down"))

    def _fail(self, error: Unavailable) -> None:
        """End every request and refuse every later command with `error`."""
        with self._post_lock:
            self._failure = self._failure or error
        self._deliver()
        try:
            self._send(self._engine.abort_all(error))
        except Exception:
            log.exception("the engine could not free what its requests held")
        self._end_all(error)

    def _end_all(self, error: Unavailable) -> None:
        """Give every stream and every command that is left its end. Called on either side, also
        on both at once: who takes one out ends it.
        """
        self._send(
            [
                StepOutput(request_id=request_id, finish_reason=FinishReason.ERROR, error=error)
                for request_id in list(self._streams)
            ]
        )
        running = self._running
        if running is not None and threading.current_thread() is not self._thread:
            with suppress(InvalidStateError):  # it has ended just now
                running.set_exception(error)
        with suppress(queue.Empty):
            while True:
                _settle(self._inbox.get_nowait().done, error)
        with suppress(IndexError):
            while True:
                _settle(self._long.popleft().done, error)
        with suppress(KeyError):
            while True:
                for freed in self._unloading.popitem()[1]:
                    _settle(freed, error)


def _do(command: _Command) -> None:
    """Run a command and answer its caller. What is no Exception, like SystemExit, ends the engine,
    and is not for the caller's event loop.
    """
    try:
        result = command.action()
    except Exception as error:
        command.done.set_exception(error)
    except BaseException as error:
        cause = error.__cause__ if isinstance(error, _EngineDied) else error
        command.done.set_exception(Unavailable(f"the engine has died of {cause!r}"))
        raise
    else:
        command.done.set_result(result)


def _read_beside_steps() -> None:
    torch_threads.compute_alone()
    give_way()


def _settle(future: Future[Any], error: Exception | None = None) -> None:
    """Give a future its end, unless its caller has gone."""
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _put_all(pairs: list[tuple[Outputs, StepOutput]]) -> None:
    for outputs, output in pairs:
        outputs.put_nowait(output)
