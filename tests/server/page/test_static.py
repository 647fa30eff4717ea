"""What the page's files may not hold, and that they fit together. A browser is not needed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loramux.server.page.routes import CONTENT_TYPES, read_files
from tests.test_architecture import REPO

STATIC = REPO / "server" / "page" / "static"
FILES = {path.name: path.read_text(encoding="utf-8") for path in STATIC.iterdir()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
CODE = "\n".join(SCRIPTS.values())
PARSES_TEXT = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|DOMParser|setHTML|javascript:"
    r"|createContextualFragment|\beval\b|\bFunction\(|set(Timeout|Interval)\(\s*[\"'`]"
    r"|\bon[a-z]+\s*=[^=>]|[\"']on[a-z]+[\"']\s*[,:]"
)
"""What makes markup or code of a text."""


class Markup(HTMLParser):
    """Every element of index.html: its tag and attributes, and the texts of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self.feed(FILES["index.html"])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] in ("script", "style"):
            self.inline.append(data.strip())


MARKUP = Markup()
IDS = [attributes["id"] for _, attributes in MARKUP.elements if "id" in attributes]


def test_every_file_is_served():
    assert read_files().keys() == FILES.keys()
    assert {Path(name).suffix for name in FILES} <= CONTENT_TYPES.keys()


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_markup_or_code_of_a_text(name):
    assert [line for line in SCRIPTS[name].splitlines() if PARSES_TEXT.search(line)] == []


@pytest.mark.parametrize(
    "line",
    [
        "cell.innerHTML = adapter.name",
        'setTimeout("go()", 5)',
        "element.onclick = go",
        "make('a', { 'onclick': name })",
        "element.setAttribute('onclick', name)",
        "new Function(text)",
    ],
)
def test_the_search_for_such_a_script_can_fail(line):
    assert PARSES_TEXT.search(line)


def test_the_markup_has_no_script_style_or_handler_of_its_own():
    assert not any(MARKUP.inline)
    names = {name for _, attributes in MARKUP.elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name == "style"]


def test_nothing_comes_from_elsewhere():
    links = [a[name] for _, a in MARKUP.elements for name in ("src", "href") if name in a]
    for link in links:
        assert link.removeprefix("page/") in FILES or link.removeprefix("#") in IDS, link
    imports = re.findall(r"from \"([^\"]+)\"", CODE)
    assert imports and all(name.removeprefix("./") in FILES for name in imports)
    addresses = re.findall(r"(?:https?:)?//[\w.]+", "".join(re.findall(r"[\"'`].*[\"'`]", CODE)))
    assert set(addresses) == {"http://www.w3.org"}, "the name of SVG"
    assert "url(" not in FILES["page.css"] and "@import" not in FILES["page.css"]


def test_scripts_and_markup_name_the_same_elements():
    used = set(re.findall(r"byId\(\"([\w-]+)\"\)", CODE))
    assert len(IDS) == len(set(IDS)) and used <= set(IDS)
    assert CODE.count("byId(") == len(re.findall(r"byId\(\"[\w-]+\"\)", CODE)) + 1, "and its own"
    references = [
        word
        for _, attributes in MARKUP.elements
        for name in ("aria-labelledby", "aria-describedby", "aria-controls", "list", "for")
        for word in (attributes.get(name) or "").split()
    ]
    links = [(a.get("href") or "").removeprefix("#") for _, a in MARKUP.elements]
    assert set(references) <= set(IDS)
    styled = set(re.findall(r"#([\w-]+) {", FILES["page.css"]))
    assert set(IDS) <= used | set(references) | set(links) | styled, "an id that nobody uses"


def colours() -> list[dict[str, str]]:
    """The named colours of the light scheme and of the dark one."""
    light, dark = FILES["page.css"].split("@media (prefers-color-scheme: dark)", 1)
    found = [dict(re.findall(r"--([\w-]+): (#\w+);", text)) for text in (light, dark)]
    assert found[0].keys() == found[1].keys()
    return found


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


TEXTS = [
    *((ink, on) for ink in ("ink", "quiet", "accent") for on in ("ground", "card", "sunken")),
    *((tone, f"{tone}-ground") for tone in ("good", "bad", "wait", "busy")),
    ("bad", "card"), ("ink", "busy-ground"), ("on-accent", "accent"), ("bad", "sunken"),
]  # fmt: skip
SHAPES = [("edge", "card"), ("accent", "card"), ("second", "card")]


@pytest.mark.parametrize("scheme", colours(), ids=["light", "dark"])
def test_text_and_shapes_stand_out(scheme):
    """Contrast as WCAG 2.2 defines it: 4.5 for text (1.4.3), 3 for shapes (1.4.11)."""
    for pairs, least in ((TEXTS, 4.5), (SHAPES, 3.0)):
        for one, other in pairs:
            low, high = sorted((luminance(scheme[one]), luminance(scheme[other])))
            assert (high + 0.05) / (low + 0.05) >= least, (one, other)
