"""Lower: run quantized nodes as integers where kernels can do so exactly; the rest stays simulated, and says so.

The lowered graph computes what the simulated one does: the same codes, outputs within float rounding. Which kernel
each layer got is in `execution_of(graph_module)`. A lowered graph belongs to the machine it was lowered on: save the
simulated one. Running it again changes nothing.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from fxquant.checks.arguments import text
from fxquant.checks.hints import check_fields
from fxquant.errors import BackendError
from fxquant.export.onnx_file import to_onnx
from fxquant.export.openvino_model import OpenvinoModel, check_openvino
from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.graph.facts import LOWERED, QUANTIZED, Fact, facts_of
from fxquant.graph.names import add_module, exchange_module
from fxquant.graph.nodes import image_of
from fxquant.graph.notes import EXECUTION
from fxquant.runtime.integer.byte_codes import ByteCode
from fxquant.runtime.integer.lowered import IntegerConv2d, IntegerLinear, IntegerMatmul
from fxquant.runtime.integer.torch_linear import IntMmLinear, OnednnLinear, TorchLinear
from fxquant.runtime.native import library
from fxquant.runtime.simulated import QuantizedConv2d, QuantizedLinear
from passes.lower.batch_shapes import BatchShapes
from passes.lower.integer_plan import IntegerPlan, integer_nodes, plan
from passes.lower.prove_lowering import prove_lowering
from passes.lower.rewrites.assemble_tokens import assemble_tokens
from passes.lower.rewrites.fuse_chain import fuse_chains
from passes.lower.rewrites.fuse_codes import fuse_attention, fuse_epilogues, fuse_layer_norms
from passes.lower.rewrites.order_rows import moved_norms, order_rows
from passes.lower.rewrites.select_tokens import select_tokens
from passes.pipeline.contract import PassContext

BACKENDS = ("auto", "cpu-native", "cpu-onednn", "cuda", "openvino", "simulated")
SIMULATED = "simulated"
_OPENVINO = "openvino_model"
_GPU = "cuda"
_INT8_CORES = (7, 5)  # compute capability


@dataclass(frozen=True)
class Lower:
    """Replace simulated nodes by integer ones.

    backend: "cpu-native", our kernels; "cpu-onednn", linear layers through torch's oneDNN; "cuda", linear layers
    through torch's int8 products on a GPU, the rest there in float; "openvino", the whole model as OpenVINO runs its
    ONNX export; "simulated", nothing; "auto", the first of cpu-native, cpu-onednn and simulated that this machine has.
    chains: run whole blocks in one call, "cpu-native" only; without, the graph shows
    every layer.
    """

    backend: str = "auto"
    chains: bool = True

    requires: ClassVar[frozenset[Fact]] = frozenset({QUANTIZED})
    provides: ClassVar[frozenset[Fact]] = frozenset({LOWERED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def __post_init__(self) -> None:
        """Raise BackendError for options that do not fit."""
        check_fields(self, BackendError)
        check_backend(self.backend)

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Lower in place; returns how many layers run as integers. Raises BackendError where a backend cannot run."""
        backend = resolved(self.backend)
        layers = [annotation_of(node).layer for node in nodes_with_role(graph_module) if _has_bits(node)]
        execution = dict.fromkeys(layers, SIMULATED) | execution_of(graph_module)
        lower: dict[str, Callable[[GraphModule], dict[str, str]]] = {
            "cpu-native": functools.partial(_lower_native, chains=self.chains),
            "cpu-onednn": _lower_onednn,
            "cuda": _lower_cuda,
            "openvino": _lower_openvino,
        }
        kernels = lower.get(backend, _keep)(graph_module)
        execution |= {layer: kernel for layer, kernel in kernels.items() if layer in execution}
        graph_module.delete_all_unused_submodules()
        graph_module.graph.lint()
        graph_module.recompile()
        EXECUTION.write(graph_module, execution)
        context.note(backend=backend, kernels=sorted(set(execution.values())))
        return sum(kernel != SIMULATED for kernel in execution.values())

    def prove(self, simulated: GraphModule, lowered: GraphModule, context: PassContext) -> tuple[float, float] | None:
        """How far the lowered graph is from the simulated one, see `prove_lowering`; None: nothing was lowered."""
        if resolved(self.backend) == SIMULATED or LOWERED in facts_of(simulated):
            return None
        return prove_lowering(simulated, lowered, self, replace(self, chains=False), context.answers)


