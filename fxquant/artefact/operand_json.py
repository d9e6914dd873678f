"""Operands of a node as JSON values, and back: what they hold, what they may become and what they got.

Not kept: candidates and scores, which `searched_graph` writes. Files written before nodes had operands say the widths
of the weight, of all inputs and of a left input; what their operands held is not known.
"""

from __future__ import annotations

from typing import Any

from fxquant.checks.untrusted import FLAG, NOTHING, OBJECT, TEXT, Rule, checked, choice, either, listed, record, whole
from fxquant.errors import ArtefactError, PatternError
from fxquant.graph.annotation import Allowed, Operand, Role, Source
from fxquant.quantizers.families import families_named, text_of

_COUNT, _BITS = whole(), whole(1, 32)
_OPERAND = {"argument": either(NOTHING, whole(0, 1)), "source": choice(*map(str, Source)), "elements": _COUNT}
_OPTIONS = {"families": TEXT, "tied": FLAG, "bits": _BITS, "pinned": FLAG}
OPERANDS = listed(OBJECT, longest=2)
WITHOUT_OPERANDS: dict[str, Rule] = {
    "parameters": _COUNT, "activation_elements": _COUNT, "left_elements": _COUNT, "weight_bits": _BITS,
    "activation_bits": _BITS, "left_bits": _BITS, "pinned": FLAG,
}  # fmt: skip
"""What files said of a node before it had operands."""


def operand_to_json(operand: Operand) -> dict[str, Any]:
    """JSON values from which `operand_from_json` makes an equal operand, but for its candidates and scores."""
    found: dict[str, Any] = {"argument": operand.argument, "source": str(operand.source), "elements": operand.elements}
    rest = {"families": text_of(operand.families), "tied": operand.tied, "bits": operand.bits, "pinned": operand.pinned}
    return found | {name: value for name, value in rest.items() if value}


def operands_from_json(values: Any, where: str) -> tuple[Operand, ...]:
    """The operands. Raises ArtefactError, naming `where`, for anything else."""
    return tuple(_operand(item, where) for item in checked(values, OPERANDS, f"{where}: operands"))


def families_from_json(text: str, where: str) -> tuple[Allowed, ...]:
    """Families by name, "log2<=4|twin-softmax"; none in "". Raises ArtefactError, naming `where`."""
    try:
        return families_named(text) if text else ()
    except PatternError as error:
        raise ArtefactError(f"{where}: {error}") from error


def operands_of_before(notes: dict[str, Any], role: Role | None) -> tuple[Operand, ...]:
    """The operands of a node in a file that says only what all inputs together got.

    notes: of `WITHOUT_OPERANDS`, checked.
    """
    elements, left = notes.get("activation_elements", 0), notes.get("left_elements", 0)
    bits, pinned = notes.get("activation_bits"), notes.get("pinned", False)
    is_product = role is not None and role.is_matmul
    found = [Operand(int(is_product), Source.OTHER, elements - left, bits=bits, pinned=pinned)]
    if is_product:
        found.insert(0, Operand(0, Source.OTHER, left, bits=notes.get("left_bits", bits), pinned=pinned))
    if role is not None and role.has_weight:
        weight_bits = notes.get("weight_bits")
        found.insert(0, Operand(None, Source.WEIGHT, notes.get("parameters", 0), bits=weight_bits, pinned=pinned))
    return tuple(found)


def _operand(values: Any, where: str) -> Operand:
    read = record(values, _OPERAND, f"{where}: an operand", _OPTIONS)
    families = families_from_json(read.get("families", ""), where)
    return Operand(**{**read, "source": Source(read["source"]), "families": families})
