"""The addresses that a server listens on: found free, or named, before anything is loaded."""

from __future__ import annotations

import errno
import socket
from concurrent.futures import Future
from ipaddress import ip_address
from threading import Thread
from typing import Any

from lora_runtime.errors import ConfigError
from loramux.server.config import split_address

MAX_LOOK_UP_S = 10.0
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""A name may stand for addresses that this machine does not have, like `localhost` for IPv6's."""


def listen(address: str, setting: str) -> socket.socket:
    """Listen on host:port, the first address that the host stands for; port 0 takes any free one.

    Raises ConfigError naming the setting, also where another of the host's addresses is taken:
    some of the clients would reach whoever listens there.
    """
    listeners: list[socket.socket] = []
    try:
        for family, host, port in _resolved(address, setting):
            try:
                listeners.append(_listener(family, host, port))
            except OSError as error:
                if error.errno not in NOT_HERE:
                    raise _refused(address, setting, error) from None
                missing = error
        if not listeners:
            raise _refused(address, setting, missing)
        return listeners.pop(0)
    finally:
        _close(listeners)


def check_free(address: str, setting: str) -> None:
    """Raise ConfigError naming the setting if `listen` would."""
    listen(address, setting).close()


def is_own(address: str, setting: str) -> bool:
    """Tell whether only this machine reaches an address. Raises ConfigError naming the setting."""
    found = _resolved(address, setting)
    return all(ip_address(host.partition("%")[0]).is_loopback for _, host, _ in found)


def bracketed(address: str) -> str:
    """Return host:port as gRPC reads it: an IPv6 host in brackets, which a setting may lack."""
    host, port = split_address(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolved(address: str, setting: str) -> list[tuple[socket.AddressFamily, str, int]]:
    """IPv4 first: with port 0 each address would get another port, and most clients try that."""
    host, port = split_address(address)
    try:
        found = _looked_up(host, port)
    except (OSError, UnicodeError) as error:
        raise _refused(address, setting, error) from None
    ordered = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return [(family, str(target[0]), port) for family, *_, target in ordered]


def _looked_up(host: str, port: int) -> list[Any]:
    """What a host stands for. A name server that does not answer has no limit in the system's own
    call, so it is made on a thread that may be left behind. Raises OSError and UnicodeError.
    """
    found: Future[list[Any]] = Future()

    def look_up() -> None:
        try:
            kind, flags = socket.SOCK_STREAM, socket.AI_PASSIVE
            found.set_result(socket.getaddrinfo(host, port, type=kind, flags=flags))
        except (OSError, UnicodeError) as error:
            found.set_exception(error)

    Thread(target=look_up, name="look-up", daemon=True).start()
    try:
        return found.result(MAX_LOOK_UP_S)
    except TimeoutError:
        raise OSError(f"no name server said in {MAX_LOOK_UP_S:g} s what {host} is") from None


def _listener(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    """Connections inherit TCP_NODELAY: the body of an answer would wait for the client to
    acknowledge the head, which clients put off by 40 ms. asyncio sets it on its own sockets only.
    """
    listener = socket.create_server((host, port), family=family)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _close(listeners: list[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


def _refused(address: str, setting: str, error: Exception) -> ConfigError:
    why = getattr(error, "strerror", None) or error
    flag = "--" + setting.replace("_", "-")
    return ConfigError(
        f"{setting}: cannot listen on {address}: {why}; choose another with {flag}", field=setting
    )
