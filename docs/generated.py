"""Pages that are written from the code: one for each room of the three packages, and one for the command line."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOMS = ("fxquant", "passes", "allocators")
CODE = re.compile(r"(`+)(.+?)\1")
ITEM = re.compile(r"\s*(- |\d+\. )")
SECTION = re.compile(r"\s*(Args|Returns|Raises|Yields|Attributes):$")


def _put(path: Path, text: str) -> None:
    """Write a file where its text is new, so that Sphinx reads no page again without need."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _title(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n\n"


def _automodule(name: str) -> str:
    return f".. automodule:: {name}\n\n"


def write_api_pages(root: Path, folder: Path) -> None:
    """Write a page for each package with a section for each public module, and an index of them.

    Args:
        root: where the packages are.
        folder: where the pages are written; pages of packages that are gone are removed.
    """
    names = []
    for room in ROOMS:
        for init in sorted((root / room).rglob("__init__.py")):
            name = ".".join(init.parent.relative_to(root).parts)
            modules = [path.stem for path in sorted(init.parent.glob("*.py")) if not path.stem.startswith("_")]
            text = _title(name, "=") + _automodule(name)
            for module in modules:
                text += _title(module, "-") + _automodule(f"{name}.{module}")
            documented = modules or ast.get_docstring(ast.parse(init.read_text()))
            if documented:
                names.append(name)
                _put(folder / f"{name}.rst", text)
    for stale in set(folder.glob("*.rst")) - {folder / f"{name}.rst" for name in (*names, "index")}:
        stale.unlink()
    toctree = ".. toctree::\n   :maxdepth: 1\n\n" + "".join(f"   {name}\n" for name in names)
    intro = (
        "Every public function and class, by the room it stands in. The names of ``fxquant`` itself have "
        ":doc:`a page of their own <../fxquant>`; everything else is imported from the module that defines it.\n\n"
    )
    _put(folder / "index.rst", _title("Every module", "=") + intro + toctree)


def write_command_page(path: Path) -> None:
    """Write every command with its arguments and options, as typer knows them."""
    command = [sys.executable, "-m", "typer", "fxquant.cli", "utils", "docs", "--name", "fxquant"]
    done = subprocess.run([*command, "--title", "Every command"], capture_output=True, text=True, check=True)
    _put(path, done.stdout)


def as_rst(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText, in place, of a docstring that is plain text with code in backticks.

    Lists get the empty line before them that reStructuredText wants, indented examples become blocks of code, and what
    would be markup elsewhere (`*`, `|`, a trailing underscore) is only itself.
    """
    result: list[str] = []
    in_section = in_example = False
    for line in lines:
        before = next((text for text in reversed(result) if text.strip()), "")
        if SECTION.match(line):
            in_section = True
        elif line and not line.startswith(" "):
            in_section = in_example = False
        indented = line.startswith("    ") and not in_section
        if indented and not in_example and result and not result[-1].strip() and not ITEM.match(before):
            result += ["::", ""]
            in_example = True
        if in_example:
            result.append(line)
            continue
        if ITEM.match(line) and result and result[-1].strip() and not _continues(result):
            result.append("")
        result.append(_escaped(line))
    lines[:] = result


def _continues(lines: list[str]) -> bool:
    """Whether the lines end in an item of a list, which the next item follows without an empty line."""
    for line in reversed(lines):
        if not line.strip():
            return False
        if ITEM.match(line):
            return True
    return False


def _escaped(line: str) -> str:
    """A line of plain text, with code in double backticks."""
    pieces, end = [], 0
    for match in CODE.finditer(line):
        pieces += [_plain(line[end : match.start()]), f"``{match[2]}``"]
        end = match.end()
    return "".join([*pieces, _plain(line[end:])])


def _plain(text: str) -> str:
    return re.sub(r"([*|\\`]|_(?=\W|$))", r"\\\1", text)
