"""One wheel per platform for all Pythons, `py3-none-<platform>`, with the integer kernels inside, from one machine.

python -m release.build_wheels --out dist [--platform linux_x86_64 ...] [--level 0]

The kernels have a C interface and are loaded with ctypes, so they belong to a platform and to no version of Python. zig
(the package `ziglang`) compiles them for every platform from any of them, with its own C++ library inside. What is made
is checked, as `auditwheel` would: which functions the library shows, what it needs of the system, and which glibc; and
that it has every instruction set, and runs those that the processor here has.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from release.check_library import check_library
from release.instruction_sets import check_sets
from release.platform_wheel import FOLDER, PLATFORMS, Platform, with_library

ROOT = Path(__file__).parents[1]


def build_library(platform: Platform, level: int, out: Path) -> None:
    """Compile and link the kernels.

    Args:
        platform: where they are for.
        level: of optimization, 0 to 3.
        out: the file to write.
    """
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", platform.target]
    sources = sorted((ROOT / FOLDER).glob("*.cpp"))
    flags = [
        f"-O{level}",
        "-g0",
        "-fno-sanitize=undefined",
        *(ROOT / FOLDER / "flags.txt").read_text(encoding="utf-8").split(),
    ]
    if "windows" not in platform.target:
        flags.append("-fPIC")
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> str:
            target = f"{folder}/{source.stem}.o"
            subprocess.run([*compiler, *flags, "-c", str(source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        script = Path(folder) / "shown.map"
        script.write_text("{ global: fxq_*; local: *; };\n", encoding="utf-8")
        link = [
            "-shared",
            "-O3",  # as of zig's own library, which each level would compile anew
            "-s",
            *([f"-Wl,--version-script={script}"] if platform.has_version_script else []),
            # Otherwise its name is the folder that it was made in.
            *([f"-Wl,-install_name,@rpath/{platform.library}"] if "macos" in platform.target else []),
        ]
        made = f"{folder}/{platform.library}"
        subprocess.run([*compiler, *link, *objects, "-o", made], check=True)
        shutil.copyfile(made, out)


def pure_wheel(folder: Path) -> Path:
    """The wheel of the Python files, without kernels: tracked files, without the script that would compile here."""
    tree = folder / "tree"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.rstrip("\0").split("\0"):
        if name != "setup.py" and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(tree)]
    subprocess.run(command, check=True)
    return next(folder.glob("*-py3-none-any.whl"))


def main() -> None:
    """Build, check and name the wheels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--platform", choices=PLATFORMS, action="append", help="all where none is named")
    parser.add_argument("--level", type=int, default=3, help="of optimization; 0 tells sooner whether all of it links")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pure = pure_wheel(Path(folder))
        for name in arguments.platform or PLATFORMS:
            platform = PLATFORMS[name]
            library = Path(folder) / platform.library
            build_library(platform, arguments.level, library)
            for line in (*check_library(library, platform.tag), check_sets(library, platform.sets, platform.target)):
                print(f"{name}: {line}")
            made = with_library(pure, platform, library, arguments.out)
            print(f"{name}: {made.name}, {made.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
