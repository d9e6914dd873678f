"""Files are put in place whole; what is no regular file stays what it is, and nothing is left lying about."""

from __future__ import annotations

import os
import signal
import stat
import time
import types
from pathlib import Path

import pytest

from fxquant.artefact.container import write_file
from fxquant.errors import ArtefactError

pytestmark = pytest.mark.quick

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def killed_while_writing(path: Path) -> None:
    """Another process begins to write the file and is killed; what the test has patched holds there too."""
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_file(path, b"half")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_link_stays_and_the_file_it_names_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "file"
    link.symlink_to(target)
    for content in (b"new", b"newer"):  # the file is not there at first
        write_file(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["folder", "link"]


def test_a_circle_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ArtefactError, match="cannot be written"):
        write_file(tmp_path / "a", b"")
    assert (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_what_is_no_regular_file_is_never_replaced(kind, tmp_path):
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = type(path)(os.devnull)
    else:
        path.symlink_to(os.devnull)
    before = os.lstat(path)
    with pytest.raises(ArtefactError, match="no regular file"):
        write_file(path, b"new")
    assert os.lstat(path).st_mode == before.st_mode
    assert os.lstat(path).st_ino == before.st_ino


def test_permissions_of_a_file_that_is_replaced_are_kept(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write_file(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_bytes() == b"new"


@needs_fork
def test_what_a_killed_process_left_is_cleared_by_the_next_write(tmp_path):
    killed_while_writing(tmp_path / "a")
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".partial")
    write_file(tmp_path / "b", b"whole")
    assert os.listdir(tmp_path) == ["b"]


def test_a_file_that_is_being_written_is_not_cleared(tmp_path, monkeypatch):
    """This process writes "b" while it writes "a"."""
    partials = []

    def meanwhile(_):
        monkeypatch.undo()
        write_file(tmp_path / "b", b"")
        partials.extend(name for name in os.listdir(tmp_path) if name.endswith(".partial"))

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_file(tmp_path / "a", b"whole")
    assert len(partials) == 1
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_temporary_files_that_may_be_in_use_stay(tmp_path):
    others = {".a.ffffffff-1-00000000.partial": False, ".a.00000000.partial": False, ".a.partial": True}
    for name, is_old in others.items():
        (tmp_path / name).write_bytes(b"")
        if is_old:
            os.utime(tmp_path / name, (0, 0))  # no name that `write_file` gives: somebody else's
    write_file(tmp_path / "b", b"")
    assert set(os.listdir(tmp_path)) == {*others, "b"}


@pytest.mark.parametrize("name", [".a.ffffffff-1-00000000.partial", ".a.00000000.partial"])
def test_old_temporary_files_of_other_machines_and_versions_are_cleared(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    yesterday = time.time() - 24 * 3600
    os.utime(tmp_path / name, (yesterday, yesterday))
    write_file(tmp_path / "b", b"")
    assert os.listdir(tmp_path) == ["b"]


def test_names_the_system_refuses_are_refused(tmp_path):
    for name in ("a\0b", "x" * 300, "\udc80" * 300):
        with pytest.raises(ArtefactError, match="cannot be written"):
            write_file(tmp_path / name, b"")
    assert os.listdir(tmp_path) == []


@needs_fork
@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="needs containers")
def test_containers_with_one_name_do_not_know_each_others_processes(tmp_path, monkeypatch):
    """The process that was killed was another container's; its number here says nothing about it."""
    stat = os.stat
    elsewhere = types.SimpleNamespace(st_ino=1)
    monkeypatch.setattr(os, "stat", lambda path, **how: elsewhere if path == "/proc/self/ns/pid" else stat(path, **how))
    killed_while_writing(tmp_path / "a")
    monkeypatch.undo()
    write_file(tmp_path / "b", b"whole")
    assert len(os.listdir(tmp_path)) == 2
