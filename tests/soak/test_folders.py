"""Attacks on the reading of adapters: broken folders, and folders that change meanwhile."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from lora_runtime.adapters.files.file_names import CONFIG_FILE, PARITY_FILE, TENSORS_FILE
from lora_runtime.adapters.files.folder import read_folder
from lora_runtime.adapters.files.open_folder import SETTLE_S
from lora_runtime.adapters.files.parity_record import parse_parity_record
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.reduction import reduce_folder
from lora_runtime.errors import AdapterError, LoramuxError
from loramux.server.adapters.sources import Sources
from tests.peft_adapters import write_adapter
from tests.tiny import tiny_base, tiny_checkpoint, tiny_model

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("settles_as_in_a_server")]
TEMPLATE_FILE = "chat_template.jinja"
BATCH = 100
"""Folders that are written before they are read: a fresh one is waited for until it is at rest."""
VALUES = [
    None, True, False, 0, 1, -1, 2, 16, 1e300, -0.5, 10**30, "", "x", "lora", "\ud800", "a" * 5000,
    "(a+)+$", [], [1], ["q_proj"], [[0, 2], [0, 2]], {}, {"q_proj": 3}, {"a": {"b": []}},
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base("llama", folder=tiny_checkpoint(tmp_path_factory.mktemp("base")))


MEMORY = Path("/dev/shm")
"""Where folders are made, if it is there: a disk takes longer to write than we to read."""


@pytest.fixture
def root(tmp_path):
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as folder:
        yield written(Path(folder) / "secret-root")


def written(root: Path) -> Path:
    write_adapter(tiny_model("llama"), root / "good", seed=0, r=2)
    config = json.loads((root / "good" / CONFIG_FILE).read_text())
    (root / "good" / CONFIG_FILE).write_text(json.dumps(config))
    return root


def mutated_json(content: object, rng: random.Random) -> object:
    """The same with one value, key or place changed, somewhere."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key = rng.choice(sorted(content))
        changed = dict(content)
        match rng.randrange(4):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(["", "r", "x" * 300, "\x1b"])] = rng.choice(VALUES)
            case _:
                changed[key] = mutated_json(content[key], rng)
        return changed
    if isinstance(content, list) and content and rng.random() < 0.7:
        index = rng.randrange(len(content))
        return [*content[:index], mutated_json(content[index], rng), *content[index + 1 :]]
    return rng.choice(VALUES)


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    match rng.randrange(4):
        case 0:
            return bytes(changed[: rng.randrange(len(changed) + 1)])
        case 1:
            return bytes(changed) + rng.randbytes(rng.randrange(1, 64))
    for _ in range(rng.randrange(1, 6)):
        changed[rng.randrange(min(len(changed), 4096))] = rng.randrange(256)
    return bytes(changed)


