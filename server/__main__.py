"""`python -m server` is `loramux`; without a command it serves."""

from __future__ import annotations

import sys

from server.cli import main

arguments = sys.argv[1:]
main(arguments if arguments[:1] and not arguments[0].startswith("-") else ["serve", *arguments])
