"""Recipes of the papers' tables: what they are made of, and their formulas against a few plain lines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxquant
from allocators.milp import Milp
from fxquant.quantizers.adalog import GELU_SHIFT, AdaLogZeroQuantizer
from fxquant.quantizers.families import FAMILIES
from fxquant.quantizers.statistics.outlier_channels import power_of_two_factors
from fxquant.quantizers.uniform import UniformQuantizer
from passes.allocate.allocate_bits import AllocateBits
from passes.allocate.relevance_sensitivity import RelevanceSensitivity
from passes.allocate.score_layers import ScoreLayers
from passes.correct.correct_weights import CorrectWeights
from passes.correct.reconstruct import Reconstruct
from passes.prepare.fold_sqb import FoldSqb
from passes.recipes import RECIPES, adalog, brecq, mix_qvit, mptq_vit, recipe, repq_vit, tsptq_vit
from passes.recipes.mix_qvit import CLIPPED
from passes.search.plan_operands import PlanOperands
from passes.search.search_scales import SearchScales
from tests.models import images, vit
from tests.quantizers.plain_versions import statistics_of


def step(pipeline: Any, kind: type) -> Any:
    return next(each for each in pipeline if isinstance(each, kind))


@pytest.mark.quick
def test_weights_have_one_scale_where_the_paper_has_one() -> None:
    for name in ("mptq_vit", "tsptq_vit", "ptq4vit"):
        assert step(recipe(name)("W4A4"), SearchScales).weight_scales == "tensor"
    for made in (mptq_vit, tsptq_vit):
        assert step(made("W4A4", weight_scales="channel"), SearchScales).weight_scales == "channel"
    assert step(repq_vit("W4A4"), SearchScales).weight_scales == "channel"


def test_adalogs_tables_have_a_zero_in_files_and_where_kernels_are_asked_for(tmp_path: Path) -> None:
    """Both after softmax and after GELU, where it stands for the shift; no kernel reads them, so they are simulated."""
    model, calibration = vit(depth=1), images(4)
    found = fxquant.compile(model, "W3A3", calibration=calibration, recipe="adalog", bits=(3, 8))
    found.save(tmp_path / "adalog.fxq")
    loaded = fxquant.load(tmp_path / "adalog.fxq")
    with torch.inference_mode():
        assert torch.equal(loaded(calibration), found(calibration))
        torch.testing.assert_close(loaded.lowered("auto")(calibration), found(calibration), atol=1e-4, rtol=1e-4)
    tables = [module for module in loaded.modules() if isinstance(module, AdaLogZeroQuantizer)]
    assert [float(table.levels()[0]) for table in tables] == pytest.approx([0, -GELU_SHIFT])
    assert all(len(table.levels()) == 2**3 for table in tables)


@pytest.mark.quick
def test_mix_qvit_has_adalogs_quantizers_and_clipped_folds_unless_others_are_given() -> None:
    found = mix_qvit("MP4")
    assert step(found, PlanOperands) == step(adalog("W4A4"), PlanOperands)
    assert step(found, FoldSqb) == CLIPPED
    before = mix_qvit("MP4", base=mptq_vit, fold=FoldSqb())
    assert step(before, PlanOperands) == step(mptq_vit("W4A4"), PlanOperands)
    assert step(before, FoldSqb) == FoldSqb()
    lrp = recipe("lrp_qvit")("MP4")
    assert step(lrp, ScoreLayers).metric == RelevanceSensitivity(sensitivity="none")
    assert (step(lrp, FoldSqb), step(lrp, AllocateBits).allocator) == (CLIPPED, Milp())


@pytest.mark.quick
def test_fewer_steps_learn_faster_up_to_a_limit() -> None:
    rates = {steps: step(brecq("W4A4", steps=steps), Reconstruct).rounding_rate for steps in (20_000, 2_000, 10)}
    assert rates == pytest.approx({20_000: 1e-3, 2_000: 1e-2, 10: 2e-2})
    losses = {name: step(RECIPES[name]("W4A4"), Reconstruct) for name in ("brecq", "qdrop", "fima_q")}
    assert {name: (found.loss, found.drop, found.rank) for name, found in losses.items()} == {
        "brecq": ("fisher", 0.0, 1), "qdrop": ("mse", 0.5, 5), "fima_q": ("fisher", 0.5, 5)
    }  # fmt: skip
    assert step(RECIPES["optq"]("W4A4"), CorrectWeights) == CorrectWeights((), dampening=0.01, robust=False)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.quick
def test_twin_uniform_softmax_takes_one_of_two_ranges(bits: int) -> None:
    """PTQ4ViT, section 3.2; as a sum of both, as in the published code, 0.9 would be 1.398 at 8 bits."""
    proposals = FAMILIES["twin-uniform-softmax"].propose(statistics_of(torch.rand(100)), bits)
    assert len(proposals.levels) == 20
    top = 2 ** (bits - 1) - 1
    x = torch.linspace(0, 1, 999)
    for split in (1, 4):
        found = proposals.build(split)(x)
        fine, coarse = (torch.round(x / step).clamp(0, top) * step for step in (2.0**-split / top, 1 / top))
        plain = torch.where((fine - x).abs() <= (coarse - x).abs(), fine, coarse)
        assert torch.allclose((found - x).abs(), (plain - x).abs(), atol=1e-6)
        assert float(proposals.build(1)(torch.tensor(0.9))) <= 1


@pytest.mark.quick
def test_twin_uniform_gelu_has_a_fixed_negative_step() -> None:
    x = torch.nn.functional.gelu(torch.linspace(-6, 6, 4000))
    proposals = FAMILIES["twin-uniform-gelu"].propose(statistics_of(x), 6)
    negative, positive = 0.16997124254703522 / 32, float(x.max()) * 1.2 / 31.5 * 0.83
    plain = torch.where(
        x < 0, torch.round(x / negative).clamp(-32, 0) * negative, torch.round(x / positive).clamp(0, 31) * positive
    )
    assert torch.allclose(proposals.build(82)(x), plain, atol=1e-5)


@pytest.mark.quick
def test_log_int_softmax_rounds_as_fq_vit_does() -> None:
    """Its integer logarithm: floor(log2 x), one more from 1.5 times that power on."""
    (x, bits) = torch.logspace(-4, 0, 777, base=2), 3
    floor = torch.floor(torch.log2(x))
    exponent = floor + (x - 2**floor >= 2 ** (floor - 1))
    plain = 2.0 ** -(-exponent).clamp(0, 2**bits - 1)
    proposals = FAMILIES["log-int-softmax"].propose(statistics_of(x), bits)
    assert torch.allclose(proposals.build(0)(x), plain)


@pytest.mark.quick
def test_factors_of_channels_are_close_to_those_of_least_error() -> None:
    """FQ-ViT, eq. 6-8: a from 0 to 3 for each channel, one scale that covers the largest with a = 3."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(500, 24, generator=generator) * 2.0 ** torch.linspace(-6, 0, 24)
    factors = power_of_two_factors(x.amax(0))
    scale = float(x.max()) / 8 / 255

    def error(a: torch.Tensor) -> torch.Tensor:
        return (UniformQuantizer(8, scale * a, torch.zeros(24, dtype=torch.int32))(x) - x).square().sum(0)

    best = torch.stack([error(torch.full((24,), 2.0**a)) for a in range(4)]).amin(0)
    assert set(np.log2(factors.numpy())) == {0, 1, 2, 3}
    assert float(error(factors).sum()) <= 1.01 * float(best.sum())


