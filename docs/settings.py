"""Prints docs/settings.md, made from the settings themselves; `make docs` keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, get_args

from pydantic import ByteSize

from lora_runtime.settings import Bytes, Entry, entries
from lora_runtime.training.config import TrainConfig, UnitConfig
from loramux.server.config import ServerConfig

HEAD = """# Settings

Written by `make docs` from the fields in `lora_runtime/config.py`,
`lora_runtime/training/config.py` and `server/config.py`; not edited by hand. A setting is a key of
a YAML file, a variable (`LORAMUX_` and its name in capitals) and a flag (`--` and its name with
hyphens). Later ones win: file, variables, flags. Names in brackets are those of other libraries and
are taken too. Bytes may have units: `1GiB`, `512MiB`, `2GB`.
"""
KINDS = [
    ("`loramux serve`", ServerConfig),
    ("`loramux train`: the run", TrainConfig),
    ("`loramux train`: each unit (adapter)", UnitConfig),
]


def page() -> Iterator[str]:
    """The lines of the page."""
    yield HEAD
    for title, kind in KINDS:
        yield f"## {title}\n"
        found = sorted(entries(kind).values(), key=lambda entry: entry.group)
        for group, members in groupby(found, key=lambda entry: entry.group):
            if group:
                yield f"### {group}\n"
            yield "| key | default | meaning |\n|---|---|---|"
            yield from map(_row, members)
            yield ""


def _row(entry: Entry) -> str:
    others = f" ({', '.join(f'`{name}`' for name in entry.also)})" if entry.also else ""
    text = entry.help.replace("|", "\\|") + _bound(entry)
    return f"| `{entry.key}`{others} | {_default(entry.default)} | {text} |"


def _bound(entry: Entry) -> str:
    if entry.most is None:
        return ""
    is_bytes = Bytes in (entry.hint, *get_args(entry.hint))
    most = ByteSize(entry.most).human_readable() if is_bytes else f"{entry.most:,}"
    return f" At most {most if entry.most < 1e12 or is_bytes else f'{entry.most:g}'}."


def _default(value: Any) -> str:
    if value is ...:
        return "required"
    if value is None or value in ((), {}, ""):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(*page(), sep="\n")
