"""The recipes lampq and vt_ptq as a user meets them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from allocators.milp import Milp
from allocators.module_frontier import ModuleFrontier
from fxquant.data import embedded
from fxquant.errors import BudgetError
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedLinear
from fxquant.session.compiled import Compiled
from fxquant.session.session import Session
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.metrics import FisherTrace, NoiseRatio, NuclearNorm, TypeAwareFisher
from passes.allocate.score_layers import ScoreLayers
from passes.allocate.update_bits import UpdateBits
from passes.recipes import RECIPES, best, lampq, mptq_vit, naive_min_max, tsptq_vit, vt_ptq
from tests.models import embedded_blocks, timm_model
from tests.models import images as random_images

IMAGES = embedded.calibration_images(4)
QUICK = {"base": naive_min_max, "bits": (2, 3, 4, 5, 8)}
SWIN = {"img_size": 32, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "num_classes": 7}


def compiled(pipeline: Any) -> Compiled:
    return fxquant.compile(embedded_blocks(3), None, calibration=IMAGES, recipe=pipeline)


def widths(quantized: Compiled, *roles: str) -> set[tuple[int | None, int | None]]:
    return {(row.weight_bits, row.activation_bits) for row in quantized.layers if row.role in roles}


@pytest.fixture(scope="module")
def quantized() -> Compiled:
    return compiled(lampq("W3.5A3.5", **QUICK))


def test_both_means_hold_and_weights_and_inputs_share_their_bits(quantized: Compiled) -> None:
    assert quantized.allocation is not None
    usage = quantized.allocation.usage
    assert 3.1 < usage["mean_weight_bits"] <= 3.5
    assert 3.1 < usage["mean_activation_bits"] <= 3.5
    assert max(usage["mean_weight_bits"], usage["mean_activation_bits"]) > 3.45, "one of them is used up"
    four = widths(quantized, "qkv", "proj", "fc1", "fc2")
    assert all(weight == activation for weight, activation in four)
    assert len(four) > 1


def test_everything_else_gets_the_mean_rounded_down_and_the_journal_says_so(quantized: Compiled) -> None:
    assert widths(quantized, "head") == {(3, 3)}
    assert widths(quantized, "patch_embed") == {(3, 8)}
    assert widths(quantized, "qk", "av") == {(None, 3)}
    notes = {entry.step.split("(")[0]: entry.notes for entry in quantized.journal.entries}
    assert notes["AllocateBits"]["role_bits"]["head"] == (3, 3)
    assert set(notes["ScoreLayers"]["alpha"]) == {"qkv", "proj", "fc1", "fc2"}
    assert {"trajectory", "score_before", "score_after", "stopped", "usage"} <= notes["UpdateBits"].keys()


def test_the_card_says_whether_labels_were_used(quantized: Compiled) -> None:
    assert quantized.card["labels_used"] is False
    metric = FisherTrace(labels=(0, 1, 2, 3))
    assert compiled(lampq("W4A4", **QUICK, metric=metric, update=None)).card["labels_used"] is True


def test_its_artefact_is_read_back(quantized: Compiled, tmp_path: Any) -> None:
    quantized.save(tmp_path / "a.fxq")
    again = fxquant.load(tmp_path / "a.fxq")
    assert again.allocation == quantized.allocation
    assert (again(IMAGES) == quantized(IMAGES)).all()


def test_a_budget_of_weights_only_leaves_the_inputs_to_the_tie() -> None:
    found = compiled(lampq("W3", **QUICK, update=None, type_aware=False)).allocation
    assert found is not None
    assert found.usage["mean_weight_bits"] <= 3
    assert found.budget.mean_activation_bits is None


def test_different_means_are_allocated_free() -> None:
    quantized = compiled(lampq("W3A5", **QUICK, update=None, type_aware=False))
    assert quantized.allocation is not None
    assert quantized.allocation.usage["mean_weight_bits"] <= 3
    assert 4.8 < quantized.allocation.usage["mean_activation_bits"] <= 5
    assert widths(quantized, "head") == {(3, 5)}


@pytest.mark.parametrize(
    ("options", "metric", "allocator", "update"),
    [
        ({}, TypeAwareFisher(), Milp(tie_weights_and_activations=True), UpdateBits()),
        ({"update": None}, TypeAwareFisher(), Milp(tie_weights_and_activations=True), None),
        ({"type_aware": False}, FisherTrace(), Milp(tie_weights_and_activations=True), UpdateBits()),
        ({"layer_wise": False}, TypeAwareFisher(), ModuleFrontier(), None),
        ({"metric": NoiseRatio(), "tied": False}, NoiseRatio(), Milp(), UpdateBits(tied=False)),
    ],
)
@pytest.mark.quick
def test_each_idea_is_a_switch(options: Any, metric: Any, allocator: Any, update: Any) -> None:
    steps = list(lampq("W3A3", base=tsptq_vit, **options))
    assert [s.metric for s in steps if isinstance(s, ScoreLayers)] == [metric]
    assert [s.allocator for s in steps if isinstance(s, AllocateBits)] == [allocator]
    assert [s for s in steps if isinstance(s, UpdateBits)] == ([update] if update else [])


@pytest.mark.parametrize("base", [mptq_vit, best, tsptq_vit, naive_min_max])
@pytest.mark.quick
def test_it_composes_with_every_recipe(base: Any) -> None:
    """The steps of the base stay; only the allocation changes."""
    plain, mixed = [type(s) for s in base("W3A3")], [type(s) for s in lampq("W3A3", base=base)]
    assert [kind for kind in mixed if kind not in (ScoreLayers, UpdateBits)] == plain
    assert mixed.index(UpdateBits) == mixed.index(AllocateBits) + 1 == mixed.index(ScoreLayers) + 2


def test_options_reach_the_base() -> None:
    allocate = next(s for s in lampq("W3A3", overrides={"head": 8}, bits=(2, 3, 8)) if isinstance(s, AllocateBits))
    assert allocate.overrides == (("head", 8),)
    chosen = next(s for s in lampq("W3A3", allocator=ModuleFrontier()) if isinstance(s, AllocateBits))
    assert chosen.allocator == ModuleFrontier()


def test_vt_ptq_gives_every_module_one_width() -> None:
    quantized = compiled(vt_ptq("W4A4", **QUICK))
    assert isinstance(next(s for s in vt_ptq("W4A4") if isinstance(s, ScoreLayers)).metric, NuclearNorm)
    for block in range(3):
        for half in (("qkv", "proj"), ("fc1", "fc2")):
            rows = [r for r in quantized.layers if r.block == block and r.role in half]
            assert len({(r.weight_bits, r.activation_bits) for r in rows}) == 1
    assert quantized.allocation is not None
    assert quantized.allocation.solver == "pareto"


def test_swins_reductions_are_outside() -> None:
    images = random_images(2)
    model = timm_model("swin_tiny_patch4_window7_224", **SWIN)
    quantized = fxquant.compile(model, None, calibration=images, recipe=lampq("W4A4", **QUICK))
    assert widths(quantized, "reduction", "head") == {(4, 4)}
    assert quantized.allocation is not None
    assert not quantized.allocation.budget.exceeded(quantized.allocation.usage)


def test_a_second_budget_scores_nothing_again() -> None:
    session = Session(embedded_blocks(3), IMAGES, recipe=partial(lampq, **QUICK, update=None, type_aware=False))
    steps = []
    for budget in ("W3A3", "W5A5"):
        journal = session.compile(budget).journal.entries
        steps.append([entry.step.split("(")[0] for entry in journal])
    assert steps[0] == steps[1]
    assert steps[0].count("ScoreLayers") == 1


def test_budgets_without_means_need_outside_bits() -> None:
    with pytest.raises(BudgetError, match="give outside_bits"):
        lampq("300KB")
    pipeline = lampq("300KB", **QUICK, outside_bits=(4, 8), update=None, type_aware=False)
    quantized = compiled(pipeline)
    assert widths(quantized, "head") == {(4, 8)}
    assert RECIPES["lampq"] is lampq


@pytest.mark.parametrize("base", ["adalog", "repq_vit"])
def test_published_bases_give_weights_zero_points(base: str, tmp_path: Path) -> None:
    found = Session(embedded_blocks(3), IMAGES, recipe=base, bits=(4,)).compile("W4A4")
    quantizers = [
        module.weight_quantizer for module in found.modules() if isinstance(module, QuantizedLinear | QuantizedConv2d)
    ]
    assert quantizers
    assert all(isinstance(quantizer, UniformQuantizer) and not quantizer.symmetric for quantizer in quantizers)
    assert all(int(quantizer.zero_point.unique().numel()) > 1 for quantizer in quantizers), "one for each channel"
    found.save(tmp_path / "model.fxq")
    with torch.inference_mode():
        assert torch.equal(fxquant.load(tmp_path / "model.fxq")(IMAGES), found(IMAGES))
