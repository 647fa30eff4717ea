"""Nothing that somebody else wrote acts on a terminal, whichever way it is printed."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lora_runtime.terminal import BIDIRECTIONAL, Terminal, echo, shown, write

REPO = Path(__file__).parents[2]
HOSTILE = "a\x1b]0;pwned\x07\x1b[2J\x9b31m\x08\x7f\r\x00\u202eb"
OWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What rich itself writes: colours, and the cursor of its bars."""


def controls(text: str) -> list[str]:
    """Control characters in a text that are not rich's own."""
    rest = OWN.sub("", text).replace("\r", "")
    return [c for c in rest if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160
            or c in BIDIRECTIONAL]  # fmt: skip


def test_every_control_character_is_written_out_and_text_stays():
    text = "é 狐狸 🦊\u200d👩 \u3000\xa0\tx\n"
    assert shown(text) == text
    for number in (*range(9), *range(11, 32), *range(127, 160), 0xD800, 0x202E):
        character = chr(number)
        assert shown(f"a{character}b") == f"a{character.encode('unicode_escape').decode()}b"


@pytest.mark.parametrize("force", [True, False])
def test_a_terminal_shows_hostile_text_in_every_place(force):
    file = io.StringIO()
    terminal = Terminal(file=file, force_terminal=force, width=200, markup=False)
    table = Table("x", title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, style="red"))
    terminal.print(table)
    terminal.print(HOSTILE, style="red")
    bars = Progress(TextColumn("{task.description}", markup=False), console=terminal)
    with bars:
        bars.add_task(HOSTILE)
    with terminal.status(HOSTILE):
        pass
    text = file.getvalue()
    assert text.count("\\x1b]0;pwned") >= 4 and "\x1b]" not in text
    assert not controls(text.replace("\x1b[2J", "!!"))
    assert "\x1b[2J" not in text


def test_lines_and_output(capsys, monkeypatch):
    echo(HOSTILE)
    echo(HOSTILE, is_error=True)
    out, err = capsys.readouterr()
    assert out == err == shown(HOSTILE) + "\n"
    write(HOSTILE)
    assert capsys.readouterr().out == HOSTILE, "a file or pipe gets what was said"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write(HOSTILE)
    assert capsys.readouterr().out == shown(HOSTILE)


def test_people_are_shown_text_by_this_module_only():
    forbidden = re.compile(r"typer\.echo|click\.echo|(?<![.\w])Console\(|(?<![.\w])print\(")
    for path in sorted([*(REPO / "server").rglob("*.py"), *(REPO / "lora_runtime").rglob("*.py")]):
        if path.name != "terminal.py":
            found = forbidden.search(path.read_text())
            assert not found, f"{path}: {found and found.group()}"
