"""A killed process leaves no folder for long, and a living one keeps its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_runtime.temporary_folder import remove_abandoned, temporary_folder

HOLD = """
import sys, time
from pathlib import Path
from lora_runtime.temporary_folder import temporary_folder
with temporary_folder(Path(sys.argv[1]), "mine-") as folder:
    (folder / "file").write_text("a")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_folder_stays_while_its_process_lives_and_goes_when_it_was_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        folder = Path(process.stdout.readline().strip())
        remove_abandoned(tmp_path, "mine-")
        assert (folder / "file").read_text() == "a"
        process.send_signal(signal.SIGKILL)
    assert folder.exists()
    remove_abandoned(tmp_path, "others-")
    assert folder.exists()
    remove_abandoned(tmp_path, "mine-")
    assert not folder.exists()


def test_what_is_no_folder_of_ours_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    inside = tmp_path / "parent"
    inside.mkdir()
    (inside / "mine-link").symlink_to(tmp_path / "elsewhere")
    (inside / "mine-file").write_text("")
    remove_abandoned(inside, "mine-")
    assert len(list(inside.iterdir())) == 2 and (tmp_path / "elsewhere").is_dir()
    remove_abandoned(tmp_path / "nowhere")


def test_folders_are_removed_at_the_end_of_their_context(tmp_path):
    with pytest.raises(ValueError, match="end"), temporary_folder(tmp_path) as folder:
        (folder / "sub").mkdir()
        raise ValueError("the end")
    assert list(tmp_path.iterdir()) == []


def test_makers_and_removers_do_not_disturb_each_other(tmp_path):
    def make(index: int) -> None:
        with temporary_folder(tmp_path) as folder:
            (folder / "file").write_text(str(index))
            remove_abandoned(tmp_path)
            assert (folder / "file").read_text() == str(index)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(make, range(400)))
    assert list(tmp_path.iterdir()) == []
