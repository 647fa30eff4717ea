"""The command `loramux`. Heavy imports wait for the command that needs them, so help is quick."""

from __future__ import annotations

from typing import Any

import typer

from lora_runtime.errors import LoramuxError
from lora_runtime.terminal import Terminal
from server.cli import doctor, local, remote, serve, train
from server.cli.command import Command


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
            stderr.print(f"error: {where}{error}", style="red", markup=False)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="loramux",
    cls=Commands,
    help="Serve and train many LoRA adapters over one quantized base model.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command(cls=Command)(serve.serve)
app.command(cls=Command)(train.train)
app.command(cls=Command)(remote.generate)
app.add_typer(remote.adapters, name="adapters")
remote.adapters.command(cls=Command)(local.verify)
remote.adapters.command(cls=Command)(local.convert)
app.command(cls=Command)(local.merge)
app.command(cls=Command)(doctor.doctor)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; None takes the process's own arguments."""
    app(arguments, prog_name="loramux")
