"""What an installation puts beside other people's packages, and that it gets along with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import NAMES, REPO

COMPILED = {".so", ".pyc"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder of what a wheel has, but for the compiled kernels, as setuptools makes it."""
    folder = tmp_path_factory.mktemp("installed")
    setup = [sys.executable, "-c", "import setuptools; setuptools.setup()"]
    facts, build = ["egg_info", "--egg-base", folder.parent], ["build_py", "--build-lib", folder]
    subprocess.run([*setup, "--quiet", *facts, *build], cwd=REPO, check=True, capture_output=True)
    return folder


def files(folder: Path) -> set[Path]:
    """The files of the product below a folder, links followed."""
    found = {
        Path(parent, name).relative_to(folder)
        for package in NAMES
        for parent, _, names in os.walk(folder / package, followlinks=True)
        for name in names
    }
    return {p for p in found if p.suffix not in COMPILED and "csrc" not in p.parts}


def test_a_wheel_has_two_names_and_every_file_of_the_product(installed):
    assert {path.name for path in installed.iterdir()} == set(NAMES)
    assert files(installed) == files(REPO)
    assert Path("loramux/server/page/static/index.html") in files(installed)
    assert Path("loramux/v1/generation_pb2.pyi") in files(installed)


@pytest.mark.parametrize("command", [["app.py"], ["-m", "loramux", "serve", "--help"]])
def test_a_program_may_have_a_server_and_protos_of_its_own(installed, tmp_path, command):
    (tmp_path / "protos").mkdir()
    for name in ("server.py", "client.py", "protos/__init__.py"):
        (tmp_path / name).write_text(f"raise SystemExit('{name} is not loramux')")
    (tmp_path / "app.py").write_text(
        "import loramux\n"
        "from loramux import AsyncClient, Client, tls_credentials\n"
        "from loramux.v1 import generation_pb2\n"
        "print('Usage', loramux.__file__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage" in done.stdout
