"""Texts with a label each, from a CSV file: the data of the training benchmarks."""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which file and columns, the base, and the seed of the order."""
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="category")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)


def read(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(text, label) of all rows in random order; labels with spaces for underscores."""
    with args.data.open(newline="", encoding="utf-8") as file:
        rows = [(row[args.text].strip(), row[args.label]) for row in csv.DictReader(file)]
    random.Random(args.seed).shuffle(rows)
    return [(text, label.replace("_", " ")) for text, label in rows]
