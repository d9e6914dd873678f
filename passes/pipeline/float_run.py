"""A quantized graph run in float, every quantizer bypassed, and how far outputs of two such runs are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node

from fxquant.graph.nodes import tensor_at
from fxquant.graph.output_tree import Output, leaves
from fxquant.runtime.simulated import QuantizedInput, QuantizedMatmul, QuantizedWeightModule

RELATIVE, ABSOLUTE = 1e-4, 1e-5
_SAMPLES = 256  # values of a node that are kept, evenly spaced

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Float tensors by node and, of a module, by their names in it; a constant's is called ""."""


@dataclass(frozen=True)
class Run:
    """One run of the graph on the images. output: what the graph returns. samples: by node, some of its values."""

    output: Output
    samples: dict[str, Tensor] = field(default_factory=dict)


def float_tensors(graph_module: GraphModule, copied: bool) -> Tensors:
    """All tensors that the nodes of a float graph compute with. copied: so that nobody changes them in place."""
    found: dict[str, dict[str, Tensor]] = {}
    taken: dict[int, Tensor] = {}
    for node in graph_module.graph.nodes:
        own: dict[str, Tensor] = {}
        if node.op == "call_module":
            own = _state(graph_module.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            own = {"": tensor_at(graph_module, node)}
        for name, tensor in own.items():
            kept = taken.setdefault(id(tensor), tensor.detach().clone() if copied else tensor.detach())
            found.setdefault(node.name, {})[name] = kept
    return found


@torch.no_grad()
def run_in_float(graph_module: GraphModule, images_bchw: Tensor, tensors: Tensors) -> Run:
    """The graph on images, float (B, C, H, W), with every quantizer bypassed.

    Args:
        graph_module: a simulated graph, or one with observers.
        images_bchw: float (B, C, H, W).
        tensors: float tensors that take the place of a module's own, where there are some for it.
    """
    interpreter = _Bypass(graph_module, tensors)
    output: Any = interpreter.run(images_bchw.clone())
    return Run(output, interpreter.samples)


def furthest(found: Output, expected: Output) -> tuple[float, float]:
    """Difference and tolerance of the tensor that uses most of what it is allowed, of all that a model returns."""
    pairs = zip(leaves(found), leaves(expected), strict=True)
    compared = [(difference(one, other), tolerance(other)) for one, other in pairs]
    return max(compared, key=lambda pair: pair[0] / pair[1])


def difference(found: Any, expected: Tensor) -> float:
    """Largest difference; infinite between tensors of different shapes, and where one is not a number."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return float("inf")
    largest = float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0
    return float("inf") if largest != largest else largest


def tolerance(expected: Tensor) -> float:
    """What outputs may differ by through the rounding of float32, see the module."""
    values = expected.double() if expected.numel() else expected.new_zeros(1).double()
    return RELATIVE * float(values.max() - values.min()) + ABSOLUTE * max(float(values.abs().max()), 1e-6)


class _Bypass(Interpreter):
    """Runs a graph, quantized or not, without its quantizers."""

    def __init__(self, graph_module: GraphModule, tensors: Tensors) -> None:
        super().__init__(graph_module)
        self.tensors = tensors
        self.samples: dict[str, Tensor] = {}

    def run_node(self, node: Node) -> Any:
        restored = self.tensors.get(node.name, {})
        if node.op == "get_attr" and restored:
            result: Any = restored[""]
        elif node.op == "call_module":
            arguments, keywords = self.fetch_args_kwargs_from_env(node)
            result = _in_float(self.module.get_submodule(str(node.target)), restored, arguments, keywords)
        else:
            result = super().run_node(node)
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
            self.samples[node.name] = _samples(result.detach())
        return result


def _in_float(module: nn.Module, tensors: Mapping[str, Tensor], arguments: Any, keywords: Any) -> Any:
    """What a module computes without its quantizers, with these tensors in the place of its own."""
    if isinstance(module, QuantizedWeightModule):
        bias = None if module.bias is None else tensors.get("bias", module.bias)
        return module.in_float(arguments[0], tensors.get("weight", module.weight), bias)
    if isinstance(module, QuantizedMatmul):
        return module.in_float(*arguments)
    if isinstance(module, QuantizedInput):
        return _in_float(module.inner, tensors, arguments, keywords)
    own = _state(module)
    return functional_call(module, {k: t for k, t in tensors.items() if k in own}, arguments, keywords)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _samples(value: Tensor) -> Tensor:
    """Values of a tensor, evenly spaced; an odd step goes through all channels."""
    step = max(1, value.numel() // _SAMPLES) | 1
    places = torch.arange(0, value.numel(), step)
    return value[torch.unravel_index(places, value.shape)] if value.ndim else value.reshape(1)