def execution_of(graph_module: GraphModule) -> dict[str, str]:
    """By layer, the kernel that runs it, such as "linear avx512-vnni", or "simulated"; empty before Lower."""
    return dict(EXECUTION.get(graph_module) or {})


def execution_summary(execution: dict[str, str]) -> str:
    """One line: how many layers run as integers, and how; "simulated" where none does."""
    kernels = Counter(kernel for kernel in execution.values() if kernel != SIMULATED)
    if not kernels:
        return SIMULATED
    listed = ", ".join(f"{count} {kernel}" for kernel, count in kernels.most_common())
    rest = "" if kernels.total() == len(execution) else "; the others simulated"
    return f"integer: {kernels.total()} of {len(execution)} layers ({listed}){rest}"


def check_backend(backend: str) -> None:
    """Raise BackendError for a name that is none of BACKENDS."""
    if text("backend", backend, BackendError) not in BACKENDS:
        raise BackendError(f"no backend is called {backend!r}; there are {', '.join(BACKENDS)}")


def backend_summary(graph_module: GraphModule, backend: str) -> str:
    """One line on a simulated graph: how many of its layers a backend will run as integers, and which not.

    The kernels need not be on this machine, except to say what "auto" is.
    """
    name = resolved(backend) if backend == "auto" else backend
    finders: dict[str, Callable[[GraphModule], Iterable[torch.fx.Node]]] = {
        "cpu-native": integer_nodes,
        "cpu-onednn": _uniform_linears,
        "cuda": _uniform_linears,
        "openvino": _uniform_nodes,
    }
    runs = set(finders[name](graph_module)) if name in finders else set()
    layers = {annotation_of(node).layer: node in runs for node in nodes_with_role(graph_module) if _has_bits(node)}
    left = [layer for layer, is_integer in layers.items() if not is_integer]
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    rest = f"; simulated: {', '.join(left[:3])}{more}" if left else ""
    return f"{name}: {len(layers) - len(left)} of {len(layers)} layers run as integers{rest}"


def resolved(backend: str) -> str:
    """What "auto" means here.

    Raises BackendError, saying what is missing, for a backend that cannot run; MissingExtraError without OpenVINO.
    """
    has_vnni = bool(torch.cpu._is_vnni_supported())
    if backend == "auto":
        return "cpu-native" if library.why_absent() is None else "cpu-onednn" if has_vnni else SIMULATED
    if backend == "cpu-native":
        library.library()
    if backend == "openvino":
        check_openvino()
    if backend == "cpu-onednn" and not has_vnni:
        raise BackendError("oneDNN's int8 products are exact on CPUs with AVX512-VNNI only; use 'cpu-native'")
    if backend == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= _INT8_CORES):
        raise BackendError("'cuda' needs a GPU with int8 tensor cores and a torch built for it; use 'auto'")
    return backend


def _has_bits(node: torch.fx.Node) -> bool:
    annotation = annotation_of(node)
    return annotation.weight_bits is not None or annotation.activation_bits is not None


def _keep(graph_module: GraphModule) -> dict[str, str]:
    return {}