def mutated_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    (length,) = struct.unpack("<Q", data[:8])
    header = mutated_json(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    claimed = rng.choice([len(text), len(text), 0, 2**63, len(text) + 1])
    return struct.pack("<Q", claimed) + text + data[8 + length :]


RECORD = {
    "version": 2, "base_fingerprint": "f", "rows": [[1, 2, 3]], "noise": 0.1,
    "tensors_sha256": None,
    "positions": [
        {"row": 0, "position": 1, "token_ids": [1, 2], "base": [0, 1, 2], "adapter": [0, 1, 2]}
    ],
}  # fmt: skip


def break_folder(folder, rng: random.Random) -> None:
    config, tensors = folder / CONFIG_FILE, folder / TENSORS_FILE
    for _ in range(rng.randrange(1, 3)):
        match rng.randrange(7):
            case 0 | 1:
                found = (
                    json.loads(config.read_text(errors="replace") or "{}")
                    if _is_json(config)
                    else {}
                )
                config.write_text(json.dumps(mutated_json(found, rng)))
            case 2:
                config.write_bytes(mutated_bytes(config.read_bytes() or b"{", rng))
            case 3:
                tensors.write_bytes(mutated_bytes(tensors.read_bytes() or b"x", rng))
            case 4:
                data = tensors.read_bytes()
                if len(data) > 8 and struct.unpack("<Q", data[:8])[0] < len(data):
                    try:
                        tensors.write_bytes(mutated_header(data, rng))
                    except ValueError:  # broken before
                        tensors.write_bytes(b"")
            case 5:
                written = json.dumps(mutated_json(RECORD, rng)).encode()
                (folder / PARITY_FILE).write_bytes(
                    written if rng.random() < 0.8 else mutated_bytes(written, rng)
                )
            case 6:
                (folder / TEMPLATE_FILE).write_bytes(rng.randbytes(rng.randrange(40)))


def _is_json(path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def test_broken_folders(base, root, size, figure) -> None:
    """Whatever is in a folder, it is served or refused by name, and no path of ours is said."""
    wanted, done, taken, slowest = size.of(47_000, 300), 0, 0, 0.0
    rng, sources, refusals = random.Random(5), Sources([root]), {}
    before_mb = psutil.Process().memory_info().rss / 1e6
    while done < wanted:
        folders = [root / f"case{number}" for number in range(BATCH)]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(root / "good", folder)
            break_folder(folder, rng)
        time.sleep(SETTLE_S)
        for folder in folders:
            at = time.monotonic()
            try:
                content = read_folder(sources.resolve(folder.name))
                form = reduce_folder(content, base.spec, base.weights)
                if content.parity_record is not None:
                    parse_parity_record(content.parity_record, base.spec)
                pack_for(base, form)
                taken += 1
            except LoramuxError as error:
                assert str(root) not in error.message.replace(str(folder), folder.name)
                refusals[type(error).__name__] = refusals.get(type(error).__name__, 0) + 1
            slowest = max(slowest, time.monotonic() - at)
            done += 1
    grown_mb = psutil.Process().memory_info().rss / 1e6 - before_mb
    figure(
        f"{done} folders: {taken} taken, {sum(refusals.values())} refused by name, 0 untyped; "
        f"slowest {slowest:.2f} s; RSS {grown_mb:+.0f} MB",
        before="47,554: 617 untyped; slowest 8.4 s; RSS +48 MB",
        bound="47,000; 0 untyped, no paths; ≤ 8.4 s; ≤ +48 MB",
    )
    assert taken and sum(refusals.values()) > done / 3
    assert slowest <= 8.4 and grown_mb <= 48


def test_folder_swaps(base, root, size, figure) -> None:
    """A load is of one version of a folder that is swapped under it, or refused by name."""
    for number in range(2):
        folder = root / f"v{number}"
        shutil.copytree(root / "good", folder)
        tensors = load_file(folder / TENSORS_FILE)
        save_file({k: t * 0 + number for k, t in tensors.items()}, folder / TENSORS_FILE)
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": 3 + number}))
        (folder / TEMPLATE_FILE).write_text(f"version {number}")
    is_over = threading.Event()

    def swap() -> None:
        """By a link, by a rename of the folder, and file by file."""
        rng, number = random.Random(3), 0
        while not is_over.is_set():
            number = 1 - number
            match rng.randrange(3):
                case 0:
                    os.symlink(root / f"v{number}", root / "next")
                    if (root / "live").is_symlink() or not (root / "live").exists():
                        os.replace(root / "next", root / "live")
                    else:
                        shutil.rmtree(root / "live", ignore_errors=True)
                        os.replace(root / "next", root / "live")
                case 1:
                    shutil.rmtree(root / "made", ignore_errors=True)
                    shutil.copytree(root / f"v{number}", root / "made")
                    if (root / "live").is_symlink():
                        os.unlink(root / "live")
                    shutil.rmtree(root / "live", ignore_errors=True)
                    os.rename(root / "made", root / "live")
                case 2 if (root / "live").is_dir() and not (root / "live").is_symlink():
                    for name in (TENSORS_FILE, CONFIG_FILE, TEMPLATE_FILE):
                        shutil.copy(root / f"v{number}" / name, root / "piece")
                        os.replace(root / "piece", root / "live" / name)
            time.sleep(rng.choice([0, 0.002, 0.05, 0.2]))

    sources, counts = Sources([root]), {"v0": 0, "v1": 0, "refused": 0}
    swapping = threading.Thread(target=swap)
    swapping.start()
    wanted, done = size.of(1_300, 100), 0
    try:
        while done < wanted or not counts["v0"] + counts["v1"]:
            done += 1
            try:
                content = read_folder(sources.resolve("live"))
            except AdapterError:
                counts["refused"] += 1
                continue
            alpha = content.adapter.config["lora_alpha"]
            fills = {float(t.flatten()[0]) for t in content.adapter.tensors.values()}
            texts = {bytes(text) for text in content.text.values()}
            assert (fills, texts) == ({alpha - 3.0}, {b"version %d" % (alpha - 3)}), "mixed"
            counts[f"v{alpha - 3}"] += 1
    finally:
        is_over.set()
        swapping.join()
    figure(
        f"{done} loads: {counts['v0'] + counts['v1']} whole, {counts['refused']} refused, 0 mixed",
        before="1,300 loads: 186 mixed",
        bound="0 mixed",
    )
    assert counts["v0"] + counts["v1"], "nothing was ever read"
