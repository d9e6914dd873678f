"""What a built library of kernels shows and needs: refused where it would not load on the platforms it is for.

It shows the functions of `fxquant_native.h` and nothing else. On Linux it needs no symbol of a glibc younger than the
wheel's name says, and no library but those of glibc; on macOS the system's own, on Windows what every one has.
"""

from __future__ import annotations

import re
from pathlib import Path

import lief

ALLOWED = {
    "linux": {
        "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    },
    "macos": {"/usr/lib/libSystem.B.dylib"},
    "windows": {"kernel32.dll", "ntdll.dll", "msvcrt.dll"},
}  # fmt: skip

# zig's linker cannot hide these. The operators new and delete are weak: all libraries of a process share those of the
# first that has them, and all come down to malloc and free.
OF_EVERY_MACOS_LIBRARY = re.compile(r"_Z(n[aw]|d[al])|_mh_dylib_header$|__dso_handle$")


class LibraryError(Exception):
    """A library that must not be shipped."""


def declared_functions() -> set[str]:
    """The names that the headers declare: of the kernels, and of the library that runs a model without Python."""
    folder = Path(__file__).parents[1] / "fxquant/runtime/native"
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("fxquant_native.h", "fxquant.h")]
    return {name for text in texts for name in re.findall(r"^[^/\n]*?\b(fxq_\w+)\(", text, re.MULTILINE)}


def glibc_versions(binary: lief.ELF.Binary) -> set[tuple[int, ...]]:
    """Versions of glibc whose symbols an ELF library needs."""
    names = {
        need.name for requirement in binary.symbols_version_requirement for need in requirement.get_auxiliary_symbols()
    }
    return {tuple(map(int, name[len("GLIBC_") :].split("."))) for name in names if re.fullmatch(r"GLIBC_[\d.]+", name)}


def check_library(path: Path, tag: str) -> list[str]:
    """Lines that describe a library. Raises LibraryError for one that must not be shipped.

    Args:
        path: the library.
        tag: platform of the wheel that it goes into.
    """
    binary = lief.parse(path)
    if binary is None:
        raise LibraryError(f"{path.name} is no library")
    if isinstance(binary, lief.ELF.Binary):
        system, needed = "linux", {str(name) for name in binary.libraries}
        shown = {str(symbol.name) for symbol in binary.exported_symbols}
    elif isinstance(binary, lief.MachO.Binary):
        system, needed = (
            "macos",
            {str(library.name) for library in binary.libraries} - {path.name, f"@rpath/{path.name}"},
        )
        names = {str(symbol.name).removeprefix("_") for symbol in binary.exported_symbols}
        shown = {name for name in names if not OF_EVERY_MACOS_LIBRARY.match(name)}
    else:
        system, needed = "windows", {str(name).lower() for name in binary.libraries}
        needed = {name for name in needed if not name.startswith("api-ms-win-crt-")}
        shown = {str(function.name) for function in binary.exported_functions}
    declared = declared_functions()
    if missing := declared - shown:
        raise LibraryError(f"{path.name} lacks {', '.join(sorted(missing))}")
    if others := shown - declared:
        raise LibraryError(f"{path.name} shows {len(others)} names of its own, such as {', '.join(sorted(others)[:5])}")
    if strangers := needed - ALLOWED[system]:
        raise LibraryError(f"{path.name} needs {', '.join(sorted(strangers))}")
    lines = [
        f"{path.stat().st_size / 1e6:.1f} MB, {len(shown)} functions, needs {', '.join(sorted(needed)) or 'nothing'}"
    ]
    if isinstance(binary, lief.ELF.Binary):
        youngest = max(glibc_versions(binary), default=(2, 0))
        promised = tuple(int(part) for part in re.search(r"manylinux_(\d+)_(\d+)", tag).groups())  # type: ignore[union-attr]
        if youngest > promised:
            raise LibraryError(f"{path.name} needs glibc {youngest}, and the wheel promises {promised}")
        lines.append(f"needs glibc {'.'.join(map(str, youngest))}")
    return lines
