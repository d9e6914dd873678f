"""The optional extension: integer kernels in C++ with a C interface, loaded with ctypes.

Where they cannot be built, the package installs without them. Why is said at the end of the build, and stands in a file
in the place of the library, so that fxquant can say it when a backend is asked for. Everything else about the package
is in pyproject.toml.
"""

import atexit
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

FOLDER = Path("fxquant/runtime/native")


class BuildKernels(build_ext):
    """Builds the kernels, as many sources at once as there are processors, or leaves a file that says why not."""

    def run(self) -> None:
        """Remember whether the library will lie beside its sources, which setuptools forgets meanwhile."""
        self.is_beside_sources = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extensions(self) -> None:
        """Compile the sources of an extension side by side."""
        compile_all = self.compiler.compile

        def compile_at_once(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_all([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_at_once
        super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        """Compile with gcc or clang."""
        why = None
        if self.compiler.compiler_type not in ("unix", "mingw32", "cygwin"):
            why = f"they need gcc or clang, and {self.compiler.compiler_type!r} is what builds Python's extensions here"
        else:
            try:
                super().build_extension(extension)
            except (CCompilerError, ExecError, PlatformError, OSError) as error:
                why = f"no C++ compiler that works was found ({error})"
        folder = FOLDER if self.is_beside_sources else Path(self.get_ext_fullpath(extension.name)).parent
        note = folder / "why_absent.txt"
        note.unlink(missing_ok=True)
        if why:
            folder.mkdir(parents=True, exist_ok=True)
            note.write_text(why, encoding="utf-8")
            atexit.register(
                print, f"\nfxquant installs without its integer kernels: {why}.\n", file=sys.stderr, flush=True
            )


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "fxquant.runtime.native._kernels",
            sources=[str(path) for path in sorted(FOLDER.glob("*.cpp"))],
            depends=[str(path) for pattern in ("*.h", "*.inl", "flags.txt") for path in sorted(FOLDER.glob(pattern))],
            language="c++",
            # No contraction: every instruction set must round alike. Instruction sets are chosen at run time, so no
            # -march here.
            extra_compile_args=["-O3", "-g0", *(FOLDER / "flags.txt").read_text(encoding="utf-8").split()],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
)
