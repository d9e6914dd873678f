"""Which class of a model a name stands for: ImageNet's wnids, numbers, or a list of names that the user gives.

    indices, how = matched(["n01440764", "n01443537"], 1000, "val")     # [0, 1], by ImageNet's names

The lists of ImageNet-1k, 12k, 21k and 22k are timm's; a list belongs to models with as many outputs as it has names.
Deliberately not done: matching of words ("goldfish"), of which ImageNet uses some for two classes.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from fxquant.checks.arguments import text
from fxquant.errors import DataError

SORTED_ORDER = "by the sorted order of their names"
_REMEDY = (
    "name the model's classes in a file, one a line in the order of its outputs (--classes FILE, or classes=), or give "
    "the class of every image (--labels FILE, or labels=)"
)


def matched(names: Sequence[str], outputs: int, where: str) -> tuple[list[int], str]:
    """The index of every name among the outputs of a model, and how it was found, in words.

    By ImageNet's list where the model has as many outputs as that has names; by number where all names are numbers
    below `outputs`; else, where there are as many names as outputs, by their sorted order, as torchvision numbers
    folders.

    Args:
        names: distinct names of classes, sorted.
        outputs: how many classes the model gives.
        where: how the message calls the data that has the names.

    Raises DataError where only some of the names are on ImageNet's list, and where the names say nothing.
    """
    known = _imagenet(outputs)
    missing = [name for name in names if name not in known]
    if not missing:
        return [known[name] for name in names], f"by ImageNet's names of {outputs:,} classes"
    if len(missing) < len(names):
        raise DataError(
            f"{where}: {len(names) - len(missing)} of {len(names)} classes have names of ImageNet's {outputs:,}, and "
            f"{missing[0]!r} is none of them: remove or rename it, or {_REMEDY}"
        )
    numbers = as_numbers(names)
    if numbers is not None and len(set(numbers)) == len(names) and max(numbers) < outputs:
        return numbers, "by the numbers that they are called by"
    if len(names) == outputs:
        return list(range(outputs)), SORTED_ORDER
    raise DataError(
        f"{where} has {len(names):,} classes ({', '.join(names[:3])}, ...) and the model gives {outputs:,}, of which "
        f"these names say nothing: {_REMEDY}"
    )


def as_numbers(names: Sequence[str]) -> list[int] | None:
    """Names that are all numbers of up to nine digits, as these; else None."""
    is_numbered = all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names)
    return list(map(int, names)) if is_numbered else None


def indices_of(names: Sequence[str], classes: Sequence[str], where: str) -> list[int]:
    """The index of every name in the user's list of classes. Raises DataError for names that it does not have.

    Args:
        names: names of class folders.
        classes: the user's list, in the order of the model's outputs.
        where: where the list comes from, for the message.
    """
    known = {name: index for index, name in enumerate(classes)}
    missing = [name for name in names if name not in known]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(names)} classes are not in the list of {len(classes)} names, such as "
            f"{missing[0]!r}; it begins with {', '.join(map(repr, classes[:3]))}"
        )
    return [known[name] for name in names]


def read_classes(file: str | PathLike[str]) -> list[str]:
    """Names of a model's classes in the order of its outputs: one a line, a JSON list, or a JSON {"index": "name"}.

    Raises DataError for a file that cannot be read, names that stand there twice, and indices with gaps.
    """
    content = _read(file)
    if content.lstrip()[:1] not in ("[", "{"):
        return check_classes(content.splitlines(), str(file))
    try:
        value = json.loads(content)
        if isinstance(value, dict):
            by_index = {int(key): name for key, name in value.items()}
            value = [by_index[index] for index in range(len(value))]
    except (ValueError, KeyError, RecursionError) as error:
        raise DataError(f"{file} is no JSON list of names, nor names by index from 0 without gaps: {error}") from error
    return check_classes(value, str(file))


def check_classes(names: Sequence[Any], where: str) -> list[str]:
    """Names without the space around them. Raises DataError where there are none, an empty one, or one twice."""
    found = [text(f"a class name in {where}", name, DataError).strip() for name in names]
    while found and not found[-1]:
        found.pop()
    seen: set[str] = set()
    for index, name in enumerate(found):
        if not name or name in seen:
            raise DataError(f"{where}: name {index} is {'empty' if not name else f'{name!r} a second time'}")
        seen.add(name)
    if not found:
        raise DataError(f"{where} has no names of classes")
    return found


def read_labels(file: str | PathLike[str]) -> list[tuple[str, str]]:
    """Paths of images with their classes, as the file has them: "path label" a line, or "path,label" where it is .csv.

    A line that is empty or begins with # is left out, and a .csv's first row where its label reads "label" or "class".
    Raises DataError for a file or a line that cannot be read.
    """
    is_csv = Path(file).suffix.lower() == ".csv"
    lines = _read(file).splitlines()
    try:
        rows = [(0, []), *enumerate(csv.reader(lines), 1)] if is_csv else enumerate(map(_split, lines), 1)
        found = [(number, row) for number, row in rows if row and not row[0].startswith("#")]
    except csv.Error as error:
        raise DataError(f"{file} is no CSV file: {error}") from error
    if is_csv and found and found[0][1][-1].strip().lower() in ("label", "class", "target"):
        found = found[1:]
    for number, row in found:
        if len(row) != 2 or not all(part.strip() for part in row):
            raise DataError(f"{file}, line {number}: expected an image and its class, found {', '.join(row)[:80]!r}")
    if not found:
        raise DataError(f"{file} has no labels: write one line for each image, 'path label'")
    return [(row[0].strip(), row[1].strip()) for _, row in found]


def _split(line: str) -> list[str]:
    """A path, which may have spaces, and what follows the last one."""
    return line.strip().rsplit(maxsplit=1)


def _read(file: str | PathLike[str]) -> str:
    try:
        return Path(file).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error


@functools.cache
def _imagenet(outputs: int) -> dict[str, int]:
    """Indices by wnid of the ImageNet list with so many names; empty where there is none."""
    subset = infer_imagenet_subset({"num_classes": outputs})
    return {} if subset is None else {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())}
