"""The report: totals by hand, text by eye, JSON by schema."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from fxquant.commands.texts import parse_overrides
from fxquant.errors import ArtefactError
from fxquant.report import sections
from fxquant.report.actions import actions_for
from fxquant.report.render import plain
from fxquant.report.tables import Report
from fxquant.report.totals import Totals
from passes.pipeline.journal import Journal, JournalEntry
from tests.report.small_report import ALLOCATION, CARD, JOURNAL, ROWS, report

pytestmark = pytest.mark.quick


def test_totals_by_hand() -> None:
    totals = Totals.of(ROWS, None, CARD)
    weight_bytes = (1000 * 8 + 3000 * 4 + 4000 * 3 + 3000 * 4 + 1000 * 8) / 8
    assert totals.weight_bytes == weight_bytes
    assert totals.model_bytes == weight_bytes + 500 * 4
    assert totals.compression == pytest.approx(50_000 / (weight_bytes + 2000))
    assert totals.mean_weight_bits == pytest.approx(weight_bytes * 8 / 12_000)
    assert totals.mean_activation_bits == pytest.approx((5 + 5 + 4 + 4 + 8) / 5), "the image is not counted"
    assert totals.bit_operations == 1e6 * (64 + 20 + 25 + 12 + 16 + 64)
    assert totals.float_bit_operations == 6e6 * 1024
    assert Totals.of(ROWS, ALLOCATION, CARD).mean_activation_bits == 5.2, "averaged as the budget asks"


def test_header_and_grid_text() -> None:
    found = report().sections()
    assert plain(found[0]) == (
        "fxquant report\n"
        "  model       Tiny (12,500 parameters)\n"
        "  recipe      mptq_vit: AssignRoles > FoldSqb\n"
        "  budget      W4.5A5.5 (mean weight bits 4.333 of 4.5; mean activation bits 5.2 of 5.5)\n"
        "  allocation  optimal, found by milp; gap 0.10%; binding: mean weight bits\n"
        "  execution   simulated: right values in float arithmetic; loaded with a backend, it runs as integers"
    )
    assert plain(found[2]) == (
        "Bits (weight/activation)\n"
        "                    qkv   qk  fc1  outside blocks\n"
        "  ----------------  ---  ---  ---  --------------\n"
        "  block 0           4/5  -/5  3/4\n"
        "  block 1           4/4\n"
        "  patch_embed.proj                            8/8\n"
        "  head                                        8/8"
    )


def test_layer_line() -> None:
    lines = plain(sections.layer_table(ROWS, report().totals)).splitlines()
    assert len(lines) == 3 + len(ROWS)
    assert lines[3].split() == [
        "patch_embed.proj", "patch_embed", "8", "8", "20.0", "18.5", "1.00e-01", "10.0%", "15.4%", "pinned",
        "uniform,", "uniform", "simulated",
    ]  # fmt: skip
    assert lines[5].split()[2:] == ["-", "5", "-", "18.5", "3.00e-01", "30.0%", "-", "-,", "uniform", "simulated"]


def test_actions_are_overrides_that_the_command_line_reads() -> None:
    found = actions_for(ROWS, ALLOCATION)
    assert [action.layer for action in found] == ["blocks.0.mlp.fc1", "blocks.0.attn.qk", "blocks.0.attn.qkv"]
    first, matmul, _ = found
    assert (first.python, first.command) == (
        'overrides={"blocks.0.mlp.fc1": (5, 6)}',
        "--override blocks.0.mlp.fc1=5/6",
    )
    assert (first.extra_bytes, first.extra_bit_operations) == (4000 * 2 / 8, 1e6 * (30 - 12))
    assert (matmul.bits, matmul.extra_bytes) == (7, 0)
    text = [action.command.removeprefix("--override ") for action in found]
    assert parse_overrides(text) == {action.layer: action.bits for action in found}


def test_a_card_may_say_nothing() -> None:
    names = ("pipeline", "first_last_weight_bits", "versions", "stays_float", "objective", "preprocessing", "recipe")
    found = Report(ROWS, ALLOCATION, JOURNAL, CARD | dict.fromkeys(names))
    assert "no such layers" in str(found)
    assert "stays float" in found.to_html()


def test_actions_ask_for_candidates_alone() -> None:
    table = {"cost_table": {"bits": [3, 4, 5, 8]}}
    journal = Journal([*JOURNAL.entries, JournalEntry("AllocateBits()", 0, 0.1, 1.0, table)])
    found = Report(ROWS, ALLOCATION, journal, CARD).actions
    assert [(action.layer, action.bits) for action in found] == [
        ("blocks.0.mlp.fc1", (5, 8)), ("blocks.0.attn.qk", 8), ("blocks.0.attn.qkv", 8)
    ]  # fmt: skip
    with pytest.raises(ArtefactError, match="widths in the journal's cost table"):
        Report(
            ROWS, ALLOCATION, Journal([JournalEntry("AllocateBits()", 0, 0.1, 1.0, {"cost_table": {"bits": 3}})]), {}
        )


def test_nothing_to_do_at_eight_bits() -> None:
    wide = [row for row in ROWS if row.weight_bits == 8]
    assert actions_for(wide, None) == []
    assert "nothing" in plain(sections.actions([]))


def test_text_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        texts.append(str(report()))
    assert texts[0] == texts[1]
    assert "\x1b" not in texts[0]
    assert all(line == line.rstrip() for line in texts[0].splitlines())


def test_rich_has_colours_and_all_text() -> None:
    wide = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=250)
    wide.print(report())
    text = wide.file.getvalue()  # type: ignore[attr-defined]
    assert "48;2;253;174;97" in text, "4 bits have a colour"
    assert "blocks.0.mlp.fc1=5/6" in text
    narrow = Console(file=io.StringIO(), width=60)
    narrow.print(report())
    assert "quantizers W, A" in narrow.file.getvalue()  # type: ignore[attr-defined]


def test_brief_leaves_the_layers_out() -> None:
    assert "W SQNR dB" in str(report())
    assert "W SQNR dB" not in str(report().brief())


def test_json() -> None:
    found = json.loads(json.dumps(report().to_dict()))
    assert set(found) == {"model", "budget", "allocation", "totals", "layers", "actions", "card", "journal"}
    assert found["budget"] == "W4.5A5.5"
    assert len(found["layers"]) == len(ROWS)
    assert {"layer", "weight_bits", "weight_bytes", "loss_share", "bytes_share", "pinned"} <= set(found["layers"][0])
    assert sum(layer["loss_share"] for layer in found["layers"]) == pytest.approx(1)
    assert found["layers"][2]["weight_bytes"] == 0
    assert found["actions"][0]["command"].startswith("--override ")
    assert found["journal"][0]["step"] == "AssignRoles()"


def test_empty_and_unallocated() -> None:
    text = str(Report([], None, Journal(), {}))
    assert "none: bits were not allocated" in text
    assert "unknown (0 parameters)" in text


@pytest.mark.parametrize(("name", "value"), [("versions", ["x"]), ("pipeline", "x"), ("parameters", "many")])
def test_a_card_of_the_wrong_shape(name: str, value: object) -> None:
    with pytest.raises(ArtefactError, match=f"the card's '{name}' is .*, not "):
        Report(ROWS, ALLOCATION, JOURNAL, {**CARD, name: value})


def test_random_weights_are_said_loudly() -> None:
    assert "RANDOM" in str(Report(ROWS, ALLOCATION, JOURNAL, {**CARD, "weights": "random"}))
