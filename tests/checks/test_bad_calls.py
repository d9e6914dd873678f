"""A few of the generated calls that are no good; benchmarks/bad_calls.py makes thousands."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from passes.search.calibrate import Calibrate
from tests.checks.bad_calls.entries import all_entries
from tests.checks.bad_calls.generator import CalibrationHasBegun, Outcome, bad_calls


def test_bad_calls_are_refused_by_typed_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object) -> NoReturn:
        raise CalibrationHasBegun

    entries = all_entries(tmp_path)
    monkeypatch.setattr(Calibrate, "apply", begun)
    monkeypatch.chdir(tmp_path)
    outcome = Outcome()
    for call in bad_calls(entries, 3 * len(entries), seed=0):
        outcome.add(call)
    assert not outcome.untyped
    assert not outcome.accepted
    assert sum(outcome.typed.values()) + outcome.harmless == 3 * len(entries)
