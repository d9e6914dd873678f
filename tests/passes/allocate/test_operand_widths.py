"""Two inputs of a product with a width each: allocation, accounting, what is put into the graph, how it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fxquant
from allocators.uniform import Uniform
from fxquant.errors import InfeasibleBudgetError, OverrideError
from fxquant.graph.annotation import Role, annotation_of, nodes_with_role
from fxquant.graph.printer import format_graph
from fxquant.report.actions import actions_for
from fxquant.report.picture import to_svg
from fxquant.report.totals import Totals, bit_operations
from fxquant.runtime.layer_row import LayerRow
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedMatmul
from passes.recipes import best, mptq_vit
from passes.recipes.lampq import lampq
from passes.search.plan_operands import PlanOperands
from tests.models import images, vit

LEFT_AT_TWO = {"av.left": 2}


@pytest.fixture(scope="module")
def narrow() -> fxquant.Compiled:
    return fxquant.compile(vit(), "W3A3", calibration=images(), overrides=LEFT_AT_TWO)


def products(compiled: fxquant.Compiled, role: str = "av") -> list[LayerRow]:
    return [row for row in compiled.layers if row.role == role]


def test_what_one_input_saves_goes_to_others(narrow: fxquant.Compiled) -> None:
    assert {row.input_bits[0] for row in products(narrow)} == {2}
    assert all(row.operands[0].pinned and not row.operands[1].pinned for row in products(narrow))
    assert all(row.input_bits[1] >= 3 for row in products(narrow))
    assert max(row.activation_bits or 0 for row in narrow.layers if row.role not in ("patch_embed", "head")) > 3
    for node in nodes_with_role(narrow.graph_module, Role.AV):
        module = narrow.graph_module.get_submodule(str(node.target))
        assert isinstance(module, QuantizedMatmul)
        assert module.operand_bits() == (None, annotation_of(node).input_bits)


def test_the_program_chooses_both_where_they_are_free_and_one_where_they_are_tied() -> None:
    found = fxquant.compile(vit(), "W4A4", calibration=images())
    assert found.allocation is not None
    for row in products(found):
        widths = tuple(found.allocation.activation_bits[f"{row.layer}.{place}"] for place in ("left", "right"))
        assert row.input_bits == widths
        assert row.layer not in found.allocation.activation_bits
    for row in products(found, "qk"):
        assert row.input_bits == (found.allocation.activation_bits[row.layer],) * 2
    tied = fxquant.compile(vit(), None, calibration=images(), recipe=mptq_vit("W4A4"))
    assert all(len(set(row.input_bits)) == 1 for role in ("av", "qk") for row in products(tied, role))


def test_free_widths_promise_no_more_loss_than_tied_ones() -> None:
    free = best("W4A4")
    tied = free.changed(PlanOperands, tied=(Role.QK, Role.AV))
    losses = []
    for recipe in (free, tied):
        allocation = fxquant.compile(vit(), None, calibration=images(), recipe=recipe).allocation
        assert allocation is not None
        losses.append(allocation.objective)
    assert losses[0] <= losses[1] * (1 + 1e-4)


def test_every_element_counts_once(narrow: fxquant.Compiled) -> None:
    """Mean bits and bit operations, added up by hand."""
    bits = elements = operations = 0
    for row in narrow.layers:
        first, second = row.operands
        operations += row.macs * (first.bits or 32) * (second.bits or 32)
        for operand in row.inputs if row.role != "patch_embed" else ():
            bits += operand.elements * (operand.bits or 0)
            elements += operand.elements
    assert narrow.allocation is not None
    assert narrow.allocation.usage["mean_activation_bits"] == pytest.approx(bits / elements)
    assert bits / elements <= 3
    assert narrow.allocation.usage["bit_operations"] == operations == sum(map(bit_operations, narrow.layers))
    totals = Totals.of(narrow.layers, None, narrow.card)
    assert totals.bit_operations == operations
    assert totals.mean_activation_bits == pytest.approx(bits / elements)


def test_the_left_input_of_the_second_product_are_the_probabilities(narrow: fxquant.Compiled) -> None:
    model = vit()
    tokens, heads = model.pos_embed.shape[1], model.blocks[0].attn.num_heads
    for row in products(narrow):
        left, right = row.operands
        assert (left.source, left.elements) == ("post_softmax", heads * tokens**2)
        assert (right.source, right.elements) == ("other", tokens * model.embed_dim)


def test_the_graph_and_the_report_show_both_widths(narrow: fxquant.Compiled) -> None:
    right = next(row.input_bits[1] for row in products(narrow))
    assert f"= av[a2x{right}]" in format_graph(narrow.graph_module)
    assert f"2x{right}" in str(narrow.report())
    assert f"2x{right}" in to_svg(narrow.graph_module)


def test_overrides_reach_one_input_by_name_role_and_glob() -> None:
    overrides = {"blocks.*.av.left": 6, "blocks.0.attn.av.left": 5, "blocks.1.attn.av.right": 8, "qk": 7}
    found = fxquant.compile(vit(), "W4A8", calibration=images(), overrides=overrides, allocator=Uniform())
    rows = {row.layer: row.input_bits for row in found.layers}
    assert rows["blocks.0.attn.av"] == (5, 8)
    assert rows["blocks.1.attn.av"] == (6, 8)
    assert rows["blocks.0.attn.qk"] == (7, 7)
    both = fxquant.compile(vit(), "W8A6", calibration=images(), overrides={"av": 4}, allocator=Uniform())
    assert {row.input_bits for row in products(both)} == {(4, 4)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.av.left": 9}, "asks for 9 left bits; the candidates"),
        ({"av.left": (4, 4)}, "names one operand and must give one width"),
        ({"av.softmax": 4}, r"names no operand of .*av': one input of a product is named \"av\.left\" or"),
        ({"qk.left": 4}, r"names one input of 'blocks\.0\.attn\.qk', which has no width of its own"),
    ],
)
def test_mistaken_overrides_are_refused_before_calibration(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(OverrideError, match=message):
        fxquant.compile(vit(), "W4A4", calibration=images(), overrides=overrides)


def test_an_impossible_budget_is_refused_before_calibration() -> None:
    overrides = {"av.left": 8, "qk": 8, "av.right": 8}
    with pytest.raises(InfeasibleBudgetError, match=r"blocks\.\d\.attn\.av \(L8R8"):
        fxquant.compile(vit(), "W4A3.2", calibration=images(), overrides=overrides)


@pytest.mark.skipif(library.why_absent() is not None, reason=str(library.why_absent()))
def test_kernels_give_what_is_simulated(narrow: fxquant.Compiled, tmp_path: Path) -> None:
    narrow.save(tmp_path / "narrow.fxq")
    loaded = fxquant.load(tmp_path / "narrow.fxq")
    x = images(6)
    torch.testing.assert_close(loaded(x), narrow(x))
    assert loaded.layers == narrow.layers
    for before, after in zip(narrow.graph_module.graph.nodes, loaded.graph_module.graph.nodes, strict=True):
        assert annotation_of(before).bits == annotation_of(after).bits
    lowered = narrow.lowered("cpu-native")
    assert all(row.execution != "simulated" for row in lowered.layers)
    torch.testing.assert_close(lowered(x), narrow(x), rtol=2e-2, atol=2e-2)


def test_recipes_that_mean_the_layers_activation_bits_leave_one_width() -> None:
    found = fxquant.compile(vit(), None, calibration=images(), recipe=lampq("W4A4", base=best))
    assert all(len(set(row.input_bits)) == 1 for row in products(found))


def test_what_to_do_names_the_narrow_side(narrow: fxquant.Compiled) -> None:
    rows = [replace(row, predicted_loss=1.0 if row.role == "av" else 1e-9) for row in narrow.layers]
    action = actions_for(rows, narrow.allocation)[0]
    assert (action.layer, action.bits) == ("blocks.0.attn.av.left", 4)
    assert action.extra_bytes == 0
    row = products(narrow)[0]
    assert action.extra_bit_operations == 2 * row.macs * (row.input_bits[1] or 0)
