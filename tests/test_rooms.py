"""The rooms of the tests: each has a quick test, and no two files have one name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent
FILES = sorted(ROOT.rglob("test_*.py"))


def test_every_room_has_a_quick_test() -> None:
    quick = {file.parent for file in FILES if "pytest.mark.quick" in file.read_text()}
    assert {file.parent for file in FILES} == quick


def test_no_two_files_have_one_name() -> None:
    counts = Counter(file.name for file in FILES)
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_room_is_a_room_of_the_product() -> None:
    """Besides conformance, which is about other people's models."""
    rooms = {file.parent.relative_to(ROOT) for file in FILES} - {Path(), Path("conformance")}
    packages = (ROOT.parent, ROOT.parent / "fxquant")
    assert [room for room in sorted(rooms) if not any((package / room).is_dir() for package in packages)] == []
