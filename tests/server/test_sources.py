"""No client-given location reaches a file outside the allowed roots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.errors import AdapterSourceRefused
from loramux.server.adapters.sources import Sources


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """first/ and second/ are allowed, outside/ is not; each holds an adapter named `good`."""
    top = tmp_path_factory.mktemp("host")
    for root in ("first", "second", "outside"):
        write(top / root / "good")
    write(top / "second" / "deep" / "er")
    return top


def write(folder: Path, weights: str = "adapter_model.safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / weights).write_bytes(b"x")
    return folder


def sources(top: Path) -> Sources:
    return Sources([top / "first", top / "second"])


def refusal(top: Path, source: str) -> str:
    with pytest.raises(AdapterSourceRefused) as caught:
        sources(top).resolve(source)
    assert caught.value.field == "source"
    if str(top) not in source:
        assert str(top) not in caught.value.message
    return caught.value.message


def test_relative_and_absolute_sources_inside_a_root(roots: Path) -> None:
    assert sources(roots).resolve("good") == roots / "first" / "good"
    assert sources(roots).resolve("deep/er") == roots / "second" / "deep" / "er"
    inside = roots / "second" / "good"
    assert sources(roots).resolve(str(inside)) == inside


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("", "empty"),
        ("missing", "does not exist in the adapter roots of this server; it counts from a root"),
        ("../outside/good", "'..'"),
        ("good/../good", "'..'"),
        ("good\0", "NUL"),
        ("/etc/passwd", "outside the adapter roots of this server; move it into one, or upload it"),
        ("/", "outside"),
        ("~/adapters", "does not exist"),
        ("good/adapter_config.json", "not a folder"),
        ("x" * 300, "cannot be read"),
        ("x/" * 2000, "longer"),
    ],
)
def test_bad_sources(roots: Path, source: str, why: str) -> None:
    assert why in refusal(roots, source)


def test_outside_looks_the_same_whether_it_exists_or_not(roots: Path) -> None:
    exists, missing = str(roots / "outside" / "good"), str(roots / "outside" / "nothing")
    assert refusal(roots, exists).replace(exists, "") == refusal(roots, missing).replace(
        missing, ""
    )


def test_a_root_whose_name_only_begins_like_an_allowed_one(tmp_path: Path) -> None:
    write(tmp_path / "first" / "good")
    sibling = write(tmp_path / "first-private" / "good")
    with pytest.raises(AdapterSourceRefused, match="outside"):
        Sources([tmp_path / "first"]).resolve(str(sibling))


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", write(tmp_path / "secret")
    write(root / "good")
    (root / "folder-link").symlink_to(secret)
    (root / "inner-link").symlink_to(root / "good")
    linked = write(root / "file-link")
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(secret / "adapter_model.safetensors")
    (root / "loop").symlink_to(root / "loop")
    for source, why in (("folder-link", "outside"), ("file-link", "leads out"), ("loop", "source")):
        with pytest.raises(AdapterSourceRefused, match=why):
            Sources([root]).resolve(source)
    assert Sources([root]).resolve("inner-link") == root / "good"


def test_pickle_and_missing_files(tmp_path: Path) -> None:
    write(tmp_path / "pickle", weights="adapter_model.bin")
    write(tmp_path / "both")
    (tmp_path / "both" / "adapter_model.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    odd = write(tmp_path / "odd")
    (odd / "adapter_model.safetensors").unlink()
    os.mkfifo(odd / "adapter_model.safetensors")
    allowed = Sources([tmp_path])
    with pytest.raises(AdapterSourceRefused, match="pickle"):
        allowed.resolve("pickle")
    with pytest.raises(AdapterSourceRefused, match="has no adapter_config.json"):
        allowed.resolve("empty")
    with pytest.raises(AdapterSourceRefused, match="not a plain file"):
        allowed.resolve("odd")
    assert allowed.resolve("both") == tmp_path / "both"


def test_the_folder_of_a_training_run_is_told_where_its_adapter_is(tmp_path: Path) -> None:
    write(tmp_path / "run" / "adapter")
    write(tmp_path / "elsewhere")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "link").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "linked" / ".hidden")
    (tmp_path / "linked" / "links").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "linked" / "links" / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(AdapterSourceRefused, match=r"config.json; its folder 'adapter' is one"):
        Sources([tmp_path]).resolve("run")
    with pytest.raises(AdapterSourceRefused, match=r"has no adapter_config.json$"):
        Sources([tmp_path]).resolve("linked")
    assert Sources([tmp_path]).resolve("run/adapter") == tmp_path / "run" / "adapter"


def test_without_roots_nothing_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(AdapterSourceRefused, match="outside"):
        Sources([]).resolve(str(write(tmp_path / "good")))


@settings(max_examples=300)
@given(parts=st.lists(st.sampled_from(["..", ".", "", "good", "outside", "~", "a\0", "/", "ﬁ"])))
def test_whatever_is_written_stays_inside(roots: Path, parts: list[str]) -> None:
    for source in ("/".join(parts), str(roots) + "/" + "/".join(parts)):
        try:
            folder = sources(roots).resolve(source)
        except AdapterSourceRefused:
            continue
        assert folder.resolve().is_relative_to(roots / "first") or folder.resolve().is_relative_to(
            roots / "second"
        )
