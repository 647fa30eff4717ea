"""`loramux adapters upload`, `rollback`, `stored` and `delete`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from lora_runtime.terminal import Terminal, echo
from protos.loramux.v1 import adapters_pb2
from server.cli_client import Address, Name, show_loaded
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
    show_loaded(info)


def rollback(name: Name, address: Address = DEFAULT_TARGET) -> None:
    """Give a name the content it had before its last replacement; once more: forward again."""
    with Client(address) as client:
        info = client.rollback_adapter(name)
    show_loaded(info)


def stored(address: Address = DEFAULT_TARGET) -> None:
    """Show what uploads have left in the server's store, and which adapters hold it."""
    with Client(address) as client:
        found = client.list_stored_adapters()
    table = Table("source", "size", "stored", "held by")
    for entry in found.stored:
        day = datetime.fromtimestamp(entry.stored_at_s).strftime("%Y-%m-%d %H:%M")
        table.add_row(entry.source, decimal(entry.num_bytes), day, ", ".join(entry.adapters))
    Terminal(markup=False).print(table)
    echo(f"{decimal(found.num_bytes)} of {decimal(found.max_bytes)}")


def delete(
    source: Annotated[str, typer.Argument(help="What `adapters stored` calls its source.")],
    address: Address = DEFAULT_TARGET,
) -> None:
    """Delete content from the server's store that no adapter holds."""
    with Client(address) as client:
        entry = client.delete_stored_adapter(source)
    echo(f"{entry.source} is deleted: {decimal(entry.num_bytes)}")


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
