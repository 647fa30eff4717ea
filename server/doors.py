"""What guards a server's two addresses, as its settings have it, and is kept current."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog

from lora_runtime.errors import ConfigError
from loramux.server.access.gate import Gate
from loramux.server.access.keys import Keys
from loramux.server.access.names import Names
from loramux.server.access.tls import Tls, TlsFiles
from loramux.server.addresses import is_own
from loramux.server.config import ServerConfig, split_address

RELOAD_PERIOD_S = 1.0
ADDRESSES = ("grpc_address", "http_address")

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Doors:
    """Who is let in, and whether connections are encrypted."""

    gate: Gate
    tls: Tls | None
    names: Names
    """By which HTTP may be called, if there are no keys."""

    @contextlib.asynccontextmanager
    async def kept_current(self) -> AsyncIterator[None]:
        """Read the files of keys and certificates again while the context lasts."""
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()

    async def _follow(self) -> None:
        parts = [part for part in (self.gate.keys, self.tls) if part is not None]
        while parts:
            await asyncio.sleep(RELOAD_PERIOD_S)
            for part in parts:
                try:
                    await asyncio.to_thread(part.reload)
                except Exception:  # whatever a file holds, the next one is read
                    logger.exception("keys or certificates are as before")


def open_doors(config: ServerConfig) -> Doors:
    """Read the files that the settings name. Raises ConfigError: what they hold cannot be used, or
    others reach an address and there are no keys.
    """
    keys = Keys(config.keys) if config.keys else None
    tls = _tls(config)
    _check_reach(config, is_encrypted=tls is not None)
    gate = Gate(keys, needs_certificate=config.tls_client_ca is not None)
    return Doors(gate, tls, _names(config))


def _names(config: ServerConfig) -> Names:
    """Others reach an --insecure server by names that it does not know, so that it takes any unless
    its operator gives them.
    """
    if not config.http_names and not is_own(config.http_address, "http_address"):
        return Names()
    host, _ = split_address(config.http_address)
    return Names(config.http_names, host)


def _tls(config: ServerConfig) -> Tls | None:
    cert, key = config.tls_cert, config.tls_key
    if cert is None and key is None and config.tls_client_ca is None:
        return None
    if cert is None or key is None:
        missing = "tls_cert" if cert is None else "tls_key"
        raise ConfigError(
            f"{missing} is missing; TLS takes both tls_cert and tls_key", field=missing
        )
    return Tls(TlsFiles(cert, key, config.tls_client_ca))


def _check_reach(config: ServerConfig, is_encrypted: bool) -> None:
    for setting in ADDRESSES:
        address = getattr(config, setting)
        if is_own(address, setting):
            continue
        if config.keys is not None:
            if not is_encrypted:
                logger.warning(
                    "keys and prompts cross the network unencrypted; give --tls-cert and --tls-key "
                    "unless something in front of this server has TLS",
                    address=address,
                )
        elif config.insecure:
            logger.warning(
                "INSECURE: there are no keys, and whoever reaches this address may use, load and "
                "unload every adapter",
                address=address,
            )
        else:
            raise ConfigError(
                f"{setting}: {address} is reached by others, and there are no keys; name a file of "
                "keys with --keys (`loramux keys new` makes one), or let everybody do everything "
                "with --insecure",
                field=setting,
            )
