"""The kinds of operations that role patterns distinguish, in a normalized graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional


class Kind(StrEnum):
    """What an operation is, as far as patterns care."""

    IMAGE = "image"
    OUTPUT = "output"
    CONSTANT = "constant"
    LINEAR = "linear"
    CONV = "convolution"
    DEPTHWISE = "depthwise convolution"
    FLOAT_CONV = "convolution that stays float"
    LAYER_NORM = "layer norm"
    SOFTMAX = "softmax"
    GELU = "gelu"
    ACTIVATION = "activation"
    MATMUL = "matmul"
    SUM = "sum of activations"
    OTHER = "other"


_ACTIVATION_MODULES = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish)
_ACTIVATIONS = {functional.relu, functional.silu, functional.hardswish, functional.relu6, torch.relu, "relu", "relu_"}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_", operator.sub}
_PRODUCTS = {operator.mul, torch.mul, "mul"}
_SIGMOIDS = {torch.sigmoid, functional.sigmoid, "sigmoid"}
_QUICK_GELU_SLOPE = 1.702


def tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """Inputs of the node that hold tensors, in argument order."""
    return (source for source in node.all_input_nodes if "tensor_meta" in source.meta)


def kind_of(graph_module: fx.GraphModule, node: fx.Node) -> Kind:
    """The node's kind; the graph must be normalized and have `tensor_meta`."""
    if node.op in ("placeholder", "output", "get_attr"):
        return {"placeholder": Kind.IMAGE, "output": Kind.OUTPUT, "get_attr": Kind.CONSTANT}[node.op]
    if node.op == "call_module":
        return _kind_of_module(graph_module.get_submodule(str(node.target)))
    if node.target is torch.matmul:
        return Kind.MATMUL
    if node.target in _ACTIVATIONS:
        return Kind.ACTIVATION
    if is_quick_gelu(node):
        return Kind.GELU
    activations = [source for source in tensor_inputs(node) if source.op != "get_attr"]
    return Kind.SUM if node.target in _SUMS and len(activations) == 2 else Kind.OTHER


def _kind_of_module(module: nn.Module) -> Kind:
    if isinstance(module, nn.Conv2d):
        return Kind.CONV if module.groups == 1 else Kind.DEPTHWISE
    if isinstance(module, nn.modules.conv._ConvNd):  # of another dimension, or transposed
        return Kind.FLOAT_CONV
    kinds: list[tuple[Any, Kind]] = [
        (nn.Linear, Kind.LINEAR),
        (nn.LayerNorm, Kind.LAYER_NORM),
        (nn.Softmax, Kind.SOFTMAX),
        (nn.GELU, Kind.GELU),
        (_ACTIVATION_MODULES, Kind.ACTIVATION),
    ]
    return next((kind for classes, kind in kinds if isinstance(module, classes)), Kind.OTHER)


def is_quick_gelu(node: fx.Node) -> bool:
    """Whether the node is the product in x * sigmoid(1.702 x), CLIP's approximation of GELU."""
    if node.target not in _PRODUCTS or len(node.args) != 2:
        return False
    sigmoid = node.args[1]
    inner = sigmoid.args[0] if isinstance(sigmoid, fx.Node) and sigmoid.target in _SIGMOIDS else None
    return (
        isinstance(inner, fx.Node)
        and inner.target in _PRODUCTS
        and set(inner.args) == {node.args[0], _QUICK_GELU_SLOPE}
    )
