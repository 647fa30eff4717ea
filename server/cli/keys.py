"""`loramux keys`: makes API keys and writes their hashes into a server's file of keys."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from lora_runtime.errors import ConfigError
from lora_runtime.settings import parse_yaml
from lora_runtime.terminal import echo, write
from server.access.caller import Role
from server.access.keys import hashed, new_key, table_of
from server.cli.command import Command

HEAD = """\
# API keys of a loramux server: `loramux serve --keys THIS_FILE`; docs/access.md explains it.
# Hashes only: a key is shown once, by `loramux keys new`. Changes are read while the server runs.
"""

keys = typer.Typer(help="Make API keys for a server.", no_args_is_help=True)


@keys.callback()
def _group() -> None:
    """Make API keys for a server."""


@keys.command("new", cls=Command)
def new(
    file: Annotated[Path, typer.Option(help="The server's file of keys; made if there is none.")],
    tenant: Annotated[str, typer.Option(help="Whose key it is; added to the file if new there.")],
    adapter: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN",
            help="Names of adapters that exist for the key, as 'acme-*' or '*'; repeat it.",
        ),
    ],
    role: Annotated[
        Role, typer.Option(help="user: generates. operator: loads and unloads too.")
    ] = Role.USER,
    key_id: Annotated[
        str | None,
        typer.Option("--id", help="Its name in the log. Default: one is made."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="DATE", help="When it ends, as 2027-01-31.")
    ] = None,
) -> None:
    """Make a key, show it once, and write its hash into a file of keys."""
    key = new_key()
    entry = {
        "id": key_id or f"{tenant}-{secrets.token_hex(3)}",
        "tenant": tenant,
        "role": role.value,
        "adapters": adapter,
        "sha256": hashed(key),
        "expires": expires,
    }
    add_entry(file, {name: value for name, value in entry.items() if value is not None})
    echo(f"{entry['id']} is in {file}; its key, which is not shown again:", is_error=True)
    write(f"{key}\n")


def add_entry(file: Path, entry: dict[str, Any]) -> None:
    """Add an entry, and its tenant if need be, to a file of keys that is good before and after.

    Raises ConfigError naming what is wrong; the file is as it was then.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else HEAD
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", field="file") from None
    if text.strip() and file.exists():
        table_of(text.encode(), file)
    wanted = _values(text)
    wanted["tenants"].setdefault(entry["tenant"], {})
    wanted["keys"].insert(0, entry)
    written = _with_lines(text, entry)
    if _values(written) != wanted:  # in a style that lines cannot be added to: comments are lost
        written = HEAD + yaml.safe_dump(wanted, sort_keys=False)
    table_of(written.encode(), file)
    _replace(file, written)


def _values(text: str) -> dict[str, Any]:
    """What a file says; None, as of a file that has other YAML after lines were added, is empty."""
    try:
        found = parse_yaml(text) or {}
    except ValueError:
        found = {}
    values: dict[str, Any] = dict(found) if isinstance(found, dict) else {}
    tenants = {name: limits or {} for name, limits in (values.get("tenants") or {}).items()}
    return {**values, "tenants": tenants, "keys": list(values.get("keys") or [])}


def _with_lines(text: str, entry: dict[str, Any]) -> str:
    """The text with lines for an entry and its tenant below `keys:` and `tenants:`, so that all
    other lines, comments among them, stay as they are.
    """
    if entry["tenant"] not in _values(text)["tenants"]:
        text = _under(text, "tenants", f"  {entry['tenant']}: {{}}")
    flow = yaml.safe_dump(entry, sort_keys=False, default_flow_style=True, width=1 << 16).strip()
    indent = next(iter(re.findall(r"(?m)^( *)- ", text)), "  ")
    return _under(text, "keys", f"{indent}- {flow}")


def _under(text: str, heading: str, line: str) -> str:
    """The text with a line below a heading, which is added if it is not there."""
    found = re.search(rf"(?m)^{heading}:[ ]*(\[\]|\{{\}})?$", text)
    if found is None:
        return f"{text}{heading}:\n{line}\n"
    return f"{text[: found.start()]}{heading}:\n{line}{text[found.end() :]}"


def _replace(file: Path, text: str) -> None:
    """Write a file as a whole, or not at all; what it holds is nobody else's business at first."""
    try:
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        number, name = tempfile.mkstemp(dir=file.absolute().parent, prefix=f".{file.name}-")
        with os.fdopen(number, "w", encoding="utf-8") as stream:
            stream.write(text)
            os.fchmod(number, mode)
        os.replace(name, file.resolve())
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written: {error.strerror or error}", field="file"
        ) from None
