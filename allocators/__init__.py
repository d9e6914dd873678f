"""Bit allocation as numbers: a `CostTable` and a `Budget` in, an `Allocation` out; no torch, no graphs.

An allocator is one module of this package. It has a frozen dataclass with a method `allocate`, and where the command
line is to know it, by the module's name, a last line such as

    ALLOCATOR = Greedy()

docs/how_to/adding_an_allocator.md builds one.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from fxquant.errors import BudgetError

if TYPE_CHECKING:
    from allocators.allocator import Allocator


def _modules() -> tuple[str, ...]:
    """Modules with a line that begins with `ALLOCATOR =`; looked up in their text, since importing a solver is slow."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        text = b"" if module.ispkg else pkgutil.get_data(__name__, f"{module.name}.py")
        if b"\nALLOCATOR = " in (text or b""):
            found.append(module.name)
    return tuple(found)


ALLOCATORS = _modules()
"""Names of the allocators that need no further word, as `allocator_named` takes them."""


def allocator_named(name: str) -> Allocator:
    """The allocator of this name, with its usual options. Raises BudgetError for a name that none has."""
    if name not in ALLOCATORS:
        raise BudgetError(f"no allocator is called {name!r}; there are {', '.join(ALLOCATORS)}")
    found: Allocator = importlib.import_module(f"{__name__}.{name}").ALLOCATOR
    return found
