"""A wheel for one platform: the files of the wheel for all, and the library of kernels, under a name that says so.

A wheel is a zip file whose RECORD has a digest of every file, and whose WHEEL names the platforms (PEP 427). The same
files give the same bytes: nothing in it tells when it was made.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = "fxquant/runtime/native"
WHEN = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can tell


@dataclass(frozen=True)
class Platform:
    """Where a wheel is for.

    Attributes:
        target: what zig compiles for.
        tag: the platform in the wheel's name.
        sets: instruction sets that the kernels have.
        library: file name of the kernels.
        has_version_script: whether its linker is told by a script which names are shown, those of static C++
            libraries not.
    """

    target: str
    tag: str
    sets: tuple[str, ...]
    library: str = "_kernels.so"
    has_version_script: bool = True


_X86 = ("scalar", "avx2", "avx-vnni", "avx512-vnni")
_ARM = ("scalar", "neon", "neon-dotprod", "neon-i8mm")
PLATFORMS = {
    "linux_x86_64": Platform(
        "x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64.manylinux2014_x86_64", (*_X86, "amx-int8")
    ),
    "linux_aarch64": Platform("aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64.manylinux2014_aarch64", _ARM),
    "macos_arm64": Platform("aarch64-macos.11.0", "macosx_11_0_arm64", _ARM, "_kernels.dylib", False),
    "windows_x86_64": Platform("x86_64-windows-gnu", "win_amd64", _X86, "_kernels.dll", False),
}


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
    beside = made.with_name(f"{made.name}.part")  # so that no wheel is there in part
    record = ""
    with zipfile.ZipFile(pure) as source, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as target:
        record_name = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        files = {name: source.read(name) for name in source.namelist() if name != record_name}
        files[f"{FOLDER}/{platform.library}"] = library.read_bytes()
        for name, data in files.items():
            if name.endswith(".dist-info/WHEEL"):
                tags = "".join(f"Tag: py3-none-{tag}\n" for tag in platform.tag.split("."))
                data = data.replace(b"Root-Is-Purelib: true", b"Root-Is-Purelib: false")
                data = data.replace(b"Tag: py3-none-any\n", tags.encode())
            target.writestr(zipfile.ZipInfo(name, WHEN), data, zipfile.ZIP_DEFLATED)
            record += record_line(name, data)
        target.writestr(zipfile.ZipInfo(record_name, WHEN), f"{record}{record_name},,\n")
    os.replace(beside, made)
    return made
