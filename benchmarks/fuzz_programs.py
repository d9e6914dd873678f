"""Damaged programs (`.fxm`) in the C library, built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m benchmarks.fuzz_programs --rounds 20000

Programs of small models are exported, each damaged in many ways, with checksums put right, and run where they are not
refused (`tests/runtime/native/fuzz_program.cpp`). Ends with an error where a sanitizer finds one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from fxquant.export.program_file import to_program
from tests.lowering import lower, quantized

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "fxquant/runtime/native"
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def built(folder: Path, sets: str) -> Path:
    """The fuzzer, with the kernels of plain C++ or of all instruction sets."""
    program = folder / "fuzz_program"
    sources = [*sorted(NATIVE.glob("*.cpp")), ROOT / "tests/runtime/native/fuzz_program.cpp"]
    chosen = {"portable": ["-DFXQ_PORTABLE"], "avx2": ["-DFXQ_AVX2_ONLY"], "all": []}[sets]
    compiler = os.environ.get("CXX", "g++")
    objects = [folder / f"{source.name}.o" for source in sources]
    for source, made in zip(sources, objects, strict=True):
        subprocess.run([compiler, *FLAGS, *chosen, *SANITIZERS, f"-I{NATIVE}", "-c", source, "-o", made], check=True)
    subprocess.run([compiler, *SANITIZERS, "-pthread", *objects, "-o", program], check=True)
    return program


def main() -> None:
    """Build, export, run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--sets", choices=("portable", "avx2", "all"), default="portable")
    parser.add_argument("--models", nargs="+", default=["vit", "deit distilled", "swin that pads"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{index}.fxm" for index in range(len(arguments.models))]
        for file, model in zip(files, arguments.models, strict=True):
            file.write_bytes(to_program(lower(quantized(model), chains=True)))
        environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=4096"}
        command = [built(folder, arguments.sets), str(arguments.rounds), *files]
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
