"""What commands refuse before they begin: options that would do nothing, files that could not be written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxquant.errors import DataError

PAGE = (".html", ".htm")
"""How the names of pages end."""


def is_artefact(model: str) -> bool:
    """Whether a model's name is that of a file."""
    return model.endswith(".fxq") or Path(model).is_file()


def refuse_unused(given: Mapping[str, Any], why: str) -> None:
    """Raise DataError for an option that is given and would do nothing.

    given: values by option, None where it is not given. why: what makes it useless.
    """
    if unused := [name for name, value in given.items() if value not in (None, [])]:
        raise DataError(f"{why}: leave {', '.join(unused)} out")


def check_ending(path: Path | None, *endings: str) -> None:
    """Raise DataError for a file to write that ends otherwise, as a slip of the pen or the name of a file to read."""
    if path is not None and path.suffix.lower() not in endings:
        raise DataError(f"{path} must end in {' or '.join(endings)}")


def check_output(*paths: Path | None) -> None:
    """Fail before the work and not after it: raises DataError where a file could not be written.

    A file is tried out beside each, since permissions, read-only file systems and long names show in no other way.
    """
    targets = [(path, Path(os.path.realpath(path))) for path in paths if path is not None]
    for path, target in targets:
        try:
            if target.is_dir():
                raise DataError(f"{path} is a folder: give the name of a file in it")
            if os.path.lexists(target) and not target.is_file():
                raise DataError(f"{path} is no regular file, and is not replaced by one: give the name of a file")
            if not target.parent.is_dir():
                raise DataError(f"{path} cannot be written: there is no folder {path.parent}; create it first")
            partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
            partial.open("xb").close()
            partial.unlink()
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error}") from error
    found = [target for _, target in targets]
    if len(set(found)) < len(found):
        twice = next(path for path, target in targets if found.count(target) > 1)
        raise DataError(f"{twice} is given for two outputs, of which one would replace the other: give two names")
