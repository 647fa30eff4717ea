"""How a command reaches a running server: address, key and TLS, as flags and variables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from loramux.server.client import DEFAULT_TARGET, Client, tls_credentials

PANEL = "Connection"

Address = Annotated[
    str,
    typer.Option(
        envvar="LORAMUX_ADDRESS",
        help="host:port of the server's gRPC port.",
        rich_help_panel=PANEL,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="LORAMUX_API_KEY",
        help="The key to send; better in the environment, where other users cannot read it.",
        rich_help_panel=PANEL,
        show_envvar=True,
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        envvar="LORAMUX_TLS_CA",
        help="PEM file of the roots of the server's certificate; connects by TLS.",
        rich_help_panel=PANEL,
    ),
]
Tls = Annotated[
    bool,
    typer.Option("--tls", help="Connect by TLS, with well-known roots.", rich_help_panel=PANEL),
]
Cert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert", help="PEM file of this client's certificate.", rich_help_panel=PANEL
    ),
]
CertKey = Annotated[
    Path | None,
    typer.Option("--tls-key", help="PEM file of its key.", rich_help_panel=PANEL),
]
FLAGS: dict[str, tuple[Any, Any]] = {
    "address": (Address, DEFAULT_TARGET),
    "api_key": (ApiKey, None),
    "tls": (Tls, False),
    "tls_ca": (TlsCa, None),
    "tls_cert": (Cert, None),
    "tls_key": (CertKey, None),
}


Connect: TypeAlias = Callable[[str], Client]
"""Makes a client of an address."""


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `client` is connected as these flags say."""

    @wraps(command)
    def run(**values: Any) -> None:
        with connect(**{name: values.pop(name) for name in FLAGS}) as client:
            command(client=client, **values)

    return _with_flags(run, command, FLAGS, "client")


def connecting(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `connect_to`, a Connect, connects as these flags say to whatever
    address the command knows.
    """
    flags = {name: flag for name, flag in FLAGS.items() if name != "address"}

    @wraps(command)
    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in flags}
        command(connect_to=lambda address: connect(address=address, **given), **values)

    return _with_flags(run, command, flags, "connect_to")


def _with_flags(
    run: Callable[..., None],
    command: Callable[..., None],
    flags: Mapping[str, tuple[Any, Any]],
    made_of_them: str,
) -> Callable[..., None]:
    """Give `run` the flags of a command and these, in the place of the parameter made of them.

    typer reads a command's flags from its signature, so they are written into that.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    kinds = inspect.Parameter.KEYWORD_ONLY
    given = [parameter.replace(kind=kinds) for parameter in own if parameter.name != made_of_them]
    made = [
        inspect.Parameter(name, kinds, default=default, annotation=hint)
        for name, (hint, default) in flags.items()
    ]
    signature = inspect.Signature([*given, *made])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return run


def connect(
    *,
    address: str,
    api_key: str | None,
    tls: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
) -> Client:
    """Return a client. Raises InvalidRequest for an address, key or file that cannot be used."""
    is_encrypted = tls or tls_ca or tls_cert or tls_key
    credentials = tls_credentials(tls_ca, tls_cert, tls_key) if is_encrypted else None
    return Client(address, api_key=api_key or None, credentials=credentials)
