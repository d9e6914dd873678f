"""UpdateBits on the embedded model: budgets hold, promises are checked, the journal tells."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.fx import GraphModule

from allocators.uniform import Uniform
from fxquant.artefact.cache import Cache
from fxquant.data import embedded
from fxquant.errors import PipelineError
from fxquant.graph.annotation import Role, annotation_of, nodes_with_role
from fxquant.graph.capture.tracing import trace
from fxquant.sensitivity.measured import Divergence
from passes.allocate.allocate_bits import ALLOCATION, AllocateBits
from passes.allocate.score_layers import LAMPQ_ROLES
from passes.allocate.update_bits import UpdateBits
from passes.pipeline.contract import PassContext
from passes.recipes import naive_min_max

IMAGES = embedded.calibration_images(8)


@pytest.fixture(scope="module")
def allocated() -> GraphModule:
    """Every layer at 3 bits; copy before use."""
    pipeline = naive_min_max("W3A3", allocator=Uniform(), bits=(2, 3, 4, 8))
    stop = pipeline.position(AllocateBits) + 1
    return pipeline[:stop].run(trace(embedded.load_model(), IMAGES[:2]), PassContext(IMAGES))


def updated(allocated: GraphModule, cache: Cache | None = None, **options: Any) -> tuple[GraphModule, dict[str, Any]]:
    graph_module, context = copy.deepcopy(allocated), PassContext(IMAGES, cache=cache or Cache())
    UpdateBits(**options).apply(graph_module, context)
    return graph_module, context.journal.pending


def bits(graph_module: GraphModule) -> dict[str, tuple[int | None, int | None]]:
    found = [annotation_of(node) for node in nodes_with_role(graph_module)]
    return {a.layer: (a.weight_bits, a.input_bits[-1]) for a in found if a.has_bits}


def divergence(graph_module: GraphModule, x: Tensor = IMAGES) -> float:
    found = {node: annotation_of(node) for node in nodes_with_role(graph_module)}
    assignment = {node: annotation.bits for node, annotation in found.items() if annotation.has_bits}
    return Divergence(graph_module, x).of(assignment)


def test_it_lowers_the_divergence_within_both_budgets(allocated: GraphModule) -> None:
    before, (graph_module, notes) = divergence(allocated), updated(allocated)
    trajectory = notes["trajectory"]
    kept = [entry for entry in trajectory if entry["kept"]]
    assert kept
    assert notes["score_before"] == pytest.approx(before)
    assert notes["score_after"] == pytest.approx(divergence(graph_module))
    assert notes["score_after"] == pytest.approx(before + sum(entry["realised"] for entry in kept))
    assert notes["score_after"] < before
    assert all(entry["predicted"] < 0 and entry["kept"] == (entry["realised"] < 0) for entry in trajectory)
    allocation = ALLOCATION.get(graph_module)
    assert allocation is not None
    assert not allocation.budget.exceeded(allocation.usage)
    assert allocation.solver == "uniform, updated"
    for layer, (weight_bits, activation_bits) in bits(graph_module).items():
        assert allocation.weight_bits.get(layer) == weight_bits
        assert allocation.activation_bits.get(layer) == activation_bits or layer == "patch_embed.proj"
    moved = {layer for layer, pair in bits(graph_module).items() if pair != bits(allocated)[layer]}
    roles = {annotation_of(n).layer: annotation_of(n).role for n in nodes_with_role(graph_module)}
    assert {roles[layer] for layer in moved} <= {*LAMPQ_ROLES}
    assert all(len(set(bits(graph_module)[layer])) == 1 for layer in moved), "tied"
    assert moved <= {layer for entry in kept for layer in entry["raised"] | entry["lowered"]}


@pytest.mark.parametrize("patience", [1, 2])
def test_it_stops_after_patience_refusals(
    allocated: GraphModule, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    """A score that only rises: every exchange is tried once, refused and undone."""
    rising = iter(range(100))
    monkeypatch.setattr(Divergence, "of", lambda *_: next(rising))
    graph_module, notes = updated(allocated, patience=patience)
    assert [entry["kept"] for entry in notes["trajectory"]] == [False] * patience
    assert len({json.dumps([e["raised"], e["lowered"]]) for e in notes["trajectory"]}) == patience
    assert notes["stopped"] == f"{patience} exchanges in a row did not lower the score"
    assert bits(graph_module) == bits(allocated)


def test_without_patience_it_goes_on_until_nothing_promises_anything(allocated: GraphModule) -> None:
    _, notes = updated(allocated, patience=None, roles=(Role.PROJ,), size=2, rounds=100)
    assert notes["stopped"] == "no exchange promises anything"
    assert all(entry["kept"] for entry in notes["trajectory"])


def test_rounds_are_a_limit_and_none_change_nothing(allocated: GraphModule) -> None:
    graph_module, notes = updated(allocated, rounds=0)
    assert bits(graph_module) == bits(allocated)
    assert notes["score_before"] == notes["score_after"]
    assert notes["stopped"] == "rounds are used up"
    assert ALLOCATION.get(graph_module) == ALLOCATION.get(allocated), "still the allocator's own answer"


def test_expected_errors_need_no_neighbours_measured(allocated: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    import passes.allocate.update_bits

    asked: list[int] = []
    original = passes.allocate.update_bits.reconstruction_errors

    def counting(graph_module: GraphModule, wanted: Any, batches: Any) -> Any:
        asked.append(sum(len(pairs) for pairs in wanted.values()))
        return original(graph_module, wanted, batches)

    monkeypatch.setattr(passes.allocate.update_bits, "reconstruction_errors", counting)
    updated(allocated, estimate="expected", rounds=1)
    assert asked == [24]
    asked.clear()
    updated(allocated, rounds=1)
    assert asked == [72]


def test_free_widths_step_one_operand_at_a_time(allocated: GraphModule) -> None:
    graph_module, notes = updated(allocated, tied=False)
    assert any(entry["kept"] for entry in notes["trajectory"])
    assert any(len(set(pair)) == 2 for layer, pair in bits(graph_module).items() if layer.startswith("blocks"))


def test_weighted_errors_count_as_the_cost_they_stand_for(allocated: GraphModule) -> None:
    """Raising from 3 to 4 bits cannot promise more than the whole cost at 3."""
    _, plain = updated(allocated, rounds=1)
    graph_module, weighted = updated(allocated, rounds=1, weighted=True)
    allocation = ALLOCATION.get(graph_module)
    assert allocation is not None
    assert 0 < -weighted["trajectory"][0]["predicted"] < allocation.objective
    assert plain["trajectory"][0]["predicted"] != weighted["trajectory"][0]["predicted"]


def test_with_labels_the_score_is_the_share_of_wrong_classes(allocated: GraphModule) -> None:
    graph_module = copy.deepcopy(allocated)
    found = {node: annotation_of(node) for node in nodes_with_role(graph_module)}
    assignment = {node: annotation.bits for node, annotation in found.items() if annotation.has_bits}
    (scores,) = Divergence(graph_module, IMAGES).outputs(assignment)
    labels = tuple(scores.argmax(1).tolist())
    wrong = (*((label + 1) % 10 for label in labels[:2]), *labels[2:])
    _, notes = updated(allocated, labels=wrong, rounds=0)
    assert notes["score_before"] == 2 / 8
    late = (*labels[:4], *((label + 1) % 10 for label in labels[4:]))
    _, held = updated(allocated, labels=late, held_out=0.5, rounds=0)
    assert held["score_before"] == 1
    with pytest.raises(PipelineError, match="2 labels for 8 images"):
        updated(allocated, labels=(1, 2))


def test_ties_are_kept_only_where_the_paper_keeps_them(allocated: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Divergence, "of", lambda *_: 1.0)
    _, refused = updated(allocated, patience=1)
    assert [entry["kept"] for entry in refused["trajectory"]] == [False]
    _, accepted = updated(allocated, patience=1, ties=True, rounds=2)
    assert accepted["trajectory"]
    assert all(entry["kept"] for entry in accepted["trajectory"])


def test_part_of_the_images_can_be_held_out(allocated: GraphModule) -> None:
    _, notes = updated(allocated, held_out=0.5, rounds=0)
    assert notes["score_before"] == pytest.approx(divergence(allocated, IMAGES[4:]))


def test_it_is_deterministic_and_kept(allocated: GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, notes = updated(allocated, Cache(tmp_path))
    again, same = updated(allocated)
    assert bits(first) == bits(again)
    assert notes["trajectory"] == same["trajectory"]
    monkeypatch.setattr(Divergence, "of", lambda *_: pytest.fail("measured again"))
    recalled, told = updated(allocated, Cache(tmp_path))
    assert bits(recalled) == bits(first)
    assert told == notes


def test_refusals(allocated: GraphModule) -> None:
    for options in ({"patience": 0}, {"size": 4}, {"held_out": 1.0}, {"estimate": "expected", "tied": False}):
        with pytest.raises(PipelineError):
            UpdateBits(**options)  # type: ignore[arg-type]
    bare = copy.deepcopy(allocated)
    bare.meta.clear()
    with pytest.raises(PipelineError, match="needs the allocation"):
        UpdateBits().apply(bare, replace(PassContext(IMAGES)))
