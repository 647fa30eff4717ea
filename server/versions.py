"""Which packages a server runs on."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("loramux", "torch", "transformers", "bitsandbytes", "safetensors", "grpcio", "protobuf")


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide how a server behaves."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
