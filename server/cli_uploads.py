"""`loramux adapters upload` and `rollback`, and the progress of an upload on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lora_runtime.terminal import Terminal
from protos.loramux.v1 import adapters_pb2
from server.cli_client import Address, Name, adapter_table
from server.client import DEFAULT_TARGET, Client


def upload(
    name: Annotated[str, typer.Argument(help="The name that requests will use.")],
    folder: Annotated[Path, typer.Argument(help="The adapter's folder on this machine.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Swap a name that holds other content.")
    ] = False,
    address: Address = DEFAULT_TARGET,
) -> None:
    """Send an adapter's files to a running server and load them there."""
    with Client(address) as client:
        info = send_folder(client, name, folder, replace=replace)
    Terminal(markup=False).print(adapter_table([info]))


def rollback(name: Name, address: Address = DEFAULT_TARGET) -> None:
    """Give a name the content it had before its last replacement; once more: forward again."""
    with Client(address) as client:
        info = client.rollback_adapter(name)
    Terminal(markup=False).print(adapter_table([info]))


def send_folder(
    client: Client, name: str, folder: Path, *, replace: bool
) -> adapters_pb2.AdapterInfo:
    """Upload with a bar on stderr; it is shown on terminals only."""
    console = Terminal(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(f"sending {name}", total=None)
        return client.upload_adapter(
            name,
            folder,
            replace=replace,
            on_progress=lambda num_sent, total: bar.update(task, completed=num_sent, total=total),
        )
