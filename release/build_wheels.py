"""One wheel per platform for all Pythons, `py3-none-<platform>`, with the integer kernels inside, from one machine.

python release/build_wheels.py --out dist [--platform linux_x86_64 ...]

The kernels have a C interface and are loaded with ctypes, so they belong to a platform and to no version of Python. zig
(the package `ziglang`) compiles them for every platform from any of them, with its own C++ library inside. What is made
is checked, as `auditwheel` would: which functions the library shows, what it needs of the system, and which glibc.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from check_library import check_library

ROOT = Path(__file__).parents[1]
FOLDER = "fxquant/runtime/native"


@dataclass(frozen=True)
class Platform:
    """Where a wheel is for.

    Attributes:
        target: what zig compiles for.
        tag: the platform in the wheel's name.
        library: file name of the kernels.
        link: further flags of the linker.
    """

    target: str
    tag: str
    library: str = "_kernels.so"
    link: tuple[str, ...] = ("-Wl,--exclude-libs,ALL",)


PLATFORMS = {
    "linux_x86_64": Platform("x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64.manylinux2014_x86_64"),
    "linux_aarch64": Platform("aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64.manylinux2014_aarch64"),
    "macos_arm64": Platform("aarch64-macos.11.0", "macosx_11_0_arm64", "_kernels.dylib", ()),
    "windows_x86_64": Platform("x86_64-windows-gnu", "win_amd64", "_kernels.dll", ()),
}


def build_library(platform: Platform, out: Path) -> None:
    """Compile and link the kernels.

    Args:
        platform: where they are for.
        out: the file to write.
    """
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", platform.target]
    sources = sorted((ROOT / FOLDER).glob("*.cpp"))
    flags = ["-O3", "-g0", "-DNDEBUG", *(ROOT / FOLDER / "flags.txt").read_text(encoding="utf-8").split()]
    if "windows" not in platform.target:
        flags.append("-fPIC")
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> str:
            target = f"{folder}/{source.stem}.o"
            subprocess.run([*compiler, *flags, "-c", str(source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        made = f"{folder}/{platform.library}"
        subprocess.run([*compiler, "-shared", "-O3", "-s", *platform.link, *objects, "-o", made], check=True)
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


def record_line(name: str, data: bytes) -> str:
    """What a wheel's RECORD says of a file."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def with_library(pure: Path, platform: Platform, library: Path, out: Path) -> Path:
    """The wheel of a platform: the files of the pure one, and the library.

    Args:
        pure: the wheel of all platforms.
        platform: whose name the new one has.
        library: the kernels for it.
        out: folder of the new wheel.
    """
    made = out / pure.name.replace("-any.whl", f"-{platform.tag}.whl")
    record = ""
    with zipfile.ZipFile(pure) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        record_name = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        files = {name: source.read(name) for name in source.namelist() if name != record_name}
        files[f"{FOLDER}/{platform.library}"] = library.read_bytes()
        for name, data in files.items():
            if name.endswith(".dist-info/WHEEL"):
                tags = "".join(f"Tag: py3-none-{tag}\n" for tag in platform.tag.split("."))
                data = data.replace(b"Root-Is-Purelib: true", b"Root-Is-Purelib: false")
                data = data.replace(b"Tag: py3-none-any\n", tags.encode())
            target.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
            record += record_line(name, data)
        target.writestr(zipfile.ZipInfo(record_name, (1980, 1, 1, 0, 0, 0)), f"{record}{record_name},,\n")
    return made


def main() -> None:
    """Build, check and name the wheels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--platform", choices=PLATFORMS, action="append", help="all where none is named")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pure = pure_wheel(Path(folder))
        for name in arguments.platform or PLATFORMS:
            platform = PLATFORMS[name]
            library = Path(folder) / platform.library
            build_library(platform, library)
            for line in check_library(library, platform.tag):
                print(f"{name}: {line}")
            made = with_library(pure, platform, library, arguments.out)
            print(f"{name}: {made.name}, {made.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
