"""Errors have twins that are TypeErrors; a value fits its annotation, or the error says what was expected."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pytest

from fxquant import errors
from fxquant.checks.arguments import json_values, path, whole
from fxquant.checks.hints import check_fields
from fxquant.errors import CalibrationError, FxQuantError, OptionError
from passes.pipeline.progress import SilentProgress, reporter_of

pytestmark = pytest.mark.quick


class Named(Protocol):
    """What has a name."""

    def name(self) -> str:
        """The name."""


@dataclass(frozen=True)
class Options:
    """Options of every kind."""

    count: int = 1
    rate: float = 0.5
    mode: Literal["a", "b"] = "a"
    flag: bool = False
    widths: tuple[int, ...] = ()
    most: int | None = None
    named: Named | None = None

    def __post_init__(self) -> None:
        check_fields(self, OptionError)


@pytest.mark.parametrize(
    "error", [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, TypeError)]
)
def test_a_twin_is_caught_as_its_error_and_as_a_type_error(error: type[FxQuantError]) -> None:
    base = error.__bases__[0]
    assert issubclass(base, FxQuantError)
    raised = base.for_type("found None")
    assert (type(raised), str(raised)) == (error, "found None")
    assert type(pickle.loads(pickle.dumps(raised))) is error


@pytest.mark.parametrize(
    ("options", "is_type"),
    [
        ({"count": "1"}, True), ({"count": True}, True), ({"count": 1.0}, True), ({"rate": "x"}, True),
        ({"rate": float("nan")}, False), ({"rate": 10**400}, False), ({"mode": "c"}, False), ({"mode": 3}, True),
        ({"flag": 1}, True), ({"widths": 4}, True), ({"widths": (4, "4")}, True), ({"most": "x"}, True),
        ({"named": object()}, True), ({"named": Named}, True),
    ],
)  # fmt: skip
def test_fields_that_do_not_fit_are_named(options: dict[str, object], is_type: bool) -> None:
    with pytest.raises(OptionError, match=next(iter(options))) as raised:
        Options(**options)  # type: ignore[arg-type]
    assert isinstance(raised.value, TypeError) is is_type


def test_numbers_of_numpy_become_pythons() -> None:
    found = Options(count=np.int64(3), rate=np.float32(0.5), widths=[np.uint8(4), 5])  # type: ignore[arg-type]
    assert repr(found) == repr(Options(count=3, rate=0.5, widths=(4, 5)))


def test_limits_paths_and_json_values() -> None:
    with pytest.raises(CalibrationError, match="at least 1"):
        whole("batch_size", 0, CalibrationError, least=1)
    for bad in ("", "a\0b", b"a", 3, None):
        with pytest.raises(OptionError, match="cache"):
            path("cache", bad, OptionError)
    endless: list[object] = []
    endless.append(endless)
    for value in ({1: 2}, {"a": {1, 2}}, {"a": endless}, {"a": float("inf")}, [1]):
        with pytest.raises(OptionError, match="card"):
            json_values("card", value, OptionError)
    assert json_values("card", {"a": (np.int64(1), None)}, OptionError) == {"a": [1, None]}


def test_a_reporter_whose_steps_lack_a_method_is_named() -> None:
    class Mute:
        def track(self, label: str, total: int) -> None:
            """Nothing to report with."""

    with pytest.raises(OptionError, match="`track` of progress returns must be a ProgressTask, found None"):
        reporter_of(Mute()).track("x", 1)  # type: ignore[arg-type]
    assert isinstance(reporter_of(None), SilentProgress)
