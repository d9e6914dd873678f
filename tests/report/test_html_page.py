"""The page without a browser: what it has, what it escapes, what it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fxquant.artefact.artefact import load_texts
from fxquant.errors import ArtefactError
from fxquant.report.tables import Report
from passes.pipeline.journal import Journal, JournalEntry
from tests.report.small_pages import HOSTILE, measured_compiled, small_compiled
from tests.report.small_report import ALLOCATION, CARD, JOURNAL, ROWS, report

OLD = Path(__file__).parents[1] / "artefact/files/vit_w4a4_format_1.fxq"


@pytest.mark.quick
def test_a_report_without_notes_says_what_it_lacks() -> None:
    page = report().to_html()
    assert "This file keeps no histograms" in page
    assert "This file keeps no cost table" in page
    assert "<script>" not in page, "there is nothing to try"
    assert "blocks.0.attn.qkv" in page


@pytest.mark.quick
def test_a_file_of_an_earlier_version_has_a_page() -> None:
    page = Report.of_texts(load_texts(OLD), str(OLD)).to_html()
    assert "This file keeps no cost table" in page


@pytest.mark.quick
def test_names_of_a_file_stay_text() -> None:
    rows = [replace(row, layer=f"{HOSTILE}{index}") for index, row in enumerate(ROWS)]
    page = Report(rows, ALLOCATION, JOURNAL, {**CARD, "model": HOSTILE, "recipe": HOSTILE}).to_html()
    assert "<img" not in page
    assert "<b>" not in page
    assert "{{ 7 * 7 }}" in page


@pytest.mark.quick
@pytest.mark.parametrize(
    ("notes", "text"),
    [
        ({"histograms": 3}, "the journal's histograms"),
        ({"histograms": {"head": [[0, 1, "value", [999] * 40]]}}, "the histogram of head"),
        ({"levels": {"head": ["<b>"]}}, "the journal's levels"),
        ({"cost_table": {}}, "not a cost table"),
        ({"importance": {"head": -1}}, "the journal's importance"),
        ({"realised_losses": {"head": [1, 2, 3]}}, "the journal's realised losses"),
    ],
)
def test_notes_that_no_pass_writes_are_refused(notes: dict[str, Any], text: str) -> None:
    journal = Journal([JournalEntry("SearchScales()", 1, 0.1, 1.0, notes)])
    with pytest.raises(ArtefactError, match=text):
        Report(ROWS, ALLOCATION, journal, CARD).to_html()
    with pytest.raises(ArtefactError, match="the card's times"):
        Report(ROWS, ALLOCATION, JOURNAL, {**CARD, "layer_times": {"layers": {}}}).to_html()


def test_the_page_holds_all_it_needs() -> None:
    page = small_compiled().report().to_html()
    assert not re.search(r"(?:src|href)=\"(?!#)", page), "no network"
    assert "style=" not in page.replace("style-src", ""), "its own policy would not let it in"
    policy = re.search(r'content="(default-src [^"]+)"', page)
    assert policy is not None
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy[1].replace("&#39;", "'")
    assert page.count('<svg class="histogram"') == sum(
        operand.bits is not None for row in small_compiled().layers for operand in row.operands
    )
    for section in ("bits", "totals", "frontier", "operands", "speed", "protocol", "journal"):
        assert f'<section id="{section}"' in page
    assert "this model</text>" in page


def test_choices_are_what_was_chosen() -> None:
    compiled = small_compiled()
    text = re.search(r'id="choices">(.*?)</script>', compiled.report().to_html(), re.DOTALL)
    assert text is not None
    data = json.loads(text[1])
    table = data["table"]
    first = {layer: row.operands[0].bits for layer, row in ((row.layer, row) for row in compiled.layers)}
    for index, layer in enumerate(table["layers"]):
        if table["elements"][0][index]:
            assert table["bits"][data["columns"][0][index]] == first[layer]
    assert data["limits"] == {"mean_weight_bits": 4, "mean_activation_bits": 4}


def test_realised_losses_stand_beside_predicted_ones() -> None:
    compiled = measured_compiled()
    found = next(e.notes["realised_losses"] for e in compiled.journal.entries if "realised_losses" in e.notes)
    row = next(row for row in compiled.layers if row.layer == "blocks.1.mlp.fc1")
    assert all(loss > 0 for loss in found[row.layer])
    page = compiled.report().to_html()
    assert "Realised loss" in page
    assert f"{found[row.layer][0]:.2e}" in page


@pytest.mark.quick
def test_importance_is_a_table_of_blocks_by_roles() -> None:
    notes = {"importance": {row.layer: 1 / len(ROWS) for row in ROWS}}
    page = Report(ROWS, ALLOCATION, Journal([JournalEntry("ScoreLayers()", 1, 0.1, 1.0, notes)]), CARD).to_html()
    assert "Relevance, % of all layers" in page
    assert "50.00" in page, "three of the six layers stand in block 0"


@pytest.mark.quick
def test_times_are_shown_with_what_they_are_of() -> None:
    times = {"layers": {"head": 0.25}, "whole_ms": 1.0, "of_what": "one image, a <fast> machine"}
    page = Report(ROWS, ALLOCATION, JOURNAL, {**CARD, "layer_times": times}).to_html()
    assert "0.250 ms, 25.0%" in page
    assert "one image, a &lt;fast&gt; machine" in page
