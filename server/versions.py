"""The versions of the packages that decide how a server behaves."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("loramux", "torch", "transformers", "bitsandbytes", "safetensors", "grpcio", "protobuf")


def installed_versions() -> dict[str, str]:
    """Return package → version, for those of `PACKAGES` that are installed."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