def _lower_native(graph_module: GraphModule, chains: bool) -> dict[str, str]:
    shapes = BatchShapes(graph_module)
    may_order = moved_norms(graph_module) and any(shapes.values)  # found now: a graph in planning cannot run
    planned = plan(graph_module)
    kernels = fuse_attention(planned)
    if may_order:
        order_rows(planned, shapes)
    fuse_epilogues(planned)
    fuse_layer_norms(planned)
    for node in list(planned.nodes):
        kernels[annotation_of(node).layer] = _build(planned, node)
    select_tokens(graph_module)
    assemble_tokens(graph_module)
    graph_module.graph.eliminate_dead_code()
    if chains:
        fuse_chains(graph_module, shapes)
    return {layer: f"{kernel} {library.instruction_set()}" for layer, kernel in kernels.items()}


def _build(planned: IntegerPlan, node: torch.fx.Node) -> str:
    """Put the integer module in the place of the simulated one; returns the kernel's name."""
    module, chosen = planned.module(node), planned.nodes[node]
    replacement: torch.nn.Module
    if isinstance(module, QuantizedConv2d):
        replacement, kernel = IntegerConv2d(module, chosen.codes[0]), "convolution"
    elif isinstance(module, QuantizedLinear):
        replacement, kernel = IntegerLinear(module, chosen.codes[0], chosen.epilogue), "linear"
    else:
        replacement, kernel = IntegerMatmul(*chosen.codes), "matmul"
    exchange_module(planned.graph_module, node, replacement)
    return kernel


def _lower_onednn(graph_module: GraphModule) -> dict[str, str]:
    return _lower_linears(graph_module, OnednnLinear, "linear onednn")


def _lower_linears(graph_module: GraphModule, kind: type[TorchLinear], kernel: str) -> dict[str, str]:
    kernels = {}
    for node, code in _uniform_linears(graph_module).items():
        module = graph_module.get_submodule(str(node.target))
        assert isinstance(module, QuantizedLinear)
        exchange_module(graph_module, node, kind(module, code))
        kernels[annotation_of(node).layer] = kernel
    return kernels


def _lower_cuda(graph_module: GraphModule) -> dict[str, str]:
    """The model moves to the GPU; images and scores stay where the caller has the images."""
    kernels = _lower_linears(graph_module, IntMmLinear, "linear cuda")
    graph = graph_module.graph
    image, output = image_of(graph_module), graph.output_node()
    if kernels:
        graph_module.to(_GPU)
        with graph.inserting_after(image):
            there = graph.call_method("to", (image, _GPU))
        there.meta.update(image.meta)
        image.replace_all_uses_with(there, delete_user_cb=lambda user: user is not there)
        with graph.inserting_before(output):
            home = graph.call_function(getattr, (image, "device"))
            output.args = torch.fx.node.map_arg(output.args, lambda scores: graph.call_method("to", (scores, home)))
    return kernels


def _uniform_nodes(graph_module: GraphModule) -> dict[torch.fx.Node, ByteCode]:
    """What runs as integers on uniform codes, with the code of its first input."""
    found = integer_nodes(graph_module).items()
    return {node: codes[0] for node, codes in found if all(code.kind == library.UNIFORM for code in codes)}


def _uniform_linears(graph_module: GraphModule) -> dict[torch.fx.Node, ByteCode]:
    return {
        node: code
        for node, code in _uniform_nodes(graph_module).items()
        if isinstance(graph_module.get_submodule(str(node.target)), QuantizedLinear)
    }


def _lower_openvino(graph_module: GraphModule) -> dict[str, str]:
    """One call in the place of all nodes; only the check of the image's shape stays."""
    graph = graph_module.graph
    if any(isinstance(module, OpenvinoModel) for module in graph_module.modules()):
        return {}
    module = OpenvinoModel(to_onnx(graph_module).content)
    path = add_module(graph_module, _OPENVINO, module)
    image, output = image_of(graph_module), graph.output_node()
    with graph.inserting_before(output):
        scores = graph.call_module(path, (image,))
    simulated: Any = output.args[0]
    scores.meta.update({key: value for key, value in simulated.meta.items() if key == "tensor_meta"})
    output.args = (scores,)
    graph.eliminate_dead_code()
    return module.kernels()
