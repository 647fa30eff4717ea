"""Adapters in object stores: `s3://bucket/folder` by s3fs, `gs://bucket/folder` by gcsfs.

Both find credentials and endpoint where their own tools do: AWS_* and ~/.aws,
GOOGLE_APPLICATION_CREDENTIALS and the machine's account.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_runtime.errors import AdapterSourceRefused
from loramux.server.adapters.sources.folders import refused
from loramux.server.adapters.sources.location import Location
from loramux.server.adapters.sources.transfer import CONNECT_S, RemoteFile, TransferFailed

VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash")


class Buckets:
    """The Place of one scheme of fsspec's."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s

    def list_folder(self, location: Location, names: Sequence[str]) -> BucketFolder:
        """Ask for each file; see `Place`."""
        store = self._store(location)
        found, version = [], []
        for name in names:
            try:
                info = store.info(f"{location.path}/{name}", timeout=self._idle_s)
            except FileNotFoundError:
                continue
            except Exception as error:
                raise _public(location, error) from None
            if info.get("type") != "file" or not isinstance(info.get("size"), int):
                continue
            found.append(RemoteFile(name, info["size"]))
            version.append(next((str(info[key]) for key in VERSION_KEYS if info.get(key)), ""))
        is_known = all(version) and bool(version)
        state = f"{location.text} {found} {version}" if is_known else ""
        return BucketFolder(store, location, tuple(found), state, self._idle_s)

    def _store(self, location: Location) -> Any:
        """Open the store, by the extra `cloud`. Import and first use take a second."""
        try:
            if location.scheme == "s3":
                from s3fs import S3FileSystem

                limits = {"connect_timeout": CONNECT_S, "read_timeout": self._idle_s}
                return S3FileSystem(config_kwargs=limits, use_listings_cache=False)
            from gcsfs import GCSFileSystem

            return GCSFileSystem(use_listings_cache=False)
        except ImportError:
            raise refused(
                location.text,
                "needs the extra `cloud` on this server: pip install 'loramux[cloud]'",
            ) from None
        except Exception as error:
            raise _public(location, error) from None


class BucketFolder:
    """See `RemoteFolder`."""

    def __init__(
        self,
        store: Any,
        location: Location,
        files: tuple[RemoteFile, ...],
        version: str,
        idle_s: float,
    ) -> None:
        self.files, self.version = files, version
        self._store, self._location, self._idle_s = store, location, idle_s

    def open(self, file: RemoteFile) -> BucketReader:
        """See `RemoteFolder`."""
        return BucketReader(self._store, self._location, file, self._idle_s)


class BucketReader:
    """See `Reader`. Each part is a request of its own."""

    def __init__(self, store: Any, location: Location, file: RemoteFile, idle_s: float) -> None:
        self._store, self._location, self._file, self._idle_s = store, location, file, idle_s
        self._num_read = 0

    def read(self, num_bytes: int) -> bytes:
        """See `Reader`."""
        path, start = f"{self._location.path}/{self._file.name}", self._num_read
        end = min(start + num_bytes, self._file.num_bytes)
        try:
            data: bytes = self._store.cat_file(path, start=start, end=end, timeout=self._idle_s)
        except FileNotFoundError:
            raise TransferFailed(f"its {self._file.name} has just gone") from None
        except Exception as error:
            raise _public(self._location, error) from None
        self._num_read += len(data)
        return data

    def close(self) -> None:
        """See `Reader`: between two parts nothing is open."""


def _public(location: Location, error: Exception) -> AdapterSourceRefused | TransferFailed:
    """What may be told of an error of the stores' clients; their own text may hold secrets."""
    name = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return refused(location.text, "is not there")
    if isinstance(error, PermissionError) or "Credential" in name or "Forbidden" in str(error):
        return refused(
            location.text,
            f"may not be read by this server ({name}); its credentials need to get objects and to "
            "list the bucket",
        )
    return TransferFailed(f"its store does not answer ({name})")
