"""Attention probabilities with bits of their own: allocation, accounting, what is put into the graph, how it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fxquant
from fxquant.errors import BudgetError, InfeasibleBudgetError, OverrideError
from fxquant.graph.annotation import Role, annotation_of, nodes_with_role
from fxquant.graph.printer import format_graph
from fxquant.quantizers.row_log import RowLogQuantizer
from fxquant.report.actions import actions_for
from fxquant.report.picture import to_svg
from fxquant.report.totals import Totals, bit_operations
from fxquant.runtime.simulated import QuantizedMatmul
from passes.allocate.allocate_bits import ALLOCATION, AllocateBits
from passes.recipes import best
from passes.recipes.lampq import lampq
from tests.lowering import needs_kernels
from tests.models import images, vit


@pytest.fixture(scope="module")
def narrow() -> fxquant.Compiled:
    return fxquant.compile(vit(), "W3A3", calibration=images())


def test_they_get_two_bits_and_the_rest_gets_what_they_save(narrow: fxquant.Compiled) -> None:
    rows = [row for row in narrow.layers if row.role == "av"]
    assert rows
    assert {row.left_bits for row in rows} == {2}
    assert all(row.activation_bits is not None and row.activation_bits >= 3 for row in rows)
    assert all(row.left_bits is None for row in narrow.layers if row.role != "av")
    assert max(row.activation_bits or 0 for row in narrow.layers if row.role not in ("patch_embed", "head")) > 3
    for node in nodes_with_role(narrow.graph_module, Role.AV):
        module = narrow.graph_module.get_submodule(str(node.target))
        assert isinstance(module, QuantizedMatmul)
        assert isinstance(module.left_quantizer, RowLogQuantizer)
        assert module.left_quantizer.bits == 2
        assert module.right_quantizer is not None
        assert module.right_quantizer.bits == annotation_of(node).activation_bits


def test_every_element_counts_once(narrow: fxquant.Compiled) -> None:
    """Mean bits and bit operations, added up by hand."""
    bits = elements = operations = 0
    for row in narrow.layers:
        right = row.activation_bits or 0
        left = right if row.left_bits is None else row.left_bits
        if row.role != "patch_embed":
            bits += row.left_elements * left + (row.activation_elements - row.left_elements) * right
            elements += row.activation_elements
        operations += row.macs * right * (row.weight_bits or left)
    assert narrow.allocation is not None
    assert narrow.allocation.usage["mean_activation_bits"] == pytest.approx(bits / elements)
    assert bits / elements <= 3
    assert narrow.allocation.usage["bit_operations"] == operations == sum(map(bit_operations, narrow.layers))
    totals = Totals.of(narrow.layers, None, narrow.card)
    assert totals.bit_operations == operations
    assert totals.mean_activation_bits == pytest.approx(bits / elements)


def test_left_elements_are_the_probabilities(narrow: fxquant.Compiled) -> None:
    model = vit()
    tokens, heads = model.pos_embed.shape[1], model.blocks[0].attn.num_heads
    rows = [row for row in narrow.layers if row.role == "av"]
    assert {row.left_elements for row in rows} == {heads * tokens**2}


def test_the_graph_and_the_report_show_both_widths(narrow: fxquant.Compiled) -> None:
    right = {row.activation_bits for row in narrow.layers if row.role == "av"}.pop()
    assert f"= av[a2x{right}]" in format_graph(narrow.graph_module)
    assert f"2x{right}" in str(narrow.report())
    assert f"2x{right}" in to_svg(narrow.graph_module)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("W3A3", 2),
        ("W4A3.4", 2),
        ("W4A4", 3),
        ("W4A5", None),
        ("W8A8", None),
        ("2MB", None),
        ("MP3", 2),
        ("MP4", 3),
        ("MP6", None),
    ],
)
def test_the_recipe_narrows_them_where_activations_are_narrow(budget: str, expected: int | None) -> None:
    (allocate,) = (step for step in best(budget) if isinstance(step, AllocateBits))
    assert allocate.softmax_bits == expected


def test_candidate_widths_decide() -> None:
    def chosen(budget: str, bits: tuple[int, ...]) -> int | None:
        return next(step.softmax_bits for step in best(budget, bits=bits) if isinstance(step, AllocateBits))

    assert chosen("W4A4", (2, 4, 8)) is None, "no candidate between 3 and 4"
    assert chosen("W3A3", (2, 4, 8)) == 2


def test_overrides_reach_them_by_a_name_of_their_own() -> None:
    overrides = {"blocks.0.attn.av.softmax": 5, "blocks.1.attn.av": 6}
    found = fxquant.compile(vit(), "W4A4", calibration=images(), overrides=overrides)
    rows = {row.layer: row for row in found.layers}
    assert rows["blocks.0.attn.av"].left_bits == 5
    assert (rows["blocks.1.attn.av"].left_bits, rows["blocks.1.attn.av"].activation_bits) == (3, 6)
    by_role = fxquant.compile(vit(), "W8A6", calibration=images(), overrides={"av": 4})
    assert {row.activation_bits for row in by_role.layers if row.role == "av"} == {4}
    with pytest.raises(OverrideError, match="candidates"):
        fxquant.compile(vit(), "W4A4", calibration=images(), overrides={"*.softmax": 9})


def test_an_impossible_budget_is_refused_before_calibration() -> None:
    overrides = {"*.softmax": 8, "qk": 8, "av": 8}
    with pytest.raises(InfeasibleBudgetError, match="A"):
        fxquant.compile(vit(), "W4A3.2", calibration=images(), overrides=overrides)
    with pytest.raises(BudgetError, match="softmax_bits"):
        AllocateBits("W4A4", softmax_bits=9)  # type: ignore[arg-type]


@needs_kernels
def test_kernels_give_what_is_simulated(narrow: fxquant.Compiled, tmp_path) -> None:  # type: ignore[no-untyped-def]
    narrow.save(tmp_path / "narrow.fxq")
    loaded = fxquant.load(tmp_path / "narrow.fxq")
    x = images(6)
    torch.testing.assert_close(loaded(x), narrow(x))
    assert loaded.layers == narrow.layers
    lowered = narrow.lowered("cpu-native")
    assert all(row.execution != "simulated" for row in lowered.layers)
    torch.testing.assert_close(lowered(x), narrow(x), rtol=2e-2, atol=2e-2)


def test_other_allocations_leave_them_with_the_values() -> None:
    found = fxquant.compile(vit(), None, calibration=images(), recipe=lampq("W4A4", base=best))
    allocation = ALLOCATION.get(found.graph_module)
    assert allocation is not None
    for row in found.layers:
        if row.role == "av":
            assert row.left_bits in (None, row.activation_bits)


def test_what_to_do_names_the_narrow_side(narrow: fxquant.Compiled) -> None:
    rows = [replace(row, predicted_loss=1.0 if row.role == "av" else 1e-9) for row in narrow.layers]
    action = actions_for(rows, narrow.allocation)[0]
    assert (action.layer, action.bits) == ("blocks.0.attn.av.softmax", 4)
    assert action.extra_bytes == 0
    row = next(row for row in rows if row.role == "av")
    assert action.extra_bit_operations == 2 * row.macs * (row.activation_bits or 0)
    name, bits = action.command.removeprefix("--override ").split("=")
    again = fxquant.compile(vit(), "W3A3", calibration=images(), overrides={name: int(bits)})
    assert next(row for row in again.layers if row.role == "av").left_bits == 4
