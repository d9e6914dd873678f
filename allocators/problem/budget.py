"""A budget says how much an allocation may use: mean bits, bytes, bit operations, any of them together.

    mean bits = sum_l n_l * b_l / sum_l n_l    (n_l: elements of layer l, or 1 for a plain mean over layers)

Sources: MPTQ-ViT and LampQ (mean bits), Mix-QViT (model size and bit operations).
A latency holds for the batch size, threads and machine of the table of latencies it is compared with.
"""

from __future__ import annotations

import difflib
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, Self

from fxquant.checks.arguments import number, shown, whole
from fxquant.checks.hints import fitted
from fxquant.errors import BudgetError

Mean = Literal["elements", "layers"]

QUANTITIES: Final = ("mean_weight_bits", "mean_activation_bits", "weight_bytes", "bit_operations", "latency_ms")
"""The budgeted quantities, in the order used by every array of usages."""

TOLERANCE: Final = 1e-9
"""Relative excess over a limit that is put down to rounding."""

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_TOKEN = re.compile(
    rf"MP(?P<uniform>\d+)"
    rf"|(?P<operand>[WA])(?P<bits>{_NUMBER})(?:/(?P<mean>layers|elements))?"
    rf"|(?P<amount>{_NUMBER})\s*(?P<unit>[KMGT]?BOPs?|[KMGT]i?B|B|ms)",
    re.IGNORECASE,
)
_SEPARATORS = re.compile(r"[\s,+]*")
_BYTE_UNITS = {"GB": 1e9, "MB": 1e6, "KB": 1e3, "B": 1.0}
_BINARY_UNITS = {"KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40, "TB": 1e12}
_OPERATION_UNITS = {"TBOPs": 1e12, "GBOPs": 1e9, "MBOPs": 1e6, "KBOPs": 1e3, "BOPs": 1.0}
_UNITS = _BYTE_UNITS | _BINARY_UNITS | {unit.upper(): scale for unit, scale in _OPERATION_UNITS.items()}
_EXAMPLES = "'W4A4', 'w3.5a5', 'W4', 'A6/layers', 'MP4', '6MB', '1.5MiB', '2.1GBOPs', '5ms' or a mix, 'W4A4, 6MB'"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper limits on an allocation; `None` leaves a quantity free.

    Args:
        mean_weight_bits: mean bits per weight.
        mean_activation_bits: mean bits per quantized activation.
        weight_bytes: bytes of all quantized weights, without scales.
        bit_operations: sum over layers of MACs * weight bits * activation bits.
        latency_ms: predicted time of one batch on integer kernels, ms.
        like_uniform_bits: no more weight bytes and no more bit operations than the uniform model of this width
            has ("MP4", Mix-QViT's "*" rows); `allocators.problem.uniform_limits.in_numbers` puts them into numbers.
        weight_mean: weigh layers by their number of weights ("elements") or equally ("layers").
        activation_mean: the same for activations.

    Raises:
        BudgetError: no quantity is set, or one is not a finite positive number.

    >>> Budget.parse("W4A4, 6MB")
    Budget(mean_weight_bits=4.0, mean_activation_bits=4.0, weight_bytes=6000000.0, bit_operations=None, \
latency_ms=None, like_uniform_bits=None, weight_mean='elements', activation_mean='elements')
    >>> str(Budget.parse({"mean_weight_bits": 3.5, "bit_operations": 2.1e9}))
    'W3.5, 2.1GBOPs'
    """

    mean_weight_bits: float | None = None
    mean_activation_bits: float | None = None
    weight_bytes: float | None = None
    bit_operations: float | None = None
    latency_ms: float | None = None
    like_uniform_bits: int | None = None
    weight_mean: Mean = "elements"
    activation_mean: Mean = "elements"

    def __post_init__(self) -> None:
        """Check every field and store every number as a float."""
        for quantity in QUANTITIES:
            value = getattr(self, quantity)
            if value is None:
                continue
            limit = number(quantity, value, BudgetError)
            if limit <= 0:
                raise BudgetError(f"{quantity} must be finite and positive, found {limit!r}")
            object.__setattr__(self, quantity, limit)
        width = self.like_uniform_bits
        if width is not None:
            object.__setattr__(self, "like_uniform_bits", whole("like_uniform_bits", width, BudgetError, 1, 32))
        if width is None and not self.limits:
            raise BudgetError(f"a budget needs at least one of {', '.join(QUANTITIES)}, or like_uniform_bits")
        for name in ("weight", "activation"):
            mean = getattr(self, f"{name}_mean")
            fitted(f"{name}_mean", mean, Mean, BudgetError)
            if mean == "layers" and getattr(self, f"mean_{name}_bits") is None:
                raise BudgetError(f"{name}_mean='layers' says how mean_{name}_bits is averaged, which is not set")

    @property
    def limits(self) -> dict[str, float]:
        """The quantities that are set, with their limits.

        Raises:
            BudgetError: like_uniform_bits has not been put into numbers.
        """
        if self.like_uniform_bits is not None and None in (self.weight_bytes, self.bit_operations):
            raise BudgetError(f"the limits of {self} follow from a cost table: use in_numbers(budget, table)")
        return {quantity: getattr(self, quantity) for quantity in QUANTITIES if getattr(self, quantity) is not None}

    def exceeded(self, usage: Mapping[str, float]) -> list[str]:
        """The quantities whose `usage` is above its limit by more than rounding."""
        return [quantity for quantity, limit in self.limits.items() if usage[quantity] > limit * (1 + TOLERANCE)]

    @classmethod
    def parse(cls, value: Budget | float | str | Mapping[str, Any]) -> Budget:
        """Read a budget from a short form: a number (W and A alike), a string, a mapping of fields, or a Budget.

        MB is 1e6 bytes, MiB 2**20 bytes, ms a latency; a comma, a space or "+" joins tokens; case does not matter.

        Raises:
            BudgetError: the value cannot be read; the message shows the forms that can.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, str):
            return cls._from_text(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise BudgetError.for_type(f"a budget must be a number, text, a mapping or a Budget, found {shown(value)}")
        return cls(mean_weight_bits=value, mean_activation_bits=value)

    @classmethod
    def _from_text(cls, text: str) -> Budget:
        stripped = text.strip()
        if re.fullmatch(_NUMBER, stripped, re.IGNORECASE):
            return cls.parse(float(stripped))
        found: dict[str, Any] = {}
        position = 0
        while position < len(stripped):
            token = _TOKEN.match(stripped, position)
            if token is None:
                raise BudgetError(f"cannot read {stripped[position:]!r} in the budget {text!r}; write {_EXAMPLES}")
            for name, amount in _fields_of(token):
                if name in found:
                    raise BudgetError(f"the budget {text!r} sets {name} twice; keep one")
                found[name] = amount
            separator = _SEPARATORS.match(stripped, token.end())
            position = separator.end() if separator else token.end()
        if not found:
            raise BudgetError(f"the budget {text!r} is empty; write {_EXAMPLES}")
        return cls(**found)

    def to_dict(self) -> dict[str, float | str | None]:
        """All fields by name, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            BudgetError: a name is not a field, or a value is out of range.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise BudgetError(f"{name!r} is not a budget field{hint} (fields: {', '.join(names)})")
        return cls(**values)

    def __str__(self) -> str:
        """The short form that `parse` reads back to an equal budget."""
        uniform = "" if self.like_uniform_bits is None else f"MP{self.like_uniform_bits}"
        operands = ""
        for letter, bits, mean in (
            ("W", self.mean_weight_bits, self.weight_mean),
            ("A", self.mean_activation_bits, self.activation_mean),
        ):
            if bits is not None:
                operands += f"{letter}{_shortest(bits)}" + ("/layers" if mean == "layers" else "")
        amounts = (
            _with_unit(self.weight_bytes, _BYTE_UNITS),
            _with_unit(self.bit_operations, _OPERATION_UNITS),
            "" if self.latency_ms is None else f"{_shortest(self.latency_ms)}ms",
        )
        return ", ".join(part for part in (uniform, operands, *amounts) if part)


def _fields_of(token: re.Match[str]) -> Iterable[tuple[str, Any]]:
    """The budget fields that one token of the short form sets."""
    if token["uniform"]:
        yield "like_uniform_bits", int(token["uniform"][:9])  # Python reads no int of thousands of digits
        return
    if token["operand"]:
        name = "weight" if token["operand"] in "Ww" else "activation"
        yield f"mean_{name}_bits", float(token["bits"])
        if token["mean"]:
            yield f"{name}_mean", token["mean"].lower()
        return
    unit = token["unit"].upper().replace("BOPS", "BOP")
    if unit == "MS":
        yield "latency_ms", float(token["amount"])
    elif unit.endswith("BOP"):
        yield "bit_operations", float(token["amount"]) * _UNITS[unit + "S"]
    else:
        yield "weight_bytes", float(token["amount"]) * _UNITS[unit]


def _shortest(number: float) -> str:
    """The shortest text that reads back to the same float."""
    return repr(number).removesuffix(".0")


def _with_unit(amount: float | None, units: Mapping[str, float]) -> str:
    """`amount` in the largest unit that reads back to the same float."""
    if amount is None:
        return ""
    for unit, scale in units.items():
        number = amount / scale
        if number >= 1 and number * scale == amount:
            return f"{_shortest(number)}{unit}"
    return f"{_shortest(amount)}B" + ("OPs" if units is _OPERATION_UNITS else "")
