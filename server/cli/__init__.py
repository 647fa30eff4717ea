"""The command `loramux`. Heavy imports wait for the command that needs them, so help is quick."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Any

import typer

from lora_runtime.errors import LoramuxError
from lora_runtime.terminal import Terminal, echo
from loramux.server.cli import chat, doctor, keys, local, remote, serve, train
from loramux.server.cli.command import Command


class Commands(typer.core.TyperGroup):
    """Commands whose expected failures are one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error raised on purpose needs no traceback."""
        try:
            return super().invoke(ctx)
        except (LoramuxError, TimeoutError) as error:
            field = getattr(error, "field", None)
            where = f"{field}: " if field and field not in str(error) else ""
            stderr = Terminal(stderr=True, soft_wrap=True, highlight=False)
            stderr.print(f"error: {where}{_with_flags(str(error))}", style="red", markup=False)
            raise typer.Exit(1) from None


def _with_flags(message: str) -> str:
    """A server and the trainer name what helps as their callers in Python write it."""
    for words, flag in FLAGS_IN_MESSAGES.items():
        message = message.replace(words, flag)
    return message


FLAGS_IN_MESSAGES = {
    "with replace": "with --replace",
    "unfinished run; resume it": "unfinished run; continue it with --resume",
    "make room and resume": "make room and continue with --resume",
}


def _show_version(is_asked: bool) -> None:
    if is_asked:
        echo(f"loramux {importlib.metadata.version('loramux')}")
        raise typer.Exit


app = typer.Typer(
    name="loramux",
    cls=Commands,
    help="Serve and train many LoRA adapters over one quantized base model.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Serve and train many LoRA adapters over one quantized base model."""


app.command(cls=Command)(serve.serve)
app.command(cls=Command)(train.train)
app.command(cls=Command)(remote.generate)
app.command(cls=Command)(chat.chat)
app.add_typer(remote.adapters, name="adapters")
remote.adapters.command(cls=Command)(local.verify)
remote.adapters.command(cls=Command)(local.convert)
app.command(cls=Command)(local.merge)
app.add_typer(keys.keys, name="keys")
app.command(cls=Command)(doctor.doctor)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; None takes the process's own arguments."""
    app(arguments, prog_name="loramux")
