"""TLS of both ports: one certificate, read again when its files change; clients' certificates."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from lora_runtime.errors import ConfigError
from lora_runtime.plain_file import read_plain_file

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the server's certificate with what leads to its root, its key, and the roots of
    clients' certificates if they must have one.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class _Identity:
    """What the files held at one time."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class Tls:
    """What new connections are met with; those that are open keep what they began with."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises ConfigError naming the setting of the file that cannot be used."""
        self._files = files
        self._identity = _read(files)
        self._given = self._identity
        self._problem = ""

    def reload(self) -> None:
        """Read the files if they have changed; what cannot be used changes nothing, and the log
        says why.
        """
        try:
            found = _contents(self._files)
            held = self._identity
            if found != (held.certificate, held.key, held.client_ca):
                self._identity = _read(self._files)
                logger.info("certificate read again", file=str(self._files.certificate))
            self._problem = ""
        except ConfigError as error:
            if error.message != self._problem:
                logger.error("the certificate is as before", error=error.message)
            self._problem = error.message

    def http_context(self) -> ssl.SSLContext:
        """Return the context of the HTTP port. Each handshake goes on with the latest files'.

        A client's certificate is verified and may be missing: probes have none. The gate asks for
        it everywhere else.
        """
        context = _context(self._files)

        def take_latest(connection: Any, *_: Any) -> None:
            connection.context = self._identity.context

        context.sni_callback = take_latest
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return the credentials of the gRPC port. Each handshake takes the latest files; clients
        must have a certificate if there are roots for them.
        """
        self._given = self._identity

        def fetch() -> Any:
            latest = self._identity
            if latest is self._given:
                return None
            self._given = latest
            return _configuration(latest)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._given), fetch, self._files.client_ca is not None
        )


def certificate_names(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the common name and the alternative names of a client's certificate, as
    `SSLSocket.getpeercert` gives it.
    """
    return tuple(_names(certificate)) if certificate else ()


def _names(certificate: Mapping[str, Any]) -> Iterator[str]:
    for part in certificate.get("subject", ()):
        for kind, value in part:
            if kind == "commonName":
                yield value
    for _, value in certificate.get("subjectAltName", ()):
        yield value


def _configuration(identity: _Identity) -> Any:
    return grpc.ssl_server_certificate_configuration(
        [(identity.key, identity.certificate)], root_certificates=identity.client_ca
    )


def _read(files: TlsFiles) -> _Identity:
    """Read the files; the context is made of the very bytes that are kept."""
    found = _contents(files)
    context = _context(files)
    if _contents(files) != found:
        raise ConfigError("tls_cert: the files change while they are read", field="tls_cert")
    return _Identity(*found, context)


def _contents(files: TlsFiles) -> tuple[bytes, bytes, bytes | None]:
    client_ca = files.client_ca
    return (
        _bytes(files.certificate, "tls_cert"),
        _bytes(files.key, "tls_key"),
        None if client_ca is None else _bytes(client_ca, "tls_client_ca"),
    )


def _bytes(file: Path, setting: str) -> bytes:
    try:
        return read_plain_file(file)
    except OSError as error:
        raise ConfigError(
            f"{setting}: {file} cannot be read: {error.strerror or error}", field=setting
        ) from None


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tls_cert: {files.certificate} and {files.key} are no certificate and its key: "
            f"{getattr(error, 'reason', None) or error}",
            field="tls_cert",
        ) from None
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except OSError as error:
            raise ConfigError(
                f"tls_client_ca: {files.client_ca} holds no certificates: "
                f"{getattr(error, 'reason', None) or error}",
                field="tls_client_ca",
            ) from None
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _no_password() -> str:
    """Without this OpenSSL would ask the terminal."""
    raise ValueError("the key is encrypted; decrypt it")
