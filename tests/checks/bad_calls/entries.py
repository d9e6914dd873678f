"""All entry points together."""

from __future__ import annotations

from pathlib import Path

from tests.checks.bad_calls.api import one_call, pipelines, recipes
from tests.checks.bad_calls.classes import classes
from tests.checks.bad_calls.commands import commands
from tests.checks.bad_calls.files import damaged, files, models
from tests.checks.bad_calls.generator import Entry, Good


def all_entries(folder: Path) -> list[Entry]:
    """The entry points, with files in a folder to write to and read from."""
    good = Good(folder)
    whole = [*one_call(good), *classes(), *recipes(), *pipelines(), *files(good), *models(good)]
    return [*whole, *commands(good), *damaged(good)]
