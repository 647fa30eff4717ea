"""A machine without room for a moment refuses for that moment, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

from lora_runtime.adapters.files.folder import read_folder
from lora_runtime.errors import LoramuxError, Overloaded
from lora_runtime.temporary_folder import temporary_folder
from lora_runtime.text.text_workers import TextWorkers
from loramux.server.adapters.sources import Sources
from tests.server.test_uploads import CONFIG, WEIGHTS, chunk, left_behind, real_adapter, send, start


@contextmanager
def no_files(how_many: int = 0):
    """The process can open so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        while True:
            try:
                taken.append(os.open("/", os.O_RDONLY))
            except OSError:
                break
        for descriptor in taken[:how_many]:
            os.close(descriptor)
        del taken[:how_many]
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("num_left", range(4))
def test_a_folder_is_not_called_missing_when_no_file_can_be_opened(tmp_path, num_left):
    """At every point of the reading; what is refused then is taken later."""
    folder = real_adapter(tmp_path / "a")
    with no_files(num_left):
        try:
            read_folder(folder)
            assert num_left > 0
        except LoramuxError as error:
            assert type(error) is Overloaded, error
            assert "open files" in error.message
    assert read_folder(folder).adapter.config["r"] == 2


def test_a_source_is_not_called_unreadable(tmp_path):
    real_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with no_files(), pytest.raises(Overloaded):
        Sources([tmp_path]).resolve("a")  # it would look for pickle files


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_an_upload_is_an_overload_and_leaves_nothing(serve, monkeypatch, number):
    really_open = os.open

    def fail(path, flags, *args, **kwargs):
        if "incoming" in str(path):
            raise OSError(number, "no room")
        return really_open(path, flags, *args, **kwargs)

    async with serve() as world:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fail)
            with pytest.raises(Overloaded, match="no more"):
                await send(world, start(), chunk(CONFIG), chunk(WEIGHTS))
            assert left_behind(world) == []
        await send(world, start(), chunk(CONFIG), chunk(WEIGHTS))


def test_a_temporary_folder_that_cannot_be_locked_is_gone(tmp_path):
    with no_files(), pytest.raises(OSError, match="open files"), temporary_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


async def test_text_files_are_an_overload(tmp_path):
    workers = TextWorkers(tmp_path, 10)
    try:
        with no_files(), pytest.raises(Overloaded):
            await workers.read({"chat_template.jinja": b"x"})
    finally:
        workers.close()


def test_a_server_may_open_as_many_files_as_its_system_allows():
    code = (
        "import resource as r; from lora_runtime.shortages import allow_open_files;"
        "allow_open_files(); print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    shell = shutil.which("sh")
    command = f"ulimit -Sn 100; ulimit -Hn 2000; exec {sys.executable} -c '{code}'"
    done = subprocess.run([shell, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2000, 2000)"
