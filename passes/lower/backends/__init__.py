"""One module a backend, which ends in `BACKEND = Backend(...)`; whoever asks for names, help or values asks here.

A backend is added by adding its module (docs/how_to/adding_a_backend.md). Names are those of the modules, so that the
command line can list them without importing any.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING

from fxquant.errors import BackendError

if TYPE_CHECKING:
    from passes.lower.backend import Backend

AUTO = "auto"

_REGISTERED: list[str] = []


def backend_names() -> tuple[str, ...]:
    """All names that a user can write, "auto" first."""
    return AUTO, *(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)), *_REGISTERED


@functools.cache
def backends() -> dict[str, Backend]:
    """All backends by name, in the order of `backend_names`; "auto" is none of them."""
    names = backend_names()[1:]
    modules = (importlib.import_module(f"{__name__}.{name.replace('-', '_')}") for name in names)
    return dict(zip(names, (module.BACKEND for module in modules), strict=True))


def register(backend: Backend) -> None:
    """Let a backend be named that is no module of this room. Raises BackendError for a name that is taken."""
    if backend.name in backend_names():
        raise BackendError(f"a backend is called {backend.name!r} already: give this one another name")
    backends()[backend.name] = backend
    _REGISTERED.append(backend.name)


def forget(name: str) -> None:
    """Take back what `register` did. Raises BackendError for a name that was not registered."""
    if name not in _REGISTERED:
        raise BackendError(f"no backend called {name!r} was registered")
    _REGISTERED.remove(name)
    del backends()[name]
