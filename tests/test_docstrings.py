"""Docstrings: whoever calls something with three or more parameters finds each of them in a list.

Read from the source, so that nothing is imported. Commands are left out: their options have help texts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for room in ("fxquant", "passes", "allocators")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.parent.name != "commands"
]
FEWEST = 3
ELSEWHERE = re.compile(r"Args: see `[\w.]+`")
ENTRY = re.compile(r"^ +([\w*]+(?:, [\w*]+)*): ", re.MULTILINE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parameters(function: Function, is_method: bool) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    return names[1:] if is_method and not is_static else names


def fields(cls: ast.ClassDef) -> list[str]:
    """Of a dataclass, the arguments of its constructor."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list):
        return []
    found = [item for item in cls.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    return [
        ast.unparse(item.target)
        for item in found
        if not ast.unparse(item.target).startswith("_")
        and "ClassVar" not in ast.unparse(item.annotation)
        and "init=False" not in (ast.unparse(item.value) if item.value else "")
    ]


def missing(text: str, names: list[str]) -> list[str]:
    """Those of the names that no entry of the text's list has."""
    if len(names) < FEWEST or ELSEWHERE.search(text):
        return []
    _, _, listed = text.partition("Args:\n")
    described = {name.lstrip("*") for entry in ENTRY.findall(listed) for name in entry.split(", ")}
    return [name for name in names if name not in described]


def undescribed(body: list[ast.stmt], prefix: str = "", *, is_class: bool = False) -> Iterator[str]:
    """Public functions, methods and constructors, each with the parameters that its list lacks."""
    for item in body:
        if isinstance(item, Function) and not item.name.startswith("_"):
            if any("overload" in ast.unparse(decorator) for decorator in item.decorator_list):
                continue
            if lacking := missing(ast.get_docstring(item) or "", parameters(item, is_class)):
                yield f"{prefix}{item.name}: {', '.join(lacking)}"
        elif isinstance(item, ast.ClassDef) and not item.name.startswith("_"):
            init = next((each for each in item.body if isinstance(each, Function) and each.name == "__init__"), None)
            names = fields(item) if init is None else parameters(init, is_method=True)
            texts = [ast.get_docstring(each) or "" for each in (item, init) if each is not None]
            if lacking := missing("\n".join(texts), names):
                yield f"{prefix}{item.name}(): {', '.join(lacking)}"
            yield from undescribed(item.body, f"{prefix}{item.name}.", is_class=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_three_parameters_or_more_are_listed(path: Path) -> None:
    assert list(undescribed(ast.parse(path.read_text()).body)) == []


def test_what_is_missing_is_named() -> None:
    source = '''
class Thing:
    """A thing.

    Args:
        a, b: two.
        c: one more.
    """
    def __init__(self, a, b, c): ...
    def put(self, x, y, z):
        """Put.

        Args:
            x: where.
            *y: what.
        """
    def like(self, x, y, z):
        """Args: see `Thing.put`."""
    def _hidden(self, x, y, z): ...
def few(a, b): ...
'''
    assert list(undescribed(ast.parse(source).body)) == ["Thing.put: z"]
