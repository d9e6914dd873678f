"""The whole model as OpenVINO runs its ONNX export; what it makes of each layer is asked of the compiled model."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from fxquant.errors import MissingExtraError
from fxquant.export.onnx_file import to_onnx
from fxquant.export.openvino_model import OpenvinoModel, check_openvino
from fxquant.graph.facts import Fact
from fxquant.graph.names import add_module
from fxquant.graph.nodes import image_of
from fxquant.graph.output_tree import leaves
from fxquant.quantizers.families import UNIFORM_FAMILIES
from passes.lower.backend import Backend
from passes.lower.integer_plan import note_kernel
from passes.lower.rewrite import REQUIRES
from passes.lower.rewrites.exchange_linears import UNIFORM_INSTEAD, uniform_nodes
from passes.pipeline.contract import PassContext

_MODULE = "openvino_model"


def _why_absent() -> MissingExtraError | None:
    try:
        check_openvino()
    except MissingExtraError as error:
        return error
    return None


@dataclass(frozen=True)
class CallOpenvino:
    """One call in the place of all nodes; only the check of the image's shape stays."""

    requires: ClassVar[frozenset[Fact]] = REQUIRES
    provides: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Replace in place; returns 1, or 0 where that was done before. Raises BackendError, ExportError."""
        graph = graph_module.graph
        if any(isinstance(module, OpenvinoModel) for module in graph_module.modules()):
            return 0
        module = OpenvinoModel(to_onnx(graph_module).content)
        path = add_module(graph_module, _MODULE, module)
        image, output = image_of(graph_module), graph.output_node()
        with graph.inserting_before(output):
            found = graph.call_module(path, (image,))
            output.args = (_in_the_place_of(output.args[0], found),)
        graph.eliminate_dead_code()
        for layer, kernel in module.kernels().items():
            note_kernel(graph_module, kernel, layer)
        return 1


def _in_the_place_of(simulated: Any, found: Node) -> Any:
    """The node that gives what OpenVINO found, or one for each tensor, with the shapes of those they replace."""
    results = leaves(simulated)
    nodes = []
    for place, result in enumerate(results):
        node = found if len(results) == 1 else found.graph.call_function(operator.getitem, (found, place))
        node.meta.update({key: value for key, value in result.meta.items() if key == "tensor_meta"})
        nodes.append(result if result.op == "get_attr" else node)
    return nodes[0] if isinstance(simulated, Node) else tuple(nodes)


BACKEND = Backend(
    name="openvino",
    summary="what OpenVINO makes of the exported model",
    families=UNIFORM_FAMILIES,
    edges=("post_gelu", "post_relu", "post_softmax", "other", "image"),
    instead=UNIFORM_INSTEAD,
    finds=uniform_nodes,
    why_absent=_why_absent,
    pipeline=(CallOpenvino(),),
)
