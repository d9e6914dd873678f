"""Pages of the site that are written from the code: every module is on one, and docstrings look as they are meant."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rst_of(generated: ModuleType, text: str) -> str:
    lines = text.split("\n")
    generated.as_rst(None, "function", "name", None, None, lines)
    return "\n".join(lines)


def test_every_public_module_is_on_a_page(generated: ModuleType, tmp_path: Path) -> None:
    generated.write_api_pages(ROOT, tmp_path)
    shown = set(re.findall(r"automodule:: (\S+)", "".join(page.read_text() for page in tmp_path.glob("*.rst"))))
    files = [path for room in generated.ROOMS for path in (ROOT / room).rglob("*.py") if not path.stem.startswith("_")]
    assert {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files} <= shown


def test_pages_of_packages_that_are_gone_are_removed(generated: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "fxquant.gone.rst").write_text("gone")
    generated.write_api_pages(ROOT, tmp_path)
    assert not (tmp_path / "fxquant.gone.rst").exists()


def test_markup_that_is_none_is_only_itself(generated: ModuleType) -> None:
    assert rst_of(generated, "A * b of `x_` and |y|, name_ too.") == r"A \* b of ``x_`` and \|y\|, name\_ too."


def test_lists_and_examples_are_set_apart(generated: ModuleType) -> None:
    text = "Does it:\n- one,\n  long\n- two.\n\nSo:\n\n    call(*x)\n\nArgs:\n    x: what."
    expected = "Does it:\n\n- one,\n  long\n- two.\n\nSo:\n\n::\n\n    call(*x)\n\nArgs:\n    x: what."
    assert rst_of(generated, text) == expected
