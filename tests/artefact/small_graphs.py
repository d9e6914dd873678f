"""Graphs of one call or one module, and what a file makes of them."""

from __future__ import annotations

import json

from torch import nn
from torch.fx import Graph, GraphModule

from fxquant.artefact.graph_json import graph_from_json, graph_to_json


def round_trip(graph_module: GraphModule) -> GraphModule:
    document, tensors = graph_to_json(graph_module)
    return graph_from_json(json.loads(json.dumps(document, allow_nan=False)), tensors)


def one_call(op: str, target: object, *args: object, **kwargs: object) -> GraphModule:
    """forward(x): return target(x, *args, **kwargs)."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.create_node(op, target, (x, *args), kwargs))
    return GraphModule(nn.Module(), graph)


def one_module(module: nn.Module, path: str = "body.layer") -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module(path, (x,)))
    return GraphModule({path: module.eval()}, graph)
