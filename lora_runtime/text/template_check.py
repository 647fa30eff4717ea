"""Refuses a foreign chat template whose constants alone would take too long or too much memory.

jinja2 computes constant expressions while it compiles a template, so they are looked at before
that. Everything else is bounded by the limits of the process that renders.
"""

from __future__ import annotations

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from lora_runtime.errors import AdapterRefused

MAX_REPEATED = 1 << 20
"""Characters or items that the product of two constants may have."""


class _Generation(Extension):
    """The tag {% generation %}, which transformers adds to mark what an assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse the tag to the nodes of its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_PARSER = jinja2.Environment(extensions=[_Generation, loopcontrols])


def check_template(template: str, field: str) -> None:
    """Refuse a power, and a constant text or list that is repeated to more than MAX_REPEATED.

    Raises AdapterRefused naming `field`. A template that cannot be parsed passes: it is refused
    when it is tried, with jinja2's own message.
    """
    try:
        tree = _PARSER.parse(template)
    except (jinja2.TemplateError, RecursionError):
        return
    for node in tree.find_all((nodes.Pow, nodes.Mul)):
        if isinstance(node, nodes.Pow):
            raise AdapterRefused(
                f"the chat template in {field} raises a number to a power (line {node.lineno}), "
                "which has no bound; write the number itself",
                field=field,
            )
        if _num_repeated(node) > MAX_REPEATED:
            raise AdapterRefused(
                f"the chat template in {field} repeats a constant more than {MAX_REPEATED} times "
                f"(line {node.lineno})",
                field=field,
            )


def _num_repeated(node: nodes.BinExpr) -> int:
    """Length of the product of a constant text or list and a constant number; 0 for others."""
    for whole, times in ((node.left, node.right), (node.right, node.left)):
        if isinstance(times, nodes.Const) and type(times.value) is int:
            if isinstance(whole, nodes.Const) and isinstance(whole.value, str):
                return len(whole.value) * times.value
            if isinstance(whole, nodes.List | nodes.Tuple):
                return len(whole.items) * times.value
    return 0
