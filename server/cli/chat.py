"""`loramux chat`: a conversation with a running server, turn by turn, over gRPC."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import typer

from lora_runtime.errors import LoramuxError
from lora_runtime.terminal import echo, shown, write
from loramux.server.cli.connection import connected
from loramux.server.cli.remote import Weighted, weights
from loramux.server.client import Client
from loramux.server.client.requests import Options

HELP = """\
/adapter [NAME[=WEIGHT] …]  answer with these adapters from now on; without a name, with the base
/system [TEXT]              begin anew under this system message; without a text, under none
/reset                      begin anew
/quit                       end, as the end of input does; Ctrl-C ends an answer"""


@dataclass
class Conversation:
    """What was said, and how the next answer is made."""

    client: Client
    options: Options
    adapters: dict[str, float]
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Who answers, for the prompt."""
        return "+".join(self.adapters) or "base"

    def say(self, text: str) -> None:
        """Send a turn and write the answer as it comes; a failed turn leaves no trace."""
        turn = {"role": "user", "content": text}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages, answer, is_thinking = [*system, *self.turns, turn], "", False
        try:
            for response in self.client.generate(
                messages=messages, adapters=self.adapters, **self.options
            ):
                thought, said = response.delta.reasoning, response.delta.text
                is_thinking = is_thinking or bool(thought)
                write(f"{thought}\n\n{said}" if is_thinking and said else thought + said)
                is_thinking = is_thinking and not said
                answer += said
        except KeyboardInterrupt:
            pass  # what has come of the answer is the answer
        except (LoramuxError, TimeoutError) as error:
            write("\n" if answer else "")
            echo(f"error: {error}", is_error=True)
            return
        write("\n")
        self.turns += [turn, {"role": "assistant", "content": answer}]

    def obey(self, line: str) -> bool:
        """Carry out a line that begins with a slash. False: it ends the conversation."""
        command, _, rest = line.partition(" ")
        match command:
            case "/quit" | "/exit":
                return False
            case "/reset":
                self.turns.clear()
            case "/system":
                self.system = rest.strip() or None
                self.turns.clear()
            case "/adapter":
                self._choose(rest.split())
            case "/help":
                echo(HELP, is_error=True)
            case _:
                echo(f"{command} is no command; /help shows them", is_error=True)
        return True

    def _choose(self, texts: list[str]) -> None:
        """Take adapters that the server has loaded, or stay with those there are."""
        try:
            chosen = weights(texts)
            for name in chosen:
                self.client.get_adapter(name)
        except typer.BadParameter as error:
            echo(f"error: {error.message}", is_error=True)
        except (LoramuxError, TimeoutError) as error:
            echo(f"error: {error}", is_error=True)
        else:
            self.adapters = chosen


@connected
def chat(
    client: Client,
    adapter: Weighted = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this total probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds draw equal answers.")] = None,
) -> None:
    """Talk with the base or with adapters. /help shows what changes them, /quit ends.

    Each line is a turn; what is not from a terminal is read line by line too, answers to stdout.
    """
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    options: Options = {}
    options.update({k: v for k, v in given.items() if v is not None})  # type: ignore[typeddict-item]
    conversation = Conversation(client, options, weights(adapter or []), system)
    for name in conversation.adapters:
        client.get_adapter(name)
    if not conversation.adapters:
        client.server_info()
    converse(conversation)


def converse(conversation: Conversation) -> None:
    """Answer each line until one ends the conversation, or the input does."""
    for line in _lines(conversation):
        if not line.strip():
            continue
        if line.startswith("/"):
            if not conversation.obey(line):
                return
        else:
            conversation.say(line)


def _lines(conversation: Conversation) -> Iterator[str]:
    """The lines that a person types, with the arrow keys' history, or those of a file or pipe."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import readline  # noqa: F401  # it gives input() its history and editing

    while True:
        try:
            yield input(f"{shown(conversation.name)}> ")
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
