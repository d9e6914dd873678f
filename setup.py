"""The optional extension: integer kernels in C++ with a C interface, loaded with ctypes.

Where no C++ compiler is found, or it refuses, the package installs without them and says so when they are asked for.
Everything else about the package is in pyproject.toml.
"""

from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("fxquant/runtime/native")

setup(
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
    ]
)  # fmt: skip
