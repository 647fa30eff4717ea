"""`loramux train --deploy`: what a run has made goes to a running server, and is heard there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from lora_runtime.errors import InvalidRequest, LoramuxError
from lora_runtime.terminal import Terminal
from loramux.server.cli.connection import Connect
from loramux.server.cli.remote import send_folder
from loramux.server.client import Client
from loramux.server.client.requests import Messages

if TYPE_CHECKING:
    from lora_runtime.training.config import UnitConfig
    from lora_runtime.training.report import UnitResult

SAMPLE_TOKENS = 64
"""Most tokens of each answer that is shown."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt: a conversation, or text to be continued."""

    messages: Messages | None = None
    text: str | None = None

    def answer(self, client: Client, adapter: str | None) -> str:
        """The server's likeliest answer, from an adapter or the base."""
        return client.generate(
            self.text,
            messages=self.messages,
            adapter=adapter,
            temperature=0.0,
            max_tokens=SAMPLE_TOKENS,
        ).text()


@dataclass(frozen=True, slots=True)
class Deployment:
    """A trained adapter on its way: name on the server, folder here, the data it learned from."""

    name: str
    folder: Path
    data: Path


def check_server(connect_to: Connect, address: str, name: str | None, num_units: int) -> None:
    """Before hours of training: raise Unavailable where no server answers, typer.BadParameter
    where one name is given for several units.
    """
    if name is not None and num_units > 1:
        raise typer.BadParameter(
            f"--deploy-name names one adapter, and the run trains {num_units}; leave it out: "
            "each is deployed under its own name"
        )
    with connect_to(address) as client:
        client.server_info()


def deploy(
    connect_to: Connect, address: str, deployments: Sequence[Deployment], sample: str | None
) -> bool:
    """Upload each adapter in the place of what its name holds, and show base and adapter answer
    `sample`, or the first prompt of its data. Returns whether all of them are loaded.
    """
    console, outcomes = Terminal(soft_wrap=True), []
    with connect_to(address) as client:
        for deployment in deployments:
            try:
                _deploy_one(client, deployment, sample, console)
                outcomes.append(True)
            except (LoramuxError, TimeoutError) as error:
                console.print(f"{deployment.name}: not deployed: {error}", markup=False)
                outcomes.append(False)
    return all(outcomes)


def _deploy_one(
    client: Client, deployment: Deployment, sample: str | None, console: Console
) -> None:
    name = deployment.name
    info = send_folder(client, name, deployment.folder, replace=True)
    console.print(f"{name}: loaded, digest {info.digest[:12]}", markup=False)
    try:
        prompt = _given(sample, client) if sample else first_prompt(deployment.data)
        lines = {
            "prompt": prompt.text or _last_content(prompt.messages or ()),
            "base": prompt.answer(client, None),
            name: prompt.answer(client, name),
        }
    except (InvalidRequest, OSError) as error:
        console.print(f"{name}: no sample: {error}", markup=False)
        return
    for who, text in lines.items():
        console.print(f"  {who}: {text}", markup=False, highlight=False)


def _given(sample: str, client: Client) -> Sample:
    """A user's message where the base has a chat template, else text."""
    if client.server_info().base.has_chat_template:
        return Sample(messages=[{"role": "user", "content": sample}])
    return Sample(text=sample)


def first_prompt(data: Path) -> Sample:
    """What comes before the first answer in a JSONL file of training data.

    Raises InvalidRequest (field `sample`) where the first line shows none.
    """
    with data.open(encoding="utf-8") as lines:
        line = lines.readline()
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    found = _prompt(values) if isinstance(values, dict) else None
    if found is None:
        raise InvalidRequest(
            f"the first line of {data.name} shows no prompt; give one with --sample",
            field="sample",
        )
    return found


def _prompt(values: Mapping[str, Any]) -> Sample | None:
    messages = values.get("messages", values.get("prompt"))
    if isinstance(messages, str) and messages:
        return Sample(text=messages)
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        return None
    roles = [turn.get("role") for turn in messages]
    end = roles.index("assistant") if "assistant" in roles else len(messages)
    turns = [{"role": str(t.get("role")), "content": str(t.get("content"))} for t in messages[:end]]
    return Sample(messages=turns) if turns else None


def _last_content(messages: Messages) -> str:
    return str(messages[-1]["content"])


def deployments(
    results: Sequence[UnitResult], units: Sequence[UnitConfig], name: str | None
) -> list[Deployment]:
    """The finished units of a run; members of a sweep are not units of their own.

    `name`: on the server, in the place of the one unit's.
    """
    data = {unit.name: unit.data for unit in units}
    return [
        Deployment(name or result.name, result.folder, data[result.name])
        for result in results
        if result.folder is not None and result.sweep is None
    ]
