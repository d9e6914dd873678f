"""What runs exported models, and a graph of quantizers alone."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule

from fxquant.graph.notes import IMAGE_SHAPE
from fxquant.quantizers.quantizer import Quantizer
from fxquant.runtime.simulated import QuantizedInput


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
    IMAGE_SHAPE.write(graph_module, (1, 1, channels))
    return graph_module


def run_in_onnxruntime(content: bytes, images_bchw: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images_bchw.numpy()})[0])
