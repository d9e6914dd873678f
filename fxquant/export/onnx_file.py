"""A simulated graph as an ONNX model, by torch's exporter: QDQ nodes, a free batch dimension, layers by their names.

Every node of a layer is called `<layer>/<operator>`, for example `blocks.3.mlp.fc1/MatMul`. The card goes into the
metadata under `fxquant`. A model that returns several tensors has an output for each, called by its keys and positions
("logits", "hidden_states.0"), and "output.0" where it has positions alone. Nothing of the machine goes into the file:
the exporter's stack traces are taken out.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from fxquant.errors import ExportError, MissingExtraError
from fxquant.export.narrow_weights import WEIGHT_TYPES, narrow_weights
from fxquant.export.qdq import with_qdq
from fxquant.export.qdq_values import FORMS, OPSET
from fxquant.graph.annotation import annotation_of
from fxquant.graph.facts import LOWERED, facts_of
from fxquant.graph.nodes import image_of
from fxquant.graph.notes import IMAGE_SHAPE
from fxquant.graph.output_tree import tree_of

INPUT, OUTPUT = "images", "scores"
_SCOPES = "pkg.torch.onnx.name_scopes"
_LARGEST_BYTES = 2**31 - 1  # of a protobuf message


@dataclass(frozen=True)
class OnnxModel:
    """content: the file's bytes. layers: by layer "int8" or "simulated", see `fxquant.export.qdq`."""

    content: bytes
    layers: dict[str, str]


def to_onnx(
    graph_module: GraphModule,
    *,
    weight_type: str = "int8",
    runtime: str = "any",
    card: Mapping[str, Any] | None = None,
) -> OnnxModel:
    """The ONNX model (opset 21) of a simulated graph: input "images", float32 (B, C, H, W), output "scores",
    or the names of `output_names` for a tree of tensors.

    Args:
        graph_module: a simulated graph; it is not changed.
        weight_type: "int8"; "int4", which writes weights without a channel of more than 4 bits as INT4 (UINT4 with a
            zero-point): half the size, for runtimes that have it; or "packed", which writes every weight in as many
            bits as it has, see `fxquant.export.narrow_weights`.
        runtime: "any", or "onnxruntime" for the forms that ONNX Runtime runs fastest; the values are the same.
        card: the protocol card, JSON values, which becomes a metadata entry of the file.

    Raises MissingExtraError without onnx and onnxscript; ExportError for a lowered graph, one that is not float32, an
    unknown weight_type or runtime, an operation that torch cannot export, naming it, and more than 2 GiB.
    """
    check_export(weight_type, runtime)
    if LOWERED in facts_of(graph_module):
        raise ExportError("a lowered graph belongs to this machine: export the model it was lowered from")
    shape = image_of(graph_module).meta.get("tensor_meta")  # a graph made by hand may have none
    if (dtype := shape.dtype if shape else torch.float32) != torch.float32:
        raise ExportError(f"the model computes in {dtype}, and ONNX files have float32: compile model.float()")
    layers_by_target = {
        str(node.target): annotation_of(node).layer for node in graph_module.graph.nodes if node.op == "call_module"
    }
    written, layers = with_qdq(graph_module, runtime)
    images, names = torch.zeros(2, *IMAGE_SHAPE.of(graph_module)), output_names(graph_module)
    try:
        with torch.no_grad():
            program: Any = torch.onnx.export(
                written, (images,), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False,
            )  # fmt: skip
    except Exception as error:  # whatever the exporter raises for an operation it does not know
        raise ExportError(f"torch.onnx cannot export this graph: {_last_line(error)}") from error
    model = program.model
    _name_nodes(model, layers_by_target)
    narrow_weights(model, written, weight_type)
    model.producer_name, model.producer_version = "fxquant", None
    model.metadata_props.clear()
    model.metadata_props["fxquant"] = json.dumps(dict(card or {}))
    return OnnxModel(_serialized(model), layers)


def output_names(graph_module: GraphModule) -> list[str]:
    """What an ONNX file calls the tensors that a graph returns, in order, each name once."""
    tree = tree_of(graph_module)
    if tree.is_bare:
        return [OUTPUT]
    taken, found = {INPUT}, []
    for name in tree.names:
        name = f"output.{name}" if not name or name[0].isdigit() else name
        while name in taken:
            name = f"{name}_"
        taken.add(name)
        found.append(name)
    return found


def check_export(weight_type: str, runtime: str = "any") -> None:
    """Fail early: raises MissingExtraError without onnx and onnxscript, ExportError for an unknown name."""
    if weight_type not in WEIGHT_TYPES:
        raise ExportError(f"no weight type is called {weight_type!r}; there are {', '.join(WEIGHT_TYPES)}")
    if runtime not in FORMS:
        raise ExportError(f"files are not written for {runtime!r}; runtime is one of {', '.join(FORMS)}")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("ONNX export needs onnx and onnxscript: pip install 'fxquant[onnx]'") from error


def _last_line(error: BaseException) -> str:
    """What the exporter stumbled over: the cause's message, where it has one."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _name_nodes(model: Any, layers_by_target: Mapping[str, str]) -> None:
    """Call nodes after their layer, and drop what the exporter notes of the machine."""
    taken: set[str] = set()
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        layer = next((layers_by_target[scope] for scope in scopes if layers_by_target.get(scope)), None)
        if layer is not None:
            name, count = f"{layer}/{node.op_type}", 1
            while (unique := name if count == 1 else f"{name}_{count}") in taken:
                count += 1
            taken.add(unique)
            node.name = unique
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None


def _serialized(model: Any) -> bytes:
    import onnx_ir

    content: bytes = onnx_ir.to_proto(model).SerializeToString()
    if len(content) > _LARGEST_BYTES:
        raise ExportError(
            f"the exported model has {len(content)} bytes, and one ONNX file holds at most {_LARGEST_BYTES}: "
            "export a smaller model"
        )
    return content
