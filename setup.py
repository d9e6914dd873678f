"""The optional extension: integer kernels in C++ with a C interface, loaded with ctypes.

Where no C++ compiler is found, or it refuses, the package installs without them and says so when they are asked for.
Everything else about the package is in pyproject.toml.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("fxquant/runtime/native")


class BuildAtOnce(build_ext):
    """Compiles the sources of an extension side by side, as many as there are processors."""

    def build_extensions(self):
        """Build all extensions, with a compiler that takes the sources of each at once."""
        compile_all = self.compiler.compile

        def compile_at_once(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_all([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_at_once
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildAtOnce},
    ext_modules=[
        Extension(
            "fxquant.runtime.native._kernels",
            sources=[str(path) for path in sorted(FOLDER.glob("*.cpp"))],
            depends=[str(path) for pattern in ("*.h", "*.inl") for path in sorted(FOLDER.glob(pattern))],
            language="c++",
            # No contraction: every instruction set must round alike. Instruction sets are chosen at run time, so no
            # -march here.
            extra_compile_args=[
                "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
                "-ffp-contract=off", "-Wno-uninitialized", "-Wno-psabi",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
)  # fmt: skip
