"""Text that somebody else wrote, on its way to a terminal: it is shown, and never obeyed.

Names, error messages, settings of an adapter and what a model says may hold escape sequences, which
move the cursor, change the window's title or answer in the user's place. Everything that people
read is printed through this module.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

LAYOUT = "\n\t"
"""Control characters that text is made of."""
BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They show characters in another order than they have, across what stands around them."""


def shown(text: str) -> str:
    r"""Return the text with control characters written as Python does, `\x1b` for an escape.

    Those are Unicode's category Cc but for line break and tab, halves of surrogate pairs (Cs), and
    what overrides the direction of text.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    is_control = unicodedata.category(character) in ("Cc", "Cs") or character in BIDIRECTIONAL
    if character in LAYOUT or not is_control:
        return character
    return character.encode("unicode_escape").decode()


class Terminal(Console):
    """rich's console, whose own control sequences are the only ones that it writes."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of what is printed, or is in a table, before its width is measured."""
        return super().render_str(shown(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does; the text of every segment as `shown`."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else shown(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


def has_room(console: Console, table: Table) -> bool:
    """Tell whether a table fits a terminal. A file or pipe has any width: `console` gets it."""
    needed = Measurement.get(console, console.options.update(max_width=1 << 16), table).maximum
    if not console.is_terminal:
        console.width = max(console.width, needed)
    return needed <= console.width


def echo(text: str, *, is_error: bool = False) -> None:
    """Write a line on standard output, or on standard error."""
    stream = sys.stderr if is_error else sys.stdout
    stream.write(shown(text) + "\n")
    stream.flush()


def write(text: str) -> None:
    """Write output that may be redirected: byte for byte into a file or pipe, as `shown` else."""
    sys.stdout.write(shown(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
