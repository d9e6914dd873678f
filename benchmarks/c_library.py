"""libfxquant beside Python: its size, the same bits, and how soon the first result is there.

    python -m benchmarks.c_library vit.fxq swin.fxq      # from the repository's root; needs make and a C++ compiler

Builds the library (or takes it from --library FOLDER), exports each artefact, runs it through `libfxquant.so` on random
images and compares every bit with the lowered model in Python; then the example `classify` says, by a timer in C and in
a process of its own, how long opening the file and the first two results took: the least of some runs, one thread.
Prints JSON and keeps it in benchmarks/results/c_library.json.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.fx import GraphModule

import fxquant
from fxquant.data.preprocessing import Preprocessing
from fxquant.export.program_file import to_program
from fxquant.graph.notes import IMAGE_SHAPE
from fxquant.graph.output_tree import leaves
from fxquant.runtime.native import library
from passes.lower.lower import Lower
from passes.pipeline.contract import PassContext

NATIVE = Path(library.__file__).parent
RESULT = Path(__file__).parent / "results" / "c_library.json"
TIMES = re.compile(r"opened in ([\d.]+) ms.* first result after ([\d.]+) ms, second after ([\d.]+) ms")


def exported(path: Path, out: Path) -> GraphModule:
    """The lowered graph of an artefact, whose program is written to `out`."""
    model = fxquant.load(path)
    graph_module = copy.deepcopy(model.graph_module)
    Lower("cpu-native").apply(graph_module, PassContext())
    channels, height, width = IMAGE_SHAPE.of(graph_module)
    how = Preprocessing((channels, height, width), 0.9, (0.5,) * channels, (0.5,) * channels)
    out.write_bytes(to_program(graph_module, {"preprocessing": how.to_dict(), **model.card}))
    return graph_module


def run(shared: ctypes.CDLL, program: Path, images: Tensor, threads: int) -> list[Tensor]:
    """What the shared library gives for images: float32 (B, elements) for each output."""
    model = ctypes.c_void_p()
    shared.fxq_last_error.restype = ctypes.c_char_p
    shared.fxq_output_elements.restype = ctypes.c_int64
    if shared.fxq_open(str(program).encode(), ctypes.byref(model)):
        raise SystemExit(shared.fxq_last_error().decode())
    elements = [shared.fxq_output_elements(model, index) for index in range(shared.fxq_output_count(model))]
    outputs = [torch.empty(len(images), count) for count in elements]
    addresses = (ctypes.c_void_p * len(outputs))(*(output.data_ptr() for output in outputs))
    at = ctypes.c_void_p(images.data_ptr())
    if shared.fxq_run(model, at, ctypes.c_int64(len(images)), addresses, threads):
        raise SystemExit(shared.fxq_last_error().decode())
    shared.fxq_close(model)
    return outputs


def differing(wanted: Any, found: list[Tensor]) -> tuple[int, int]:
    """How many numbers differ in any bit, and how many there are."""
    pairs = [
        (ours.flatten(1).view(torch.int32), theirs.view(torch.int32))
        for ours, theirs in zip(wanted, found, strict=True)
    ]
    return sum(int((ours != theirs).sum()) for ours, theirs in pairs), sum(ours.numel() for ours, _ in pairs)


def times(classify: Path, program: Path, picture: Path, runs: int) -> dict[str, float]:
    """Milliseconds, each the least of some runs."""
    found = []
    for _ in range(runs):
        text = subprocess.run([classify, program, picture], check=True, capture_output=True, text=True).stderr
        match = TIMES.search(text)
        assert match is not None, text
        found.append([float(number) for number in match.groups()])
    opened, first, second = (min(column) for column in zip(*found, strict=True))
    together = min(opened + first for opened, first, _ in found)
    return {"open_ms": opened, "first_ms": first, "second_ms": second, "open_and_first_ms": together}


def main() -> None:
    """Build, export, compare, time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefacts", nargs="+", type=Path)
    parser.add_argument("--library", type=Path, help="a folder with what `make` has built")
    parser.add_argument("--sets", choices=("all", "avx2", "portable"), default="all", help="what it is built with")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.library or Path(name)
        if arguments.library is None:
            subprocess.run(["make", "-s", "-j2", "-C", NATIVE, f"OUT={folder}", f"SETS={arguments.sets}"], check=True)
        shared, picture, rows = folder / "libfxquant.so", Path(name) / "picture.ppm", []
        pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(picture)
        for path in arguments.artefacts:
            program = Path(name) / "model.fxm"
            graph_module = exported(path, program)
            images = torch.randn(
                arguments.images, *IMAGE_SHAPE.of(graph_module), generator=torch.Generator().manual_seed(0)
            )
            with torch.inference_mode():
                wanted = leaves(graph_module(images))
            differ = {}
            for threads in (1, 2):
                count, numbers = differing(wanted, run(ctypes.CDLL(str(shared)), program, images, threads))
                differ[f"threads_{threads}"] = count
            row = {
                "artefact": path.name,
                "artefact_bytes": path.stat().st_size,
                "program_bytes": program.stat().st_size,
            }
            row |= {
                "numbers": numbers,
                "differing": differ,
                **times(folder / "classify", program, picture, arguments.runs),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        sizes = {file.name: file.stat().st_size for file in (shared, folder / "libfxquant.a", folder / "classify")}
    found = {"instruction_set": library.instruction_set(), "library_bytes": sizes, "models": rows}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
