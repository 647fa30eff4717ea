"""`loramux keys`: makes, lists and revokes API keys in a server's file of their hashes."""

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
from lora_runtime.plain_file import read_plain_file
from lora_runtime.settings import parse_yaml
from lora_runtime.terminal import echo, write
from loramux.server.access.caller import Role
from loramux.server.access.keys import KeyEntry, hashed, new_key, parsed, table_of
from loramux.server.cli.command import Command
from loramux.server.cli.tables import show_table

HEAD = """\
# API keys of a loramux server: `loramux serve --keys THIS_FILE`; docs/access.md explains it.
# Hashes only: a key is shown once, by `loramux keys new`. Changes are read while the server runs.
"""

File = Annotated[Path, typer.Option(help="The server's file of keys.")]

keys = typer.Typer(help="Make, list and revoke API keys of a server.", no_args_is_help=True)


@keys.callback()
def _group() -> None:
    """Make, list and revoke API keys of a server."""


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


@keys.command("list", cls=Command)
def list_keys(file: File) -> None:
    """Show whose keys a file holds and what they are for."""
    content = _text(file).encode()
    table_of(content, file)
    columns = ("id", "tenant", "role", "adapters", "expires")
    show_table(columns, [_row(entry) for entry in parsed(content, file).keys])


@keys.command("revoke", cls=Command)
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as list shows it.")],
    file: File,
) -> None:
    """Take a key out of a file of keys; a running server refuses it within a second."""
    remove_entry(file, key_id)
    echo(f"{key_id} is no longer in {file}", is_error=True)


def _row(entry: KeyEntry) -> tuple[str, ...]:
    expires = "never" if entry.expires is None else entry.expires.isoformat()
    return entry.id, entry.tenant, entry.role.value, ", ".join(entry.adapters), expires


def remove_entry(file: Path, key_id: str) -> None:
    """Take the entry of an id out of a file of keys that is good before and after.

    Raises ConfigError naming what is wrong; the file is as it was then.
    """
    text = _text(file)
    table_of(text.encode(), file)
    wanted = _values(text)
    ids = [entry["id"] for entry in wanted["keys"]]
    if key_id not in ids:
        raise ConfigError(
            f"ID is {key_id!r}, which is not in {file}; its ids: {', '.join(ids)[:200] or 'none'}",
            field="id",
        )
    index = ids.index(key_id)
    del wanted["keys"][index]
    _write(file, _without_lines(text, index), wanted)


def add_entry(file: Path, entry: dict[str, Any]) -> None:
    """Add an entry, and its tenant if need be, to a file of keys that is good before and after.

    Raises ConfigError naming what is wrong; the file is as it was then.
    """
    text = _text(file) if file.exists() else HEAD
    if text.strip() and file.exists():
        table_of(text.encode(), file)
    wanted = _values(text)
    wanted["tenants"].setdefault(entry["tenant"], {})
    wanted["keys"].insert(0, entry)
    _write(file, _with_lines(text, entry), wanted)


def _text(file: Path) -> str:
    try:
        return read_plain_file(file).decode()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file} cannot be read: {problem}", field="file") from None


def _write(file: Path, text: str, wanted: dict[str, Any]) -> None:
    """Write a text that says what is wanted. Where it does not, since the file's style is one whose
    lines cannot be changed one by one, all is written anew, and comments are lost.
    """
    if _values(text) != wanted:
        text = HEAD + yaml.safe_dump(wanted, sort_keys=False)
    table_of(text.encode(), file)
    _replace(file, text)


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


def _without_lines(text: str, index: int) -> str:
    """The text without the lines of an entry; all others, comments among them, stay as they are."""
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    entries = next(value for name, value in document.value if name.value == "keys").value
    first, last = entries[index].start_mark.line, _last_line(entries[index])
    lines = text.splitlines(keepends=True)
    text = "".join(lines[:first] + lines[last + 1 :])
    return text if len(entries) > 1 else re.sub(r"(?m)^keys:(?=[ ]*(#.*)?$)", "keys: []", text)


def _last_line(node: yaml.Node) -> int:
    """The last line that is a node's own: YAML ends a block where the next thing begins, and what
    people wrote in between is not the block's.
    """
    is_block = isinstance(node, yaml.CollectionNode) and not node.flow_style
    if not is_block:
        return int(node.end_mark.line)
    last = node.value[-1]
    return _last_line(last[1] if isinstance(node, yaml.MappingNode) else last)


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
