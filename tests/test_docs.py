"""The pages of docs/ say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fork_server import run_program

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
TOP = ("lora_runtime", "server", "protos", "tests", "bench", "docs", "examples", "deploy")


def test_the_page_of_settings_is_what_make_docs_writes():
    made = run_program(["docs/settings.py"], timeout=60, env={})
    assert made.returncode == 0, made.stderr
    assert (REPO / "docs/settings.md").read_text() == made.stdout, "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = [path for path in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if path.startswith(TOP)]
    assert [path for path in paths if not (REPO / path).exists()] == []
