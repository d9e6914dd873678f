"""What docs/reference/json.md says that commands print as JSON."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "json.md"


@functools.cache
def schemas() -> dict[str, Any]:
    """The schema of each command that has one."""
    parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    found = {part.split("\n")[0]: re.search(r"```json\n(.*?)```", part, re.DOTALL) for part in parts}
    return {name: json.loads(text[1]) for name, text in found.items() if text}


def as_documented(command: str, printed: str) -> Any:
    """What a command printed, read; fails where it is no JSON or not what the page says."""
    jsonschema = pytest.importorskip("jsonschema")
    value = json.loads(printed)
    jsonschema.Draft202012Validator(schemas()[command]).validate(value)
    return value
