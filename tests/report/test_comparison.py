"""Two reports side by side: as text, as values, as a page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxquant.errors import OptionError
from fxquant.report.comparison import Comparison
from fxquant.report.tables import Report
from tests.report.small_pages import HOSTILE
from tests.report.small_report import ALLOCATION, CARD, JOURNAL, ROWS, report, row

pytestmark = pytest.mark.quick


def comparison() -> Comparison:
    """Against a model whose fc1 has other bits, which has no head, and has one more layer."""
    rows = [r for r in ROWS if r.layer != "head"]
    rows[3] = replace(rows[3], operands=(replace(rows[3].operands[0], bits=6), rows[3].operands[1]))
    rows.append(row("extra", "linear", None, 4, 4, 500, 0.5))
    other = Report(rows, None, JOURNAL, {**CARD, "accuracy": {"top1": 71.5}})
    return Comparison(report(), other, ("a.fxq", "b.fxq"))


def test_only_layers_that_differ_are_listed() -> None:
    text = str(comparison())
    assert "Layers whose bits differ: 3 of 7" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ")}
    assert lines["blocks.0.mlp.fc1"][2:4] == ["3/4", "6/4"]
    assert lines["head"][-4:] == ["not", "there", "0.00e+00", "-"]
    assert lines["extra"][2:4] == ["not", "there"]
    assert "blocks.0.attn.qkv" not in lines
    assert lines["top-1"][-2:] == ["-", "71.50"]


def test_models_are_no_reports() -> None:
    with pytest.raises(OptionError, match="second must be a Report"):
        Comparison(report(), "b.fxq")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="names"):
        Comparison(report(), report(), ("one",))  # type: ignore[arg-type]


def test_values_are_those_of_the_text() -> None:
    found = comparison().to_dict()
    assert [entry["layer"] for entry in found["differences"]] == ["blocks.0.mlp.fc1", "head", "extra"]
    assert [model["budget"] for model in found["models"]] == ["W4.5A5.5", None]
    assert found["layers"] == 7


def test_a_page_of_both_escapes_their_names() -> None:
    hostile = Report([replace(ROWS[0], layer=HOSTILE)], ALLOCATION, JOURNAL, {**CARD, "model": HOSTILE})
    page = Comparison(report(), hostile, (HOSTILE, "b.fxq")).to_html()
    assert "<img" not in page
    assert "<script>" not in page
    assert page.count('class="cell changed"') == len(ROWS) + 1


def test_a_model_equals_itself() -> None:
    found = Comparison(report(), report())
    assert found.differences == []
    assert "The bits of both are alike." in found.to_html()
