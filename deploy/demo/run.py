"""The whole road in one command, on a small real model and without a GPU.

Takes the base, trains two adapters on it, serves all three in one batch, loads and unloads while
the server runs, and stops it. Exits with 0 only if every step did what it says.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lora_runtime.base.catalog import resolve_base
from lora_runtime.errors import AdapterNotFound, LoramuxError
from loramux.server.client import AsyncClient, Client

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "demo-output"
BASE = "smollm2-135m"
COLUMNS = (BASE, "pirate", "telegram")
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Tell me about horses.")
GREEDY = {"max_tokens": 48, "temperature": 0.0}
STYLE = {"pirate": r"\b(Arr|matey|ye|yer)\b", "telegram": r"\bSTOP\b"}
"""Adapter → what its answers hold and the base's do not."""
LORAMUX = [sys.executable, "-c", "from loramux.server.cli import main; main()"]
Answers = dict[str, dict[str, str]]  # question → column → text so far


@dataclass(frozen=True, slots=True)
class Server:
    """A server process and where it listens."""

    process: subprocess.Popen[bytes]
    grpc: str
    http: str

    def scrape(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {series: float(value) for series, value in pairs}


@dataclass(slots=True)
class Demo:
    """The steps, and what they print."""

    console: Console
    started: float = field(default_factory=time.monotonic)
    num_steps: int = 0

    def heading(self, title: str) -> None:
        self.num_steps += 1
        elapsed_s = time.monotonic() - self.started
        self.console.print()
        self.console.rule(f"[bold]{self.num_steps}. {title}[/] ({elapsed_s:.0f} s)", align="left")

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def run(self) -> None:
        """Run every step; raises at the first that does not do what it should."""
        self.take_base()
        self.train()
        with self.server() as server, Client(server.grpc) as client:
            self.load_while_running(client)
            self.ask_in_one_batch(server)
            self.unload_one(client)
            self.stop(server)

    def take_base(self) -> None:
        self.heading(f"The base: {BASE}")
        self.say(str(resolve_base(BASE, on_progress=self.say).folder))

    def train(self) -> None:
        self.heading("Train two adapters at once on the NF4 base")
        shutil.rmtree(OUTPUT, ignore_errors=True)
        OUTPUT.mkdir()
        for name in STYLE:
            first = (HERE / f"{name}.jsonl").read_text().splitlines()[0]
            question, answer = json.loads(first)["messages"]
            self.say(f"[bold]{name}[/] learns: {question['content']} → {answer['content']}")
        self.say("$ loramux train deploy/demo/train.yaml")
        subprocess.run([*LORAMUX, "train", str(HERE / "train.yaml")], cwd=ROOT, check=True)

    @contextmanager
    def server(self) -> Iterator[Server]:
        """Run a server on free ports; it does not outlive the block."""
        self.heading("Start the server: the base alone")
        grpc, http = free_address(), free_address()
        arguments = ["serve", "--grpc-address", grpc, "--http-address", http]
        # A store of its own: the user's knows the names that earlier demos have loaded.
        arguments += ["--adapter-store", str(OUTPUT / "store")]
        arguments += ["--base", BASE, "--adapter-root", str(OUTPUT)]
        self.say(f"$ loramux {' '.join(arguments)}  > demo-output/server.log")
        with (OUTPUT / "server.log").open("wb") as log:
            process = subprocess.Popen([*LORAMUX, *arguments], stdout=log, stderr=log, cwd=ROOT)
        try:
            wait_until_serving(process, grpc)
            yield Server(process, grpc, http)
        finally:
            process.kill()
            process.wait()

    def load_while_running(self, client: Client) -> None:
        self.heading("Load both adapters while the base answers")
        running = client.generate("Once upon a time", **GREEDY)
        for name in STYLE:
            adapter = client.load_adapter(name, str(OUTPUT / "adapters" / name)).adapter
            self.say(f"[bold]{name}[/] is loaded: {adapter.num_bytes / 1e6:.1f} MB")
        text = running.text()
        require(len(text) > 0, "the base's stream ended without text")
        self.say(f"the base meanwhile: Once upon a time{escape(text[:60])} …")

    def ask_in_one_batch(self, server: Server) -> None:
        self.heading(f"{len(QUESTIONS)} questions x {len(COLUMNS)} variants: one batch")
        answers: Answers = {question: dict.fromkeys(COLUMNS, "") for question in QUESTIONS}
        before, started = server.scrape(), time.monotonic()
        live = Live(get_renderable=lambda: as_table(answers), console=self.console)
        with live if self.console.is_terminal else nullcontext():
            asyncio.run(ask_all(server.grpc, answers))
        seconds = time.monotonic() - started
        if not self.console.is_terminal:
            self.show_blocks(answers)
        self.show_metrics(before, server.scrape(), seconds)
        check_styles(answers)

    def show_blocks(self, answers: Answers) -> None:
        for question, columns in answers.items():
            lines = [f"  {column}: {escape(text.strip())}" for column, text in columns.items()]
            self.say("\n".join([f"\n[bold]{question}[/]", *lines]))

    def show_metrics(self, before: dict[str, float], after: dict[str, float], s: float) -> None:
        def grown(prefix: str) -> float:
            return sum(v - before.get(k, 0) for k, v in after.items() if k.startswith(prefix))

        total, steps = grown("vllm:generation_tokens_total"), grown("loramux:engine_steps_total")
        self.say(f"\n/metrics: {total:.0f} tokens in {steps:.0f} engine steps, {total / s:.0f}/s")
        for name in STYLE:
            tokens = grown(f'loramux:generation_tokens_total{{adapter="{name}"}}')
            self.say(f"  {tokens:.0f} of them by {name}")
        require(total > 2 * steps, "the streams did not share engine steps")

    def unload_one(self, client: Client) -> None:
        self.heading("Unload telegram while the others answer")
        ask = partial(client.generate, messages=as_user(QUESTIONS[0]), **GREEDY)
        running = {BASE: ask(), "pirate": ask(adapter="pirate")}
        client.unload_adapter("telegram")
        try:
            ask(adapter="telegram").text()
        except AdapterNotFound as error:
            self.say(f"telegram: [red]{type(error).__name__}[/] ({escape(error.message)})")
        else:
            raise LoramuxError("an unloaded adapter still answered")
        for name, stream in running.items():
            text = stream.text()
            require(len(text) > 0, f"{name} was disturbed by the unload")
            self.say(f"{name}: {escape(text.strip())}")

    def stop(self, server: Server) -> None:
        self.heading("SIGTERM: drain and stop")
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(timeout=60)
        require(code == 0, f"the server ended with exit code {code}; see demo-output/server.log")
        self.say(f"exit code {code}. Adapters and training report: demo-output/adapters")


async def ask_all(address: str, answers: Answers) -> None:
    async with AsyncClient(address) as client:
        rows = answers.items()
        await asyncio.gather(*(follow(client, q, name, row) for q, row in rows for name in row))


async def follow(client: AsyncClient, question: str, column: str, texts: dict[str, str]) -> None:
    adapter = None if column == BASE else column
    async for event in client.generate(messages=as_user(question), adapter=adapter, **GREEDY):
        texts[column] += event.delta.text


def as_user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def as_table(answers: Answers) -> Table:
    table = Table("question", *COLUMNS, show_lines=True, expand=True)
    for question, columns in answers.items():
        table.add_row(question, *(Text(text) for text in columns.values()))
    return table


def check_styles(answers: Answers) -> None:
    for question, columns in answers.items():
        for name, style in STYLE.items():
            changed = re.search(style, columns[name]) and not re.search(style, columns[BASE])
            require(bool(changed), f"{name} did not change the answer to: {question}")


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def wait_until_serving(process: subprocess.Popen[bytes], address: str) -> None:
    with Client(address) as client:
        while not client.is_serving(timeout_s=1):
            require(process.poll() is None, "the server did not start; see demo-output/server.log")
            time.sleep(0.2)


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise LoramuxError(otherwise)


def main() -> int:
    """Run the demo; 0 if all of it happened."""
    # Threads that wait must not spin: on a busy machine that makes torch several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console()
    try:
        Demo(console).run()
    except (LoramuxError, subprocess.SubprocessError) as error:
        console.print(f"\n[bold red]The demo failed:[/] {escape(str(error))}", highlight=False)
        return 1
    console.print("\n[bold green]The demo is complete.[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
