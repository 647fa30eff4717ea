"""Files that were written for releases before mean the same: `read.json` is what those read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from lora_runtime.training.config import TrainConfig
from server.config import load_config

FOLDER = Path(__file__).parents[1] / "older_files"
READ = json.loads((FOLDER / "read.json").read_text())


@pytest.mark.parametrize("name", READ)
def test_an_older_file_means_what_it_meant(name):
    read = load_config if name == "serve.yaml" else TrainConfig.from_yaml
    assert json.loads(json.dumps(asdict(read(FOLDER / name)), default=str)) == READ[name]
