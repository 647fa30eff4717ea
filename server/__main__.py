"""`python -m server` serves, with the options of `loramux serve`."""

from __future__ import annotations

import sys

from server.cli import main

main(["serve", *sys.argv[1:]])
