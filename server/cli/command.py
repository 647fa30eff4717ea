"""What all commands have in common: a flag is given once, and the environment holds no mistake."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import typer

from lora_runtime.settings import check_meaning
from server.cli.settings import NAMED_FLAGS, OTHER_FLAGS, VARIABLES
from server.config import check_environment


class Command(typer.core.TyperCommand):
    """A command that refuses what would be ignored in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; of a flag with one value given twice, the last would win."""
        _check_meanings(args)
        args = list(map(_canonical, args))
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, count in Counter(order).items():
            is_list = parameter.multiple or parameter.nargs == -1
            if count > 1 and not is_list and parameter.param_type_name == "option":
                raise typer.BadParameter(
                    f"{parameter.opts[0]} is given {count} times and holds one value; give it once"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, unless a variable LORAMUX_… is none of the settings."""
        check_environment(VARIABLES)
        return super().invoke(ctx)


def _check_meanings(args: list[str]) -> None:
    for argument, following in pairwise([*args, ""]):
        flag, separator, value = argument.partition("=")
        if flag in NAMED_FLAGS:
            name, entry = NAMED_FLAGS[flag]
            check_meaning(entry, name, value if separator else following, flag)


def _canonical(argument: str) -> str:
    """`--lr=1e-4` as `--learning-rate=1e-4`."""
    flag, separator, value = argument.partition("=")
    return f"{OTHER_FLAGS.get(flag, flag)}{separator}{value}"
