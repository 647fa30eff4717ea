"""Places that hold adapters, on this machine: web servers, a hub, object stores; all over sockets.

What they answer can be bent: an entry of `bent` takes the place of the next answer for its path.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Answer = Callable[["Handler"], None]


def adapter(content: str = "a", **facts) -> dict[str, bytes]:
    """An adapter's files for a ScriptedEngine."""
    return {CONFIG: json.dumps(facts).encode(), WEIGHTS: content.encode()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PlaceServer

    def do_GET(self) -> None:
        place, path = self.server.place, unquote(urlsplit(self.path).path)
        place.seen.append((self.command, self.path, dict(self.headers)))
        bent = place.bent.get((self.command, path)) or place.bent.get(path)
        if bent:
            bent.pop(0)(self)
        else:
            place.answer(self, path)

    do_HEAD = do_POST = do_GET

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **named}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class PlaceServer(ThreadingHTTPServer):
    daemon_threads = True
    place: Place

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that goes away is what many tests are about


class Place:
    """A web server with files by path."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.bent: dict[str | tuple[str, str], list[Answer]] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.held = threading.Event()
        """Lets go of what `hang` holds."""
        self._server = PlaceServer(("127.0.0.1", 0), Handler)
        self._server.place = self
        if tls is not None:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.held.set()
        self._server.shutdown()
        self._server.server_close()

    def put(self, folder: str, files: dict[str, bytes]) -> str:
        self.files |= {f"/{folder}/{name}": content for name, content in files.items()}
        return f"{self.url}/{folder}"

    def answer(self, handler: Handler, path: str) -> None:
        content = self.files.get(path)
        if content is None:
            handler.send(b"", 404)
        else:
            handler.send(content, ETag=hashlib.sha256(content).hexdigest())

    # What takes the place of an answer.

    def hang(self, num_bytes: int = 0) -> Answer:
        """Send the head and so many bytes, then nothing until `held` is set."""

        def answer(handler: Handler) -> None:
            content = self.files[unquote(urlsplit(handler.path).path)]
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[:num_bytes])
            self.held.wait(20)
            handler.close_connection = True

        return answer

    def hang_at_once(self, handler: Handler) -> None:
        self.held.wait(20)
        handler.close_connection = True


def status(number: int, **headers: str) -> Answer:
    return lambda handler: handler.send(b"no", number, **headers)


def lies(length: int, content: bytes) -> Answer:
    """Announce so many bytes, send others, and close."""

    def answer(handler: Handler) -> None:
        handler.send(content, Content_Length=str(length))
        handler.close_connection = True

    return answer


def breaks_off(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


class Hub(Place):
    """As much of huggingface.co's HTTP as a download needs: revisions, commits, large files that
    lie at another path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        """`org/name@branch` → commit."""
        self.elsewhere = ""
        """Where large files are said to lie, in place of this server."""

    def push(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        text = json.dumps({name: content.hex() for name, content in files.items()})
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[f"{repository}@{commit}"] = files
        self.branches[f"{repository}@{branch}"] = commit
        return commit

    def answer(self, handler: Handler, path: str) -> None:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._describe(handler, "/".join(parts[2:4]), "/".join(parts[5:]) or "main")
        elif parts[0] == "large":
            handler.send(self.files[path])
        else:
            org, name, _, commit, *file = parts
            self._resolve(handler, f"{org}/{name}@{commit}", "/".join(file))

    def _describe(self, handler: Handler, repository: str, revision: str) -> None:
        commit = self.branches.get(f"{repository}@{revision}", revision)
        files = self.commits.get(f"{repository}@{commit}")
        if files is None:
            is_known = any(key.startswith(f"{repository}@") for key in self.branches)
            code = "RevisionNotFound" if is_known else "RepoNotFound"
            handler.send(b"{}", 404, **{"X-Error-Code": code})
            return
        siblings = [
            {"rfilename": name, "size": len(content), "blobId": "0" * 40}
            | ({"lfs": _lfs(content)} if name.endswith(".safetensors") else {})
            for name, content in files.items()
        ]
        found = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
        handler.send(json.dumps(found).encode(), Content_Type="application/json")

    def _resolve(self, handler: Handler, commit: str, file: str) -> None:
        content = self.commits.get(commit, {}).get(file)
        if content is None:
            handler.send(b"", 404, **{"X-Error-Code": "EntryNotFound"})
        elif file.endswith(".safetensors"):
            path = f"/large/{hashlib.sha256(content).hexdigest()}"
            self.files[path] = content
            handler.send(b"", 302, Location=self.elsewhere or path)
        else:
            handler.send(content)


def _lfs(content: bytes) -> dict[str, object]:
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "pointerSize": 134,
    }


class GoogleStorage(Place):
    """As much of Google's JSON interface as gcsfs reads objects by."""

    def answer(self, handler: Handler, path: str) -> None:
        parts = path.strip("/").split("/")
        key = "/".join(parts[parts.index("o") + 1 :]) if "o" in parts else ""
        bucket = parts[parts.index("b") + 1] if "b" in parts else ""
        content = self.files.get(f"/{bucket}/{key}")
        if content is None and not key:
            handler.send(b'{"kind": "storage#objects"}', Content_Type="application/json")
        elif content is None:
            handler.send(b'{"error": {"code": 404, "message": "Not Found"}}', 404)
        elif "alt=media" in handler.path:
            first, _, last = handler.headers.get("Range", "bytes=0-")[6:].partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            handler.send(part, 206 if "Range" in handler.headers else 200)
        else:
            facts = {
                "name": key,
                "bucket": bucket,
                "size": str(len(content)),
                "generation": str(int(hashlib.sha256(content).hexdigest()[:8], 16)),
                "updated": "2026-01-01T00:00:00Z",
                "timeCreated": "2026-01-01T00:00:00Z",
            }
            handler.send(json.dumps(facts).encode(), Content_Type="application/json")


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's context for 127.0.0.1 and localhost, and the file with who vouches for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "places")])
    now = datetime.datetime.now(datetime.UTC)
    names = [
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.DNSName("localhost"),
        x509.DNSName("adapters.example.com"),
    ]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = folder / "place.key"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public = folder / "place.pem"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return context, public


@contextmanager
def s3(monkeypatch) -> Iterator[object]:
    """A real S3-compatible server with the bucket `adapters`; a client of it."""
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key-of-the-server",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-server",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket="adapters")
        yield client
    finally:
        S3FileSystem.clear_instance_cache()
        server.stop()
