"""Adapters on web servers: `https://host/folder`, whose files are found by their names.

A client names the URL, and the server must not become its way into the network behind the server:
the name is resolved once, every address is checked, and the connection goes to a checked address.
Redirects are not followed, nothing is sent along, and no proxy is used.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from threading import Event, Timer

from lora_runtime.errors import AdapterSourceRefused
from loramux.server.adapters.sources.folders import refused
from loramux.server.adapters.sources.location import Location, split_host
from loramux.server.adapters.sources.transfer import CONNECT_S, Network, RemoteFile, TransferFailed

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may be others the next time."""
ABSENT = (404, 410)
MAX_DIGITS = 18
"""Of a file's length in bytes."""
_NAT64 = ip_network("64:ff9b::/96")
_OWN = tuple(map(ip_network, ("fec0::/10", "64:ff9b:1::/48", "::/96")))
"""Not public, though Python takes them for it: a site's own, its own NAT64, IPv4 in old IPv6."""

Address = IPv4Address | IPv6Address


class WebServers:
    """The Place of `https`."""

    def __init__(
        self, idle_s: float, networks: Collection[Network] = (), addresses: Collection[str] = ()
    ) -> None:
        """`networks` and `addresses` may be reached although they are not public."""
        self._idle_s = idle_s
        self._networks, self._addresses = tuple(networks), frozenset(addresses)

    def list_folder(self, location: Location, names: Sequence[str]) -> WebFolder:
        """Ask for the headers of each file; see `Place`."""
        found, version = [], []
        with closing(self._connect(location)) as connection:
            for name in names:
                response = _ask(connection, "HEAD", location, name)
                if response is None:
                    continue
                length = response.headers.get("Content-Length", "")
                if not length.isdecimal() or len(length) > MAX_DIGITS:
                    raise refused(location.text, f"does not say how large its {name} is")
                found.append(RemoteFile(name, int(length)))
                state = response.headers.get("ETag") or response.headers.get("Last-Modified")
                version.append(state)
        is_known = all(version) and bool(version)
        text = f"{location.text} {found} {version}" if is_known else ""
        return WebFolder(self, location, tuple(found), text)

    def open(self, location: Location, file: RemoteFile) -> WebReader:
        """Begin to read a file. Raises as `list_folder`."""
        connection = self._connect(location)
        try:
            response = _ask(connection, "GET", location, file.name)
            if response is None:
                raise TransferFailed(f"its {file.name} has just gone")
            if response.headers.get("Content-Length", str(file.num_bytes)) != str(file.num_bytes):
                raise TransferFailed(f"its {file.name} has another size than a moment ago")
        except BaseException:
            connection.close()
            raise
        return WebReader(connection, response)

    def _connect(self, location: Location) -> Connection:
        host, port = split_host(location.host)
        addresses = self.addresses(location, host, port)
        return Connection(addresses, host, port, self._idle_s, self._tls)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()  # it reads hundreds of certificates

    def addresses(self, location: Location, host: str, port: int) -> list[str]:
        """Resolve a host. Raises AdapterSourceRefused where any of its addresses is not allowed."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            raise TransferFailed("its host has no address") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for text in addresses:
            if not self._is_allowed(ip_address(text.partition("%")[0])):
                raise AdapterSourceRefused(
                    f"source {location.text[:200]!r} is on a host with an address that is not "
                    "public; the operator allows such by --adapter-source-networks",
                    field="source",
                )
        return addresses

    def _is_allowed(self, address: Address) -> bool:
        if str(address) in self._addresses or any(address in n for n in self._networks):
            return True
        inner = _embedded(address)
        is_own = any(inner in network for network in _OWN)
        return inner.is_global and not inner.is_multicast and not is_own


class Connection(http.client.HTTPSConnection):
    """Goes to one of the given addresses, whatever the name resolves to by now."""

    def __init__(
        self,
        addresses: Sequence[str],
        host: str,
        port: int,
        idle_s: float,
        tls: ssl.SSLContext,
    ) -> None:
        super().__init__(host, port, timeout=idle_s)
        self._addresses, self._tls = addresses, tls

    def connect(self) -> None:
        """Try the addresses in their order. Raises OSError."""
        failure: OSError | None = None
        for address in self._addresses:
            try:
                plain = socket.create_connection((address, self.port), timeout=CONNECT_S)
            except OSError as error:
                failure = error
                continue
            plain.settimeout(self.timeout)
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
            return
        raise failure or OSError("no address")

    @contextmanager
    def within_time(self) -> Iterator[None]:
        """Break the connection off if what is done here takes longer than may pass without a byte:
        the socket's own timeout begins anew with each. (A handshake is timed as a whole.)
        Raises TimeoutError, also where what came until then looks like a whole.
        """
        is_late = Event()

        def break_off(connected: socket.socket) -> None:
            is_late.set()
            _shut(connected)

        timer = Timer(self.timeout or CONNECT_S, break_off, [self.sock])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if is_late.is_set():
                raise TimeoutError from None


class WebFolder:
    """See `RemoteFolder`."""

    def __init__(
        self, servers: WebServers, location: Location, files: tuple[RemoteFile, ...], version: str
    ) -> None:
        self.files, self.version = files, version
        self._servers, self._location = servers, location

    def open(self, file: RemoteFile) -> WebReader:
        """See `RemoteFolder`."""
        return self._servers.open(self._location, file)


class WebReader:
    """See `Reader`."""

    def __init__(self, connection: Connection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response
        self._socket = connection.sock

    def read(self, num_bytes: int) -> bytes:
        """See `Reader`."""
        try:
            return self._response.read1(num_bytes)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TransferFailed(f"its server breaks off ({type(error).__name__})") from None

    def close(self) -> None:
        """See `Reader`."""
        if self._socket is not None:
            _shut(self._socket)
        self._connection.close()


def _shut(connected: socket.socket) -> None:
    """End what another thread reads or writes, beneath TLS."""
    with suppress(OSError):  # it is closed already
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _ask(
    connection: Connection, method: str, location: Location, name: str
) -> http.client.HTTPResponse | None:
    """The answer's head; None where there is no such file. Raises as `list_folder`."""
    response = None
    try:
        headers = {"Accept-Encoding": "identity", "User-Agent": "loramux", "Accept": "*/*"}
        if connection.sock is None:
            connection.connect()
        with connection.within_time():
            connection.request(method, f"/{location.path}/{name}", headers=headers)
            response = connection.getresponse()
            if method == "HEAD" or response.status in ABSENT:
                response.read()
    except ssl.SSLCertVerificationError:
        raise refused(location.text, "has a certificate that is not trusted here") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if response is not None:
            response.close()  # it holds the socket
        raise TransferFailed(f"its server does not answer ({type(error).__name__})") from None
    if response.status in ABSENT:
        return None
    if response.status != http.HTTPStatus.OK:
        raise failure(location, response.status)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise refused(location.text, f"sends its {name} encoded, though it was asked not to")
    return response


def failure(location: Location, status: int) -> AdapterSourceRefused | TransferFailed:
    """What an answer with such a status means."""
    if status in TRANSIENT:
        return TransferFailed(f"its server answers with status {status}")
    if status in (401, 403):
        return refused(location.text, f"may not be read by this server (status {status})")
    if 300 <= status < 400:
        return refused(location.text, f"leads elsewhere (status {status}); write where it lies")
    return refused(location.text, f"cannot be fetched: its server answers with status {status}")


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for on the way, if any; else itself."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
