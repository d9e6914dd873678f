"""Exported models for the tests of export, and what runs them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule

import fxquant
from allocators.uniform import Uniform
from fxquant.quantizers.quantizer import Quantizer
from fxquant.runtime.simulated import QuantizedInput
from tests.models import ARCHITECTURES, images


def compiled(architecture: str, recipe: str = "mptq_vit", budget: str = "W4A6", **options: Any) -> fxquant.Compiled:
    model, size = ARCHITECTURES[architecture]()
    return fxquant.compile(
        model,
        budget,
        calibration=images(4, size),
        recipe=recipe,
        allocator=Uniform(),
        card={"note": "a test"},
        **options,
    )


def exact(model: fxquant.Compiled, images_bchw: Tensor) -> Tensor:
    """Scores of the simulated graph in float64: what every float32 execution approximates."""
    with torch.inference_mode():
        scores: Tensor = copy.deepcopy(model.graph_module).double()(images_bchw.double())
    return scores


def side_by_side(quantizers: list[Quantizer], channels: int) -> GraphModule:
    """(B, 1, 1, channels) to every quantizer's values of it, stacked along dimension 1."""
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    results = []
    for index, quantizer in enumerate(quantizers):
        root.add_module(f"q{index}", QuantizedInput(nn.Identity(), quantizer))
        results.append(graph.call_module(f"q{index}", (x,)))
    graph.output(graph.call_function(torch.cat, (results, 1)))
    graph_module = GraphModule(root.eval(), graph).eval()
    graph_module.meta["image_shape"] = (1, 1, channels)
    return graph_module


def run_in_onnxruntime(content: bytes, images_bchw: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images_bchw.numpy()})[0])
