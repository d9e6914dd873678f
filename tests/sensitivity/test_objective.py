"""Objectives: the two halves of each agree, and each takes the outputs it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError
from fxquant.graph.capture.tracing import trace
from fxquant.sensitivity.divergence import cosine_distance, kl_divergence, relative_squared_error
from fxquant.sensitivity.objective import CLASSES, EMBEDDINGS, FEATURES, OBJECTIVES, Draws, Objective, objective_named
from tests.models import images, vit

OUTPUTS: dict[str, tuple[Tensor, ...]] = {
    "classes": (torch.randn(3, 7, dtype=torch.float64),),
    "features": (3 * torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)),
    "embeddings": (2 * torch.randn(3, 9, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_cotangents_predict_the_divergence_of_small_errors(name: str) -> None:
    objective, wanted = OBJECTIVES[name], OUTPUTS[name]
    torch.manual_seed(1)
    errors = tuple(1e-3 * torch.randn_like(tensor) for tensor in wanted)
    cotangents = objective.cotangents(wanted, Draws(20_000, seed=3))
    along = sum((v * e).flatten(2).sum(2) for v, e in zip(cotangents, errors, strict=True))
    assert isinstance(along, Tensor)
    predicted = 0.5 * along.square().mean(0).sum()
    moved = tuple(y + e for y, e in zip(wanted, errors, strict=True))
    assert float(predicted) == pytest.approx(float(objective.divergence(wanted, moved)), rel=0.03)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_cotangents_and_divergences_go_image_by_image(name: str) -> None:
    objective, wanted = OBJECTIVES[name], OUTPUTS[name]
    whole = objective.cotangents(wanted, Draws(4, seed=5))
    found = tuple(tensor.flip(-1) for tensor in wanted)
    total = 0.0
    for index in range(3):
        one, other = (tuple(tensor[index : index + 1] for tensor in each) for each in (wanted, found))
        alone = objective.cotangents(one, Draws(4, seed=5, first=index))
        for tensor, part in zip(whole, alone, strict=True):
            torch.testing.assert_close(tensor[:, index : index + 1], part, rtol=1e-12, atol=0)
        total += float(objective.divergence(one, other))
    assert total == pytest.approx(float(objective.divergence(wanted, found)))


def test_divergences_by_hand() -> None:
    wanted, found = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert float(relative_squared_error(wanted, found)) == pytest.approx(16 / 25 + 4)
    assert float(cosine_distance(wanted[:1], found[:1])) == pytest.approx(1 - 9 / 15)
    p, q = (torch.tensor([[probability, 1 - probability]]) for probability in (0.25, 0.5))
    expected = 0.25 * torch.tensor(0.25 / 0.5).log() + 0.75 * torch.tensor(0.75 / 0.5).log()
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(float(expected))


class Features(nn.Module):
    """A layer, and what is made of its output."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.layer, self.made = nn.Conv2d(3, 6, 8, 8), made

    def forward(self, x: Tensor) -> Any:
        return self.made(self.layer(x))


def test_auto_takes_classes_for_class_scores_and_features_for_all_else() -> None:
    classifier, pooled = trace(vit(depth=1), images(2)), trace(vit(depth=1, num_classes=0), images(2))
    assert objective_named("auto", classifier) is CLASSES
    assert objective_named("auto", pooled) is FEATURES
    assert objective_named("embeddings", pooled) is EMBEDDINGS
    assert objective_named(FEATURES, classifier) is FEATURES


def test_outputs_that_do_not_begin_with_the_images_are_refused() -> None:
    graph_module = trace(Features(lambda y: y.flatten(2).permute(2, 0, 1)), images(2))
    with pytest.raises(CalibrationError, match="does not begin with the images"):
        FEATURES.check(graph_module, "calibration")
    FEATURES.check(trace(Features(lambda y: y.flatten(2)), images(2)), "calibration")


def test_labels_cannot_be_drawn_of_features() -> None:
    with pytest.raises(CalibrationError, match='use "signs"'):
        FEATURES.cotangents(OUTPUTS["features"], Draws(1, fisher="sampled"))


def test_an_objective_of_ones_own_has_a_key_that_no_other_process_has() -> None:
    keys = {objective.key for objective in OBJECTIVES.values()}
    assert keys == set(OBJECTIVES)
    values = {name: getattr(CLASSES, name) for name in Objective.__dataclass_fields__}
    own = Objective(**{**values, "divergence": lambda wanted, found: torch.zeros(())})
    assert own.key not in keys
    assert own.key.startswith("classes ")


def test_an_output_that_depends_on_no_tensor_has_no_gradient() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    outputs, draws = (2 * x, torch.ones(2, 5)), Draws(2)
    found = [gradient for (gradient,) in FEATURES.gradients(outputs, [x], draws)]
    wanted = [2 * cotangent for cotangent in FEATURES.cotangents(outputs, draws)[0]]
    assert all(torch.allclose(one, other) for one, other in zip(found, wanted, strict=True))
