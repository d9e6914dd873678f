"""Wheels are named after their platform, and what is in them is what their RECORD says."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

import pytest

from release.platform_wheel import FOLDER, PLATFORMS, record_line, with_library

pytestmark = pytest.mark.quick


def pure_wheel(folder: Path) -> Path:
    path = folder / "fxquant-1.0-py3-none-any.whl"
    head = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("fxquant/__init__.py", "")
        made.writestr("fxquant-1.0.dist-info/WHEEL", head)
        made.writestr("fxquant-1.0.dist-info/RECORD", "fxquant/__init__.py,,\n")
    return path


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_wheel_holds_the_library_and_tells_its_platform_and_digests(name: str, tmp_path: Path) -> None:
    platform = PLATFORMS[name]
    library = tmp_path / "built"
    library.write_bytes(b"kernels")
    (tmp_path / "out").mkdir()
    made = with_library(pure_wheel(tmp_path), platform, library, tmp_path / "out")
    assert made.name == f"fxquant-1.0-py3-none-{platform.tag}.whl"
    with zipfile.ZipFile(made) as opened:
        assert opened.read(f"{FOLDER}/{platform.library}") == b"kernels"
        head = opened.read("fxquant-1.0.dist-info/WHEEL").decode()
        assert "Root-Is-Purelib: false" in head
        assert [line for line in head.splitlines() if line.startswith("Tag")] == [
            f"Tag: py3-none-{tag}" for tag in platform.tag.split(".")
        ]
        lines = opened.read("fxquant-1.0.dist-info/RECORD").decode().splitlines()
        assert lines[-1] == "fxquant-1.0.dist-info/RECORD,,"
        assert [line.split(",")[0] for line in lines] == opened.namelist()
        for line in lines[:-1]:
            assert f"{line}\n" == record_line(line.split(",")[0], opened.read(line.split(",")[0]))


def test_the_same_files_give_the_same_wheel(tmp_path: Path) -> None:
    library = tmp_path / "built"
    library.write_bytes(b"kernels")
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        made.append(with_library(pure_wheel(tmp_path), PLATFORMS["linux_x86_64"], library, folder).read_bytes())
    assert made[0] == made[1]


def test_a_record_has_the_digest_that_installers_compute() -> None:
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"x").digest()).decode().rstrip("=")
    assert record_line("a.py", b"x") == f"a.py,sha256={digest},1\n"
