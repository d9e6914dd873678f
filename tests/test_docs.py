"""README and docs: every Python block runs, every doctest holds, every command and link exists.

The Python blocks of one page share their names, as a reader's session would. A block is left out where the line
`<!-- not run: reason -->` stands before it, and where `<!-- needs: package -->` does and the package is not installed.
Pages ask for 32 calibration images and get 4, and for the embedded model and get two of its blocks; what one page has
calibrated and searched is kept for the next.
"""

from __future__ import annotations

import doctest
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from fxquant import errors
from fxquant.cli import app

ROOT = Path(__file__).parents[1]
AT_THE_TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
WRITTEN = (ROOT / "docs" / "reference" / "commands.md", ROOT / "docs" / "_build")  # by a build of the site
FOUND = [page for page in sorted(ROOT.glob("docs/**/*.md")) if not {page, *page.parents} & set(WRITTEN)]
PAGES = [*(ROOT / name for name in AT_THE_TOP), *FOUND]
BLOCK = re.compile(r"(?:<!-- (not run|needs): ([^>]+) -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"^(?:.* \.venv/bin/|.* -m )?fxquant ([a-z]+)(.*)$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The blocks to run, with the number of the line before each."""
    text = page.read_text()
    found = [match for match in BLOCK.finditer(text) if match[1] != "not run"]
    run = [match for match in found if match[1] is None or importlib.util.find_spec(match[2]) is not None]
    return [(text.count("\n", 0, match.start(3)), match[3]) for match in run]


@pytest.mark.usefixtures("few_images", "few_blocks")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look their module up
    names: dict[str, Any] = vars(module)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for line, source in blocks(page):
        if ">>> " in source:
            test = doctest.DocTestParser().get_doctest(source, names, page.name, str(page), line)
            failures: list[str] = []
            runner.run(test, out=failures.append, clear_globs=False)
            names.update(test.globs)
            assert not failures, "".join(failures)
        else:
            exec(compile("\n" * line + source, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    targets = [target for target in LINK.findall(FENCED.sub("", page.read_text())) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_take_these_arguments_and_options(page: Path) -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    shell = [source for language, source in FENCED.findall(page.read_text()) if language == "bash"]
    for name, rest in COMMAND.findall("\n".join(shell).replace("\\\n", " ")):
        group.commands[name].make_context(name, shlex.split(rest, comments=True))


def test_readme_starts_with_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    first = re.search(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert first is not None
    setup, tests = first[1].splitlines()
    assert setup.endswith("&& .venv/bin/fxquant demo")
    assert tests.startswith(".venv/bin/")
    assert text.index("```") == first.start()


@pytest.mark.quick
def test_every_kind_of_error_is_explained() -> None:
    page = (ROOT / "docs" / "how_to" / "troubleshooting.md").read_text()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FxQuantError)]
    assert len(kinds) > 20
    for kind in kinds:
        assert issubclass(kind, TypeError) or re.search(rf"\b{kind.__name__}\b", page), kind
