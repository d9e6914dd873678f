"""Run the kernels of built wheels: here, for ARM under qemu, for Windows under wine; all come to one result.

python -m release.run_wheels dist [--rounds 10]

The library of each wheel is linked with `tests/runtime/native/fuzz.cpp`, which calls every function of its interface
with right, damaged and random arguments, holds each instruction set against plain C++, and prints a digest of all
that was computed. The digest has to be the same on every platform. What cannot be run here is said: macOS always, and
others where qemu (`apt install qemu-user libc6-arm64-cross`) or wine is missing.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from release.platform_wheel import FOLDER, PLATFORMS, Platform

ROOT = Path(__file__).parents[1]
FUZZ = "tests/runtime/native/fuzz.cpp"
ARM_LIBRARIES = "/usr/aarch64-linux-gnu"  # where Debian has the C library for ARM


class WheelRunError(Exception):
    """A library that fails, or that comes to another result than those before it."""


def runner(target: str) -> list[str] | None:
    """What runs a program for this target here, in front of its name; None: nothing does."""
    if sys.platform == "linux" and target.startswith(f"{platform.machine()}-linux"):
        return []
    if target.startswith("aarch64-linux") and shutil.which("qemu-aarch64") and Path(ARM_LIBRARIES).is_dir():
        return ["qemu-aarch64", "-L", ARM_LIBRARIES]
    if "windows" in target and shutil.which("wine"):
        return ["wine"]
    return None


def linked(wheel: Path, made_for: Platform, folder: Path) -> Path:
    """The fuzzing program, linked with the library of a wheel, which is put beside it.

    Args:
        wheel: as `release.build_wheels` made it.
        made_for: its platform.
        folder: where both are written.
    """
    library = folder / made_for.library
    with zipfile.ZipFile(wheel) as files:
        library.write_bytes(files.read(f"{FOLDER}/{made_for.library}"))
    zig = [sys.executable, "-m", "ziglang"]
    link_with, program = library, folder / "fuzz.exe"
    if "windows" in made_for.target:
        header = (ROOT / FOLDER / "fxquant_native.h").read_text(encoding="utf-8")
        names = sorted(set(re.findall(r"\b(fxq_\w+)\(", header)))
        (folder / "shown.def").write_text("\n".join([f"LIBRARY {made_for.library}", "EXPORTS", *names, ""]))
        link_with = folder / "kernels.lib"
        subprocess.run([*zig, "dlltool", "-m", "i386:x86-64", "-d", folder / "shown.def", "-l", link_with], check=True)
    # The kernels' own flags: without them the compiler may join products and sums, and draw other numbers.
    flags = (ROOT / FOLDER / "flags.txt").read_text(encoding="utf-8").split()
    command = [*zig, "c++", "-target", made_for.target, "-O1", *flags, "-fno-sanitize=undefined"]
    paths = [f"-I{ROOT / FOLDER}", str(ROOT / FUZZ), str(link_with), "-o", str(program)]
    rpath = [] if "windows" in made_for.target else [f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, *paths, *rpath], check=True)
    return program


def run_wheel(wheel: Path, made_for: Platform, rounds: int) -> str | None:
    """What the fuzzing program prints with this wheel's library; None where nothing here can run it.

    Args:
        wheel: as `release.build_wheels` made it.
        made_for: its platform.
        rounds: of the fuzzing.

    Raises WheelRunError where it fails.
    """
    before = runner(made_for.target)
    if before is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = linked(wheel, made_for, Path(folder))
        environment = {**os.environ, "WINEDEBUG": "-all", "WINEPREFIX": str(Path(folder) / "wine")}
        done = subprocess.run(
            [*before, program, str(rounds)], cwd=folder, env=environment, capture_output=True, text=True
        )
    if done.returncode:
        raise WheelRunError(f"{wheel.name}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout.strip()


def compare(folder: Path, rounds: int) -> None:
    """Run the wheels of a folder, and print what each gives.

    Raises WheelRunError where one fails, or where two come to different results.
    """
    digests = {}
    for name, made_for in PLATFORMS.items():
        for wheel in sorted(folder.glob(f"*-{made_for.tag}.whl")):
            found = run_wheel(wheel, made_for, rounds)
            print(f"{name}: {found or 'not run, since nothing here runs it'}", flush=True)
            if found is not None:
                digests[name] = found.rpartition("digest ")[2]
    if len(set(digests.values())) > 1:
        raise WheelRunError(f"the platforms come to different results: {digests}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the wheels")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    compare(given.folder, given.rounds)


if __name__ == "__main__":
    main()
