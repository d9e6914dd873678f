"""`fxquant doctor`: what this installation has, what will run here, and what to install for the rest."""

from __future__ import annotations

from typing import Any

from fxquant.commands.options import Json


def doctor(json: Json = False) -> None:
    """Show kernels and instruction sets, devices, backends, extras, the cache and threads of this installation."""
    from fxquant.commands.console import emit, show_list

    found = examined()
    if json:
        emit(found)
        return
    kernels, cache, threads = found["kernels"], found["cache"], found["threads"]
    sets = [f"{name} (in use)" if name == kernels["in_use"] else name for name in kernels["run_here"]]
    show_list(
        "This installation",
        {
            "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
            "kernels": kernels["why_absent"] or f"present; this processor runs {', '.join(sets)}",
            "speed": kernels["speed"],
            "cache": f"{cache['folder']}: {cache['bytes'] / 1e6:.1f} MB in {cache['files']} files, "
            + ("writable" if cache["writable"] else "NOT writable: give another folder with --cache"),
            "threads": f"torch uses {threads['torch']} of {threads['processors']} processors",
        },
    )
    show_list("\nDevices", found["devices"])
    show_list(
        "\nBackends",
        {
            each["name"]: f"runs here: {each['summary']}"
            if each["runs"]
            else f"does not run here: {each['why_absent']}"
            for each in found["backends"]
        },
    )
    show_list(
        "\nExtras",
        {
            each["name"]: "installed" if each["installed"] else f"not installed: {each['install']}"
            for each in found["extras"]
        },
    )


def examined() -> dict[str, Any]:
    """All that the command shows, as JSON values."""
    import os
    import platform

    import torch

    from fxquant import __version__
    from fxquant.checks.devices import devices
    from passes.lower.backends import backends

    versions = {"fxquant": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    absent = {name: backend.why_absent() for name, backend in backends().items()}
    return {
        "versions": versions,
        "kernels": _kernels(),
        "devices": devices(),
        "backends": [
            {"name": name, "summary": backend.summary, "runs": absent[name] is None,
             "why_absent": None if absent[name] is None else str(absent[name])}
            for name, backend in backends().items()
        ],
        "extras": _extras(),
        "cache": _cache(),
        "threads": {"torch": torch.get_num_threads(), "processors": os.cpu_count() or 1},
    }  # fmt: skip


def _kernels() -> dict[str, Any]:
    from fxquant.runtime.native import library

    why = library.why_absent()
    if why is not None:
        slow = "without kernels, models run simulated, which is slower than float32"
        return {"present": False, "why_absent": why, "run_here": [], "in_use": None, "speed": slow}
    return {
        "present": True,
        "why_absent": None,
        "run_here": list(library.instruction_sets()),
        "in_use": library.instruction_set(),
        "speed": library.speed_of_widths(),
    }


def _extras() -> list[dict[str, Any]]:
    """Optional parts of the package as its metadata list them, and which of their packages are missing."""
    import importlib.metadata
    import re

    try:
        needed = importlib.metadata.requires("fxquant") or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        needed = []
    packages: dict[str, list[str]] = {}
    for text in needed:
        if found := re.match(r"([A-Za-z0-9._-]+).*;.*extra == ['\"]([^'\"]+)['\"]", text):
            packages.setdefault(found[2], []).append(found[1])
    rows = []
    for name, wanted in packages.items():
        missing = [package for package in wanted if not _is_installed(package)]
        install = f"pip install 'fxquant[{name}]'"
        rows.append({"name": name, "installed": not missing, "missing": missing, "install": install})
    return rows


def _is_installed(package: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cache() -> dict[str, Any]:
    import os

    from fxquant.artefact.cache import user_folder

    folder = user_folder()
    try:
        sizes = [file.stat().st_size for file in folder.glob("*") if file.is_file()]
        above = next((place for place in (folder, *folder.parents) if place.exists()), folder)
        is_writable = above.is_dir() and os.access(above, os.W_OK)
    except OSError:  # a folder that may not be read, or a file that another process has just removed
        sizes, is_writable = [], False
    return {"folder": str(folder), "files": len(sizes), "bytes": sum(sizes), "writable": is_writable}
