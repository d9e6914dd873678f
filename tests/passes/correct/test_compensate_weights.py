"""CompensateWeights: on the grid, never worse than rounding where it counts, and found again by substitution."""

import itertools

import pytest
import torch

from allocators.problem.budget import Budget
from allocators.uniform import Uniform
from fxquant.data import embedded
from fxquant.errors import PipelineError
from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.quantizers.statistics.feedback import factor
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.simulated import QuantizedLinear
from passes.allocate.allocate_bits import AllocateBits
from passes.correct import compensate_weights
from passes.correct.compensate_weights import SCALES, CompensateWeights, compensate, compensate_scaled
from passes.pipeline.contract import PassContext
from passes.recipes import best, mptq_vit
from passes.search.search_scales import SearchScales
from passes.substitute.substitute_quantizers import SubstituteQuantizers, chosen


def cost(error: torch.Tensor, gram: torch.Tensor) -> float:
    return float(((error @ gram) * error).sum())


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, UniformQuantizer]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator)
    rows = torch.randn(300, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    return weight, rows.T @ rows, UniformQuantizer(3, weight.abs().amax(1, keepdim=True) / 3)


@pytest.mark.quick
def test_result_lies_on_the_grid_and_costs_less(layer: tuple[torch.Tensor, torch.Tensor, UniformQuantizer]) -> None:
    weight, gram, quantizer = layer
    compensated = compensate(weight, gram, quantizer, dampening=0.01, block=16)
    assert torch.equal(quantizer(compensated), compensated)
    assert cost(compensated - weight, gram) < 0.6 * cost(quantizer(weight) - weight, gram)


def test_block_size_does_not_matter(layer: tuple[torch.Tensor, torch.Tensor, UniformQuantizer]) -> None:
    weight, gram, quantizer = layer
    one, many = (compensate(weight.double(), gram, quantizer, block=block) for block in (1, 64))
    assert torch.equal(one, many)


def test_uncorrelated_inputs_leave_plain_rounding(layer: tuple[torch.Tensor, torch.Tensor, UniformQuantizer]) -> None:
    weight, _, quantizer = layer
    assert torch.equal(compensate(weight, torch.eye(40), quantizer), quantizer(weight))


def test_near_the_best_of_all_roundings() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(50, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    gram, weight = rows.T @ rows, torch.randn(1, 6, generator=generator)
    quantizer = UniformQuantizer(3, 0.5)
    grids = itertools.product(*[{torch.floor(w / 0.5) * 0.5, torch.ceil(w / 0.5) * 0.5} for w in weight[0]])
    best = min(cost(quantizer(torch.stack(grid)[None]) - weight, gram) for grid in grids)
    found = cost(compensate(weight, gram, quantizer, dampening=1e-6) - weight, gram)
    assert best <= found * (1 + 1e-5)
    assert found <= cost(quantizer(weight) - weight, gram)


@pytest.mark.parametrize(
    "zero_point", [None, torch.full((12, 1), 3, dtype=torch.int32)], ids=["symmetric", "zero-point"]
)
@pytest.mark.parametrize("dampening", [0.01, 0.5])
def test_it_is_rounding_column_by_column_with_the_cholesky_factor(
    dampening: float, zero_point: torch.Tensor | None
) -> None:
    """Written out as in the module's docstring; wide enough for several blocks of the factor."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(12, 600, generator=generator), torch.randn(1200, 600, generator=generator)
    gram, quantizer = rows.T @ rows, UniformQuantizer(4, weight.abs().amax(1, keepdim=True) / 7, zero_point)
    order = gram.diagonal().argsort(descending=True)
    damped = (gram.double() + dampening * gram.diagonal().mean() * torch.eye(600))[order][:, order]
    factor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    error, wanted = torch.zeros(12, 600, dtype=torch.float64), torch.empty_like(weight)
    for place, j in enumerate(order):
        target = weight[:, j] + error[:, :place] @ factor[:place, place] / factor[place, place]
        wanted[:, j] = quantizer(target.float()[:, None])[:, 0]
        error[:, place] = weight[:, j] - wanted[:, j]
    found = compensate(weight, gram, quantizer, dampening)
    assert torch.equal(quantizer(found), found)
    # A code at the edge falls either way with rounding, and later ones of its row follow.
    assert float((found == wanted).float().mean()) > 0.9
    assert cost(found - weight, gram) == pytest.approx(cost(wanted - weight, gram), rel=0.01)


@pytest.mark.parametrize("with_zero_points", [False, True])
def test_every_row_has_the_scale_that_costs_least(
    layer: tuple[torch.Tensor, torch.Tensor, UniformQuantizer], with_zero_points: bool
) -> None:
    """Row by row what `compensate` gives at each scale, tried one by one."""
    weight, gram, quantizer = layer
    zeros = torch.arange(24, dtype=torch.int32)[:, None] % 3 + 2 if with_zero_points else None
    quantizer = UniformQuantizer(3, quantizer.scale, zeros)
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(40)
    tried = [compensate(weight, gram, UniformQuantizer(3, quantizer.scale * s, zeros), 0.1) for s in SCALES]
    costs = torch.stack([(((found - weight) @ damped) * (found - weight)).sum(1) for found in tried])
    found, scaled = compensate_scaled(weight, gram, quantizer, SCALES, dampening=0.1)
    best = costs.argmin(0)
    assert len(best.unique()) > 1
    torch.testing.assert_close(scaled.scale[:, 0], torch.tensor(SCALES)[best] * quantizer.scale[:, 0])
    torch.testing.assert_close(found, torch.stack(tried)[best, torch.arange(24)])
    assert torch.equal(scaled(found), found)


def test_columns_of_large_inputs_come_first() -> None:
    """Whatever order they stand in, and it costs less than from the first to the last where these are small ones."""
    generator = torch.Generator().manual_seed(0)
    weight, mixing = torch.randn(24, 40, generator=generator), torch.randn(40, 40, generator=generator)
    rows = torch.randn(300, 40, generator=generator) @ mixing * torch.linspace(0.1, 3, 40)
    gram, quantizer = rows.T @ rows, UniformQuantizer(3, weight.abs().amax(1, keepdim=True) / 3)
    found, turned = compensate(weight, gram, quantizer), compensate(weight.flip(1), gram.flip(0, 1), quantizer)
    torch.testing.assert_close(turned.flip(1), found)
    feedback, _ = factor(gram, 0.1, torch.float32)
    reach = [end.expand(24) for end in quantizer.reach]
    as_they_stand, _ = compensate_weights._round_columns(
        weight, torch.zeros_like(weight), feedback, quantizer.scale.T, *reach, 16
    )
    assert cost(found - weight, gram) < 0.9 * cost(as_they_stand[:, 0].T - weight, gram)


def outputs_of(groups: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(groups, 4 * size, size, generator=generator)
    return (mixed := gradients @ torch.randn(size, size, generator=generator)).mT @ mixed


def joint_cost(error: torch.Tensor, gram: torch.Tensor, outputs: torch.Tensor) -> float:
    return float(((torch.block_diag(*outputs) @ error @ gram) * error).sum())


def test_rows_make_up_for_one_another(layer: tuple[torch.Tensor, torch.Tensor, UniformQuantizer]) -> None:
    weight, gram, quantizer = layer
    outputs = outputs_of(1, 24)
    alone, _ = compensate_scaled(weight, gram, quantizer)
    together, scaled = compensate_scaled(weight, gram, quantizer, outputs_goo=outputs)
    assert torch.equal(scaled(together), together)
    assert joint_cost(together - weight, gram, outputs) < 0.9 * joint_cost(alone - weight, gram, outputs)


def test_it_is_rounding_row_by_row_with_both_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight in turn, written out: |S^T D R|^2 has the term S_ii^2 R_jj^2 (target - q)^2."""
    monkeypatch.setattr(compensate_weights, "TURNS", 3)
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(6, 9, generator=generator), torch.randn(40, 9, generator=generator)
    gram, outputs, quantizer = rows.T @ rows, outputs_of(2, 3), UniformQuantizer(3, torch.full((6, 1), 0.6))

    def above(matrix: torch.Tensor) -> torch.Tensor:
        damped = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(len(matrix))
        factor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
        return (factor / factor.diagonal()).triu(1)

    order = gram.diagonal().argsort(descending=True)
    weight, gram = weight[:, order], gram[order][:, order]
    columns, among = above(gram), torch.block_diag(*map(above, outputs))
    missed, moved, wanted = torch.zeros(6, 9), torch.zeros(6, 9), torch.empty(6, 9)
    for i, j in itertools.product(range(6), range(9)):
        own = missed[i] @ columns[:, j]
        target = weight[i, j] + own + among[:, i] @ moved[:, j]
        wanted[i, j] = quantizer(target[None, None].expand(6, 1))[i, 0]
        missed[i, j] = weight[i, j] - wanted[i, j]
        moved[i, j] = missed[i, j] + own
    back = order.argsort()
    found, _ = compensate_scaled(weight[:, back], gram[back][:, back], quantizer, (1.0,), outputs_goo=outputs)
    torch.testing.assert_close(found, wanted[:, back])


def test_groups_know_nothing_of_one_another(layer: tuple[torch.Tensor, torch.Tensor, UniformQuantizer]) -> None:
    weight, gram, quantizer = layer
    outputs = outputs_of(3, 8)
    found, scaled = compensate_scaled(weight, gram, quantizer, outputs_goo=outputs)
    for group in range(3):
        own = slice(8 * group, 8 * group + 8)
        given = UniformQuantizer(3, quantizer.scale[own])
        alone, scales = compensate_scaled(weight[own], gram, given, outputs_goo=outputs[group : group + 1])
        torch.testing.assert_close(found[own], alone)
        torch.testing.assert_close(scaled.scale[own], scales.scale)


def test_independent_outputs_change_nothing(layer: tuple[torch.Tensor, torch.Tensor, UniformQuantizer]) -> None:
    weight, gram, quantizer = layer
    alone, together = (
        compensate_scaled(weight, gram, quantizer, outputs_goo=outputs)[0] for outputs in (None, torch.eye(24)[None])
    )
    torch.testing.assert_close(together, alone)


def test_near_the_best_of_all_roundings_of_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 x 3 weights all roundings down and up are tried; over many layers it comes closer than row by row."""
    monkeypatch.setattr(compensate_weights, "TURNS", 2)
    quantizer, total = UniformQuantizer(4, torch.full((2, 1), 0.5)), torch.zeros(3)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weight, mixing, other = (torch.randn(*shape, generator=generator) for shape in ((2, 3), (3, 3), (2, 2)))
        gram, outputs = mixing @ mixing.T, (other @ other.T)[None]
        grids = itertools.product(*[(torch.floor(w / 0.5) * 0.5, torch.ceil(w / 0.5) * 0.5) for w in weight.flatten()])
        best = min(joint_cost(torch.stack(grid).reshape(2, 3) - weight, gram, outputs) for grid in grids)
        rounded = [
            compensate_scaled(weight, gram, quantizer, (1.0,), 1e-6, outputs_goo=given)[0] for given in (None, outputs)
        ]
        total += torch.tensor([best, *(joint_cost(each - weight, gram, outputs) for each in rounded)])
    assert total[0] <= total[2] < 0.85 * total[1]


def test_a_large_layer_takes_likely_scales(
    layer: tuple[torch.Tensor, torch.Tensor, UniformQuantizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays on its grid, at scales that are tried, and is better than at the searched ones alone."""
    weight, gram, quantizer = layer
    one = compensate(weight, gram, quantizer)
    monkeypatch.setattr(compensate_weights, "LARGE", 1)
    found, scaled = compensate_scaled(weight, gram, quantizer)
    assert torch.equal(scaled(found), found)
    ratios = (scaled.scale / quantizer.scale)[:, 0]
    assert torch.isclose(ratios[:, None], torch.tensor(SCALES)).any(1).all()
    assert cost(found - weight, gram) < cost(one - weight, gram)
    together, _ = compensate_scaled(weight, gram, quantizer, outputs_goo=(outputs := outputs_of(1, 24)))
    assert joint_cost(together - weight, gram, outputs) < 0.9 * joint_cost(found - weight, gram, outputs)


def test_one_scale_for_all_rows_stays(layer: tuple[torch.Tensor, torch.Tensor, UniformQuantizer]) -> None:
    weight, gram, _ = layer
    quantizer = UniformQuantizer(3, 0.5)
    found, scaled = compensate_scaled(weight, gram, quantizer)
    assert scaled is quantizer
    assert torch.equal(found, compensate(weight, gram, quantizer))


def test_substitution_finds_the_compensated_codes() -> None:
    images = embedded.calibration_images(8)
    pipeline = best("W3A8", allocator=Uniform())
    before = pipeline[: pipeline.position(SubstituteQuantizers)].run(
        trace(embedded.load_model(), images[:2]), PassContext(images)
    )
    after = pipeline[pipeline.position(SubstituteQuantizers) :].run(before, PassContext(images))
    checked = 0
    for node in nodes_with_role(before):
        candidate = chosen(weight, "") if (weight := annotation_of(node).weight) else None
        if candidate is not None and annotation_of(node).role != "patch_embed":
            substituted = after.get_submodule(str(node.target))
            assert isinstance(substituted, QuantizedLinear)
            torch.testing.assert_close(substituted.weight, before.get_submodule(str(node.target)).weight)
            checked += 1
    assert checked == 25


def test_needs_gram_matrices_that_are_kept() -> None:
    pipeline = mptq_vit(Budget.parse("W4A4"))
    with pytest.raises(PipelineError, match=r"CompensateWeights.*requires 'Gram matrices known'"):
        pipeline.after(AllocateBits, CompensateWeights())
    pipeline.replace(SearchScales, SearchScales(keep_grams=True)).after(AllocateBits, CompensateWeights())


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_weight_given_is_not_written_into(outputs: int) -> None:
    weight, rows = (torch.randn(count, 6, generator=torch.Generator().manual_seed(2)) for count in (outputs, 50))
    before = weight.clone()
    compensate(weight, rows.T @ rows, UniformQuantizer(3, 0.5))
    assert torch.equal(weight, before)
