"""What the changes to transformers' model rely on, checked with an error that names the version."""

from __future__ import annotations

from collections.abc import Iterable

import transformers

from lora_runtime.errors import BaseRefused

TESTED_VERSIONS = "5.17 to 5.23"
"""Versions of transformers whose modules the tests have seen."""


def require_attributes(holder: object, names: Iterable[str], needed_for: str) -> None:
    """Raise BaseRefused if `holder`, a module or table of transformers, lacks one of `names`.

    The message names transformers' version, what is missing and what `needed_for` says of it.
    """
    missing = [name for name in names if not hasattr(holder, name)]
    if missing:
        raise refused_version(type(holder).__name__, missing, needed_for)


def refused_version(owner: str, missing: Iterable[str], needed_for: str) -> BaseRefused:
    """The error for an `owner` of transformers that lacks `missing`."""
    return BaseRefused(
        f"{owner} of transformers {transformers.__version__} has no {', '.join(missing)}, which "
        f"{needed_for}; install a version from {TESTED_VERSIONS}"
    )
