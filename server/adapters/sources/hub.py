"""Adapters on a Hugging Face hub: `hf:org/name[/folder][@revision]`.

The hub's client knows the endpoint (HF_ENDPOINT), the token (HF_TOKEN or its file), proxies and
certificates. A revision is resolved to a commit once, and all files are of that commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from lora_runtime.errors import AdapterSourceRefused
from loramux.server.adapters.sources.folders import refused
from loramux.server.adapters.sources.https import WebServers, failure
from loramux.server.adapters.sources.location import Location
from loramux.server.adapters.sources.transfer import RemoteFile, TransferFailed

REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 3


class Hub:
    """The Place of `hf`."""

    def __init__(self, idle_s: float, web: WebServers) -> None:
        """`web` judges the hosts that the hub sends readers of large files to."""
        self._idle_s, self._web = idle_s, web

    def list_folder(self, location: Location, names: Sequence[str]) -> HubFolder:
        """Ask for the commit and its files; see `Place`."""
        repository, folder = _split(location.path)
        try:
            info = HfApi(endpoint=constants.ENDPOINT).model_info(
                repository,
                revision=location.revision or None,
                files_metadata=True,
                timeout=self._idle_s,
            )
        except Exception as error:
            raise _public(location, error) from None
        sizes = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        found = []
        for name in names:
            sibling = sizes.get(f"{folder}{name}")
            if sibling is not None and sibling.size is not None:
                sha256 = sibling.lfs.sha256 if sibling.lfs else ""
                found.append(RemoteFile(name, sibling.size, sha256))
        if not info.sha:
            raise refused(location.text, "has no commit on its hub")
        return HubFolder(location, info.sha, tuple(found), self._idle_s, self._web)


class HubFolder:
    """See `RemoteFolder`."""

    def __init__(
        self,
        location: Location,
        commit: str,
        files: tuple[RemoteFile, ...],
        idle_s: float,
        web: WebServers,
    ) -> None:
        self.files = files
        self.version = f"hf:{location.path}@{commit}"
        self._location, self._commit, self._idle_s, self._web = location, commit, idle_s, web

    def open(self, file: RemoteFile) -> HubReader:
        """Follow the hub's redirects by hand: its token stays with it, and where they lead must be
        public or the hub itself. See `RemoteFolder`.
        """
        repository, folder = _split(self._location.path)
        endpoint = constants.ENDPOINT
        url = hf_hub_url(
            repository, f"{folder}{file.name}", revision=self._commit, endpoint=endpoint
        )
        for _ in range(1 + MAX_REDIRECTS):
            is_hub = urlsplit(url)[:2] == urlsplit(endpoint)[:2]
            if not is_hub:
                self._check(url)
            held = ExitStack()
            try:
                response = held.enter_context(
                    get_session().stream(
                        "GET",
                        url,
                        headers=_headers(with_token=is_hub),
                        follow_redirects=False,
                        timeout=self._idle_s,
                    )
                )
            except Exception as error:
                raise _public(self._location, error) from None
            if response.status_code == 200:
                return HubReader(response, held)
            held.close()
            if response.status_code not in REDIRECTS:
                raise failure(self._location, response.status_code)
            url = self._target(url, response.headers.get("Location", ""))
        raise refused(self._location.text, "leads from place to place on its hub")

    def _target(self, url: str, location: str) -> str:
        """Where a redirect leads; its port is one."""
        try:
            target = urljoin(url, location)
            _ = urlsplit(target).port
        except ValueError:
            raise refused(self._location.text, "is sent nowhere by its hub") from None
        return target

    def _check(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username:
            raise refused(self._location.text, "is sent elsewhere by its hub, and not by https")
        self._web.addresses(self._location, parts.hostname, parts.port or 443)


class HubReader:
    """See `Reader`."""

    def __init__(self, response: Any, held: ExitStack) -> None:
        self._held = held
        self._parts = response.iter_raw()
        self._rest = b""

    def read(self, num_bytes: int) -> bytes:
        """See `Reader`."""
        try:
            data = self._rest or next(self._parts, b"")
        except Exception as error:
            raise TransferFailed(f"its hub breaks off ({type(error).__name__})") from None
        self._rest = data[num_bytes:]
        return data[:num_bytes]

    def close(self) -> None:
        """See `Reader`."""
        try:
            self._held.close()
        except Exception:  # another thread reads from it; it ends at the latest when that is idle
            return


def _split(path: str) -> tuple[str, str]:
    """From `org/name/folder` to the repository and `folder/`."""
    org, name, *folder = path.split("/")
    return f"{org}/{name}", "".join(f"{part}/" for part in folder)


def _headers(*, with_token: bool) -> dict[str, str]:
    headers: dict[str, str] = build_hf_headers(token=None if with_token else False)
    return {**headers, "Accept-Encoding": "identity"}


def _public(location: Location, error: Exception) -> AdapterSourceRefused | TransferFailed:
    """What may be told of an error of the hub's client; its own text may hold signed URLs."""
    match error:
        case GatedRepoError():
            return refused(location.text, "is gated; this server's token gives no access to it")
        case RepositoryNotFoundError():
            return refused(location.text, "is not on the hub, or not for this server's token")
        case RevisionNotFoundError():
            return refused(location.text, "is on the hub, but its revision is not")
        case OfflineModeIsEnabled():
            return refused(location.text, "cannot be fetched: HF_HUB_OFFLINE is set on this server")
        case HFValidationError():
            return refused(location.text, "is no name of a repository")
        case HfHubHTTPError():
            return failure(location, error.response.status_code)
    return TransferFailed(f"its hub does not answer ({type(error).__name__})")