@pytest.mark.parametrize("name", ["ptq4vit", "fq_vit", "psaq_vit", "optq", "erq", "fima_q", "lrp_qvit"])
def test_they_quantize_a_model(name: str) -> None:
    x = images(3)
    made = partial(RECIPES[name], steps=2) if name == "fima_q" else name
    found = fxquant.compile(vit(depth=1), "W8A8", calibration=x, recipe=made, bits=(4, 8))
    with torch.no_grad():
        reference = vit(depth=1)(x)
        error = float((found(x) - reference).norm() / reference.norm())
    assert error < (0.5 if name == "fq_vit" else 0.15), "log2 has one level between 0.2 and 0.4"
    inputs = {row.role: row.input_bits for row in found.layers}
    if name == "psaq_vit":
        assert (inputs["av"], inputs["softmax"]) == ((None, 8), (8,)), "attention probabilities stay float"
    if name == "fq_vit":
        assert {"softmax", "layer_norm"} <= set(inputs)


def test_inputs_alone_can_be_quantized() -> None:
    """MPTQ-ViT's Table 6."""
    pipeline = mptq_vit("A4", bits=(4, 8)).changed(PlanOperands, weight=None)
    found = fxquant.compile(vit(depth=1), None, calibration=images(3), recipe=pipeline)
    assert {row.weight_bits for row in found.layers} == {None}
    assert {row.activation_bits for row in found.layers if row.role == "fc1"} == {4}
