"""What of a foreign chat template is certain to be too much, seen before it is compiled.

jinja2 computes constant expressions while it compiles, so this comes first. Everything else is
left to the limits of the process that renders.
"""

from __future__ import annotations

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from lora_runtime.errors import AdapterRefused

MAX_REPEATED = 1 << 20
"""Characters or items that one constant repetition may give."""


class _Generation(Extension):
    """The tag {% generation %}, which transformers adds to mark what an assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Take the tag away and keep its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_PARSER = jinja2.Environment(extensions=[_Generation, loopcontrols])


def check_template(template: str, field: str) -> None:
    """Refuse a power, and a constant repeated beyond MAX_REPEATED.

    Raises AdapterRefused naming `field`. A template that cannot be parsed is left to its trial,
    which says why.
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
    """Items that a product of a constant text or list and a constant number has, else 0."""
    for whole, times in ((node.left, node.right), (node.right, node.left)):
        if isinstance(times, nodes.Const) and type(times.value) is int:
            if isinstance(whole, nodes.Const) and isinstance(whole.value, str):
                return len(whole.value) * times.value
            if isinstance(whole, nodes.List | nodes.Tuple):
                return len(whole.items) * times.value
    return 0
