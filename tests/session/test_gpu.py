"""On a real GPU: what is compiled there is what the CPU makes, but for ties (docs/how_to/gpu.md)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import fxquant
from fxquant.data import embedded
from fxquant.session.compiled import Compiled
from fxquant.session.session import Session
from passes.correct.distil import Distil
from passes.recipes import recipe as recipe_named
from tests.models import embedded_blocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

APART = 0.01  # of a tensor's numbers, those that may differ; a row whose scale is a tie differs as a whole


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    """Convolutions in float32, as on the CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def widths_of(model: Compiled) -> list[tuple[str, list[int | None]]]:
    return [(row.layer, [operand.bits for operand in row.operands]) for row in model.layers]


@pytest.mark.parametrize("recipe", ["best", "mptq_vit", "mix_qvit", "adalog"])
def test_a_gpu_gives_the_allocation_and_the_codes_of_the_cpu(recipe: str) -> None:
    plain, images = embedded_blocks(2), embedded.calibration_images(8)
    budget = "MP4" if recipe == "mix_qvit" else "W4A4"
    found, wanted = (
        Session(model, images, recipe=recipe, bits=(3, 4, 8)).compile(budget)
        for model in (copy.deepcopy(plain).cuda(), plain)
    )
    assert widths_of(found) == widths_of(wanted)
    here = wanted.state_dict()
    for name, tensor in found.state_dict().items():
        assert tensor.is_cuda or name.endswith("_extra_state"), name
        if name.endswith("weight_codes") or tensor.is_floating_point():
            same = torch.isclose(tensor.cpu().double(), here[name].double(), rtol=1e-3, atol=1e-5)
            assert float((~same).double().mean()) <= APART, name
    assert found.answers is not None
    assert found.answers.difference(wanted(found.answers.images_for(wanted.graph_module))) <= found.answers.tolerance


def test_training_and_lowering_begin_on_a_gpu() -> None:
    images = embedded.calibration_images(8)
    pipeline = recipe_named("best_thorough")("W4A4", bits=(4, 8)).changed(Distil, steps=4, checks=2)
    model = fxquant.compile(embedded_blocks(1).cuda(), None, calibration=images, recipe=pipeline)
    assert model(images.cuda()).is_cuda
    assert not model.lowered("cpu-native")(images).is_cuda
