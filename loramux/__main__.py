"""`python -m loramux` is `loramux`; given flags alone it serves."""

from __future__ import annotations

import sys

from loramux.server.cli import main

arguments = sys.argv[1:]
is_flag = (
    arguments[:1]
    and arguments[0].startswith("-")
    and arguments[0] not in ("-h", "--help", "--version")
)
main(["serve", *arguments] if is_flag else arguments or ["--help"])
