"""The example in C: a picture from a file becomes the input that Pillow and torchvision make, and gets their scores.

It is linked with the kernels that are there already. `benchmarks/c_library.py` builds the library itself.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxquant.data.preprocessing import Preprocessing
from fxquant.export.program_file import to_program
from fxquant.runtime.native import library, program
from tests.lowering import needs_kernels
from tests.models import compiled

NATIVE = Path(library.__file__).parent
needs_compiler = pytest.mark.skipif(
    None in (shutil.which("make"), shutil.which("cc")), reason="the example is built with make and cc"
)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c")
    (kernels,) = NATIVE.glob("_kernels*.so")
    options = [f"OUT={folder}", f"LIBRARY={kernels}", f"CFLAGS=-Werror -Wl,-rpath,{NATIVE}", str(folder / "classify")]
    subprocess.run(["make", "-s", "-C", NATIVE, *options], check=True)
    return folder / "classify"


def picture(width: int, height: int, mode: str) -> Image.Image:
    generator = np.random.default_rng(width)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@needs_kernels
@needs_compiler
@pytest.mark.parametrize(
    ("size", "mode", "interpolation", "crop"),
    [
        ((61, 47), "RGB", "bicubic", 0.9),
        ((20, 33), "RGB", "bilinear", 0.875),
        ((32, 32), "RGB", "bicubic", 1.0),
        ((50, 90), "L", "nearest", 0.95),
    ],
)
def test_a_picture_has_the_scores_that_it_has_in_python(
    example: Path, tmp_path: Path, size: tuple[int, int], mode: str, interpolation: str, crop: float
) -> None:
    low = compiled("vit").lowered("cpu-native")
    how = Preprocessing((3, 32, 32), crop, (0.4, 0.5, 0.45), (0.2, 0.3, 0.25), interpolation)
    found, path = picture(*size, mode), tmp_path / f"picture.{'ppm' if mode == 'RGB' else 'pgm'}"
    found.save(path)
    (tmp_path / "model.fxm").write_bytes(to_program(low.graph_module, {"model": "ViT", "preprocessing": how.to_dict()}))
    ran = subprocess.run([example, tmp_path / "model.fxm", path, "7"], check=True, capture_output=True, text=True)
    with torch.inference_mode():
        scores = low(how.transform()(found)[None])[0]
    printed = [line.split() for line in ran.stdout.splitlines()]
    order = scores.argsort(descending=True)
    assert [int(index) for index, _ in printed] == order.tolist()
    assert torch.equal(torch.tensor([float(score) for _, score in printed]), scores[order])
    assert ran.stderr.startswith("ViT: opened in ")

    kind, sizes, rest = path.read_bytes().split(b"\n", 2)
    path.write_bytes(b"%b\n# made by hand, 1 2 3\n%b # and so on\n\n#\n#\n%b" % (kind, sizes, rest))
    again = subprocess.run([example, tmp_path / "model.fxm", path, "7"], check=True, capture_output=True, text=True)
    assert again.stdout == ran.stdout


@needs_kernels
@needs_compiler
def test_what_is_no_model_or_no_picture_is_said_in_one_line(example: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.fxm").write_bytes(b"")
    (tmp_path / "short.fxm").write_bytes(b"short")
    picture(5, 5, "RGB").save(tmp_path / "picture.ppm")
    (tmp_path / "cut.ppm").write_bytes(b"P6 5 5 255 ...")
    for model, image, message in (
        ("none.fxm", "picture.ppm", "it is not there, empty, or cannot be read"),
        ("empty.fxm", "picture.ppm", "it is not there, empty, or cannot be read"),
        ("short.fxm", "picture.ppm", "it is shorter than any model"),
        ("short.fxm", "cut.ppm", "the file ends before the picture"),
        ("short.fxm", "short.fxm", "this is no PPM or PGM file"),
    ):
        ran = subprocess.run([example, tmp_path / model, tmp_path / image], capture_output=True, text=True)
        assert ran.returncode == 1
        assert message in ran.stderr
        assert ran.stderr.count("\n") == 1


@pytest.mark.quick
def test_the_library_is_compiled_with_the_flags_of_the_package() -> None:
    setup, make = (NATIVE.parents[2] / "setup.py").read_text(), (NATIVE / "Makefile").read_text()
    assert "-ffp-contract=off" in (NATIVE / "flags.txt").read_text()
    assert "flags.txt" in setup
    assert "$(shell cat flags.txt)" in make


@pytest.mark.quick
def test_records_are_as_long_as_in_c() -> None:
    header = (NATIVE / "program.h").read_text()
    assert f"kProgramMagic = {program.MAGIC:#x}, kProgramVersion = {program.VERSION}" in header
    assert re.findall(r"^ {4}(\w+) = (\d+)", header, re.MULTILINE) == [
        (do.name.lower(), str(int(do))) for do in program.Do
    ]
    sizes = {
        "TensorRecord": 24,
        "OperationRecord": 56,
        "OutputRecord": 80,
        "PreprocessingRecord": 40,
        "FileRecord": 168,
    }
    assert {name: ctypes.sizeof(getattr(program, name)) for name in sizes} == sizes
