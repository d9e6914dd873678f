"""Whether what a model returns are class scores: one number per class, as a classifier's head gives them.

Losses that compare distributions over classes say nothing of anything else: of one number they are 0 whatever happens
to it, and of embeddings or feature maps they measure what nobody asked for. So the output has to look like scores:

- two dimensions (B, classes) with at least two classes; and
- either the model says so, by an attribute `num_classes` (timm, torchvision) or `config.num_labels` (transformers) that
  is the number of its outputs, while 0 says that it has no head;
- or the node that gives the output is a linear layer of as many outputs, or a convolution averaged over all places;
  between it and the output lie only operations that keep classes apart: moving data, averaging tokens, adding or
  scaling such scores, softmax, sigmoid. Norms, pooled features, activations and divisions by a norm do not, and
  nothing but the output reads scores.

A last layer whose name says that it projects (proj, projection, embedding) gives embeddings, as CLIP's does.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from fxquant.graph.nodes import module_of, moves_data, reads_shape, shape_of
from fxquant.graph.notes import CLASSES

_KEEP_CLASSES_APART = {
    operator.add, operator.iadd, operator.sub, operator.truediv, operator.mul, torch.add, torch.sub, torch.mul,
    torch.div, torch.stack, torch.softmax, torch.log_softmax, torch.sigmoid, functional.softmax, functional.log_softmax,
    functional.sigmoid, functional.logsigmoid, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool1d,
}  # fmt: skip
_KEEP_METHODS = {"add", "sub", "mul", "div", "softmax", "log_softmax", "sigmoid", "float", "double", "to", "type_as"}
_KEEP_MODULES = (
    nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid, nn.Identity, nn.Dropout, nn.Flatten,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AvgPool2d,
)  # fmt: skip
_PROJECTIONS = ("proj", "embed")


def declared_classes(model: nn.Module) -> int | None:
    """How many classes a model says it has; None where it does not say."""
    found = getattr(model, "num_classes", None)
    if found is None:
        found = getattr(getattr(model, "config", None), "num_labels", None)
    return found if type(found) is int and found >= 0 else None


def why_no_class_scores(graph_module: GraphModule) -> str | None:
    """What the model returns instead of class scores, in words; None where it returns them.

    graph_module: traced; observers may be in place. Of a graph without shapes nothing is said, None.
    """
    output: Any = graph_module.graph.output_node().args[0]
    source = output[0] if isinstance(output, tuple | list) and output else output
    shape = shape_of(source)
    if shape is None:
        return None  # a graph without shapes; what it gives is seen when it has run
    if len(shape) != 2:
        return f"its output has shape (B, {', '.join(map(str, shape[1:]))})"
    if shape[1] == 1:
        return "it gives one number per image, of which no distribution over classes can be made"
    declared = CLASSES.get(graph_module)
    if declared == shape[1]:
        return None
    if declared == 0:
        return f"it has no head (num_classes=0) and gives {shape[1]} features"
    return _why_no_scores(graph_module, source, shape[1])


def _why_no_scores(graph_module: GraphModule, output: Node, classes: int) -> str | None:
    """The first node, from the output back, that gives no scores."""
    pending, seen = [output], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        module = module_of(graph_module, node)
        size = _head_size(module)
        if size is not None:
            name = str(node.target).rpartition(".")[2].lower()
            if size != classes:
                return f"its {classes} outputs are values of '{node.target}' at several places, a feature map"
            if any(part in name for part in _PROJECTIONS):
                return f"its last layer, '{node.target}', is called a projection and gives embeddings"
        elif _keeps_classes_apart(node, module):
            pending += [source for source in node.all_input_nodes if source.op != "get_attr" and shape_of(source)]
        else:
            what = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
            return f"its output comes from {what} ('{node.name}') and not from a head, so it is features or embeddings"
    for node in seen:
        other = [u for u in node.users if u not in seen and u.op != "output" and not reads_shape(u)]
        if other:
            return f"its output is made of values that '{other[0].name}' reads too, as features are"
    return None


def _head_size(module: nn.Module | None) -> int | None:
    """Outputs of a layer that may be a head, None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, nn.modules.conv._ConvNd) else None


def _keeps_classes_apart(node: Node, module: nn.Module | None) -> bool:
    if node.op == "call_module":
        # An observer, with no children and no parameters, passes on what it is given.
        return isinstance(module, _KEEP_MODULES) or hasattr(module, "keeps_gram")
    if node.op == "call_function" and node.target in _KEEP_CLASSES_APART:
        # A quotient of two tensors is a normalised one.
        is_quotient = node.target in (operator.truediv, torch.div)
        return not is_quotient or not isinstance(node.args[1], Node) or shape_of(node.args[1]) is None
    return moves_data(node) or (node.op == "call_method" and node.target in _KEEP_METHODS)
