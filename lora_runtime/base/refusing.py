"""What a base's own code and files raise, as a refusal of the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lora_runtime.errors import BaseRefused
from lora_runtime.shortages import is_shortage


@contextmanager
def refusing(describe: Callable[[Exception], str]) -> Iterator[None]:
    """Turn whatever is raised inside into BaseRefused with what `describe` says of it, but a
    shortage.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, BaseRefused) or is_shortage(error):
            raise
        raise BaseRefused(describe(error)) from error


def shown(error: Exception) -> str:
    """An error's type and its first words."""
    return f"{type(error).__name__}: {str(error)[:300]}"
