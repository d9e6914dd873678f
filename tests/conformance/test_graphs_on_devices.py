"""Architectures that make tensors of their own: their graph is the same from a device as from the CPU, and moves."""

from __future__ import annotations

import copy

import pytest
import torch

from fxquant.graph.capture.tracing import trace
from tests.conformance.architectures import OTHERS, TRANSFORMERS, Architecture
from tests.stand_in_device import stand_in

NAMES = (
    "eva02_tiny_patch14_224",
    "swinv2_tiny_window8_256",
    "vit_base_patch16_siglip_224",
    "vit_relpos_small_patch16_224",
    "vit_small_patch16_rope_224",
    "xcit_nano_12_p16_224",
)
MADE = [architecture for architecture in (*TRANSFORMERS, *OTHERS) if architecture.name in NAMES]


@pytest.mark.parametrize("architecture", MADE, ids=lambda a: a.name)
def test_a_graph_is_the_same_from_every_device(architecture: Architecture) -> None:
    model = architecture.built().eval()
    images = torch.rand(2, 3, architecture.size, architecture.size)
    here, there = trace(model, images), trace(copy.deepcopy(model).to(stand_in()), images)
    assert there.code == here.code
    with torch.no_grad():
        moved = copy.deepcopy(here).to(stand_in())(images.to(stand_in()))
        assert torch.equal(moved.cpu(), there(images.to(stand_in())).cpu())
        assert torch.equal(moved.cpu(), here(images))
