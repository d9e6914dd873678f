"""The quantizer families by name: collected from the modules of this package, each of which ends in `FAMILIES`.

Sources: symmetric candidates, 100 equal steps of (0, 1.2 max|X| / 2^(b-1)] (MPTQ-ViT, section 4); OPT-m (eq. 6-8);
V-2SF and O-2SF (TSPTQ-ViT); log2 (FQ-ViT); log-sqrt2 (RepQ-ViT); AdaLog; codebooks (Lloyd; Max); row-log (ours,
`fxquant.quantizers.row_log`). What a family is: `fxquant.quantizers.family`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from fxquant import quantizers
from fxquant.errors import PatternError
from fxquant.graph.annotation import Allowed
from fxquant.quantizers.family import Family

WIDEST_BITS = 8

FAMILIES: dict[str, Family] = {}
"""Every family by its name."""

BYTE_FAMILIES: dict[str, int] = {}
"""Families that integer kernels read, and up to which width in bits."""

UNIFORM_FAMILIES: dict[str, int] = {}
"""Of these, the families whose bytes are levels as they are."""


def register(family: Family) -> None:
    """Let recipes and options name a family that is no module of this package. Raises PatternError for a name taken."""
    if family.name in FAMILIES:
        raise PatternError(f"a quantizer family is called {family.name!r} already: give this one another name")
    FAMILIES[family.name] = family
    if family.byte_bits:
        BYTE_FAMILIES[family.name] = family.byte_bits
    if family.is_uniform and family.byte_bits:
        UNIFORM_FAMILIES[family.name] = family.byte_bits


def families_named(text: str) -> tuple[Allowed, ...]:
    """`"log2<=4|twin-softmax"` as names and limits, 8 bits where there is none. Raises PatternError for others."""
    found = []
    for part in text.split("|"):
        name, _, widest = part.partition("<=")
        if name not in FAMILIES:
            raise PatternError(f"no quantizer family is called {name!r}; there are {', '.join(FAMILIES)}")
        if "<=" in part and widest not in map(str, range(1, WIDEST_BITS + 1)):
            raise PatternError(f"a family's widest width is a number of bits, such as log2<=4; found {part!r}")
        found.append(Allowed(name, int(widest or WIDEST_BITS)))
    return tuple(found)


def text_of(families: Sequence[Allowed]) -> str:
    """What `families_named` reads back."""
    limits = ("" if family.widest_bits == WIDEST_BITS else f"<={family.widest_bits}" for family in families)
    return "|".join(family.name + limit for family, limit in zip(families, limits, strict=True))


def _collect() -> None:
    """Register the families of every module of this package, in the order of their names."""
    found: list[Family] = []
    for module in pkgutil.iter_modules(quantizers.__path__, f"{quantizers.__name__}."):
        if not module.ispkg and module.name != __name__:
            found += getattr(importlib.import_module(module.name), "FAMILIES", ())
    for family in sorted(found, key=lambda family: family.name):
        register(family)


_collect()
