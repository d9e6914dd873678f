"""Wheels are named after their platform, and what is in them is what their RECORD says."""

from __future__ import annotations

import base64
import hashlib
import platform as machine
import sys
import zipfile
from pathlib import Path

import pytest

from release import instruction_sets, run_wheels
from release.instruction_sets import InstructionSetError, check_sets, flags_of_processor, sets_that_run
from release.platform_wheel import FOLDER, PLATFORMS, record_line, with_library
from tests.lowering import needs_kernels

pytestmark = pytest.mark.quick
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux says what a processor has")
HERE = f"{machine.machine()}-linux"


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


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_library_without_one_of_its_instruction_sets_is_refused(name: str, tmp_path: Path) -> None:
    platform, library = PLATFORMS[name], tmp_path / "built"
    library.write_bytes(b"".join(part.encode() + b"\0" for part in platform.sets))
    assert check_sets(library, platform.sets, "another-kind") == (
        f"has {', '.join(platform.sets)}; not run, since this machine is of another kind"
    )
    library.write_bytes(b"".join(part.encode() + b"\0" for part in platform.sets[:-1]))
    with pytest.raises(InstructionSetError, match=f"lacks the instruction sets {platform.sets[-1]}"):
        check_sets(library, platform.sets, platform.target)


@on_linux
@needs_kernels
def test_the_kernels_run_every_instruction_set_that_the_processor_has() -> None:
    (kernels,) = Path(FOLDER).glob("_kernels*.so")
    runs, has = sets_that_run(kernels), flags_of_processor()
    for name, flags in instruction_sets.FLAGS.items():
        is_compiled = name.encode() + b"\0" in kernels.read_bytes()
        assert (name in runs) == (is_compiled and flags <= has)


@on_linux
def test_a_library_that_does_not_run_what_the_processor_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "built"
    library.write_bytes(b"scalar\0avx2\0")
    monkeypatch.setattr(instruction_sets, "sets_that_run", lambda path: ["scalar"])
    monkeypatch.setattr(instruction_sets, "flags_of_processor", lambda: {"avx2", "fma"})
    with pytest.raises(InstructionSetError, match="does not run avx2, which this processor has"):
        check_sets(library, ("scalar", "avx2"), HERE)
    monkeypatch.setattr(instruction_sets, "flags_of_processor", lambda: {"fma"})
    assert check_sets(library, ("scalar", "avx2"), HERE).endswith("runs scalar here")


@on_linux
def test_what_runs_a_library_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_wheels.shutil, "which", lambda name: None)
    assert run_wheels.runner(f"{HERE}-gnu.2.17") == []
    assert run_wheels.runner(PLATFORMS["windows_x86_64"].target) is None
    assert run_wheels.runner(PLATFORMS["macos_arm64"].target) is None
    monkeypatch.setattr(run_wheels.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert run_wheels.runner(PLATFORMS["windows_x86_64"].target) == ["wine"]


def test_results_that_differ_between_platforms_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = dict(zip(PLATFORMS, ("1f", "1f", None, "2e"), strict=True))
    for platform in PLATFORMS.values():
        (tmp_path / f"fxquant-1.0-py3-none-{platform.tag}.whl").touch()
    found = {platform.tag: digests[name] for name, platform in PLATFORMS.items()}
    monkeypatch.setattr(
        run_wheels, "run_wheel", lambda wheel, made_for, rounds: found[made_for.tag] and f"digest {found[made_for.tag]}"
    )
    with pytest.raises(run_wheels.WheelRunError, match=r"different results.*windows_x86_64.: .2e"):
        run_wheels.compare(tmp_path, rounds=1)
