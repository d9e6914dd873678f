"""Which images a folder has, and what says their classes: sub-folders, or a file of labels beside them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from fxquant.data.class_names import read_labels
from fxquant.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})


def images_by_folder(place: Path) -> tuple[list[Path], list[str] | None]:
    """The images of a folder, and the name of each one's class folder; None without class folders.

    Raises DataError where images and class folders are mixed, where there are none, and for an empty class folder.
    """
    folders = sorted(folder for folder in place.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    by_class = [_images_in(folder, deep=True) for folder in folders]
    flat = _images_in(place, deep=False)
    if any(by_class) and flat:
        raise DataError(
            f"{place} has images beside class folders: move them into folders, the folders away, or say which image is "
            f"of which class in a file of labels"
        )
    files = flat or [file for found in by_class for file in found]
    if not files:
        raise DataError(f"{place} has no images (looked for {', '.join(sorted(SUFFIXES))})")
    if empty := [folder.name for folder, found in zip(folders, by_class, strict=True) if not found and not flat]:
        raise DataError(f"{place}: no images in class folder {empty[0]!r}, which would still take a label; remove it")
    named = [folder.name for folder, found in zip(folders, by_class, strict=True) for _ in found]
    return files, None if flat else named


def listed_images(place: Path, labels: str | PathLike[str]) -> tuple[list[Path], list[str]]:
    """The images that a file of labels names, below a folder, and the label of each as text.

    Raises DataError where one is not there, and as `read_labels`.
    """
    rows = read_labels(labels)
    files = [place / name for name, _ in rows]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(f"{labels}: {len(missing)} of {len(files)} images are not there, such as {missing[0]}")
    return files, [label for _, label in rows]


def _images_in(folder: Path, deep: bool) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(file for file in found if file.suffix.lower() in SUFFIXES and file.is_file())
