"""Files that were written for releases before mean the same: `read.json` is what those read.
Settings that have come since do not have to stand there.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from lora_runtime.training.config import TrainConfig
from loramux.server.config import load_config

FOLDER = Path(__file__).parents[1] / "older_files"
READ = json.loads((FOLDER / "read.json").read_text())


@pytest.mark.parametrize("name", READ)
def test_an_older_file_means_what_it_meant(name):
    read = load_config if name == "serve.yaml" else TrainConfig.from_yaml
    meant = json.loads(json.dumps(asdict(read(FOLDER / name)), default=str))
    assert known(meant, READ[name]) == READ[name]


def known(meant, before):
    """The part of what a file means now that it meant before."""
    if isinstance(meant, list) and isinstance(before, list) and len(meant) == len(before):
        return [known(*pair) for pair in zip(meant, before, strict=True)]
    if not (isinstance(meant, dict) and isinstance(before, dict)):
        return meant
    return {key: known(value, before[key]) for key, value in meant.items() if key in before}
