"""Which nodes kernels can run exactly: on codes that are bytes, with weights that are signed codes times a scale.

Deliberately not done: a tolerance. What would be right but for rounding somewhere stays simulated, with a reason.
"""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.annotation import annotation_of, nodes_with_role
from fxquant.quantizers.quantizer import Quantizer
from fxquant.quantizers.uniform import UniformQuantizer
from fxquant.runtime.integer.byte_codes import ByteCode, byte_code
from fxquant.runtime.native.library import MAX_INNER
from fxquant.runtime.simulated import (
    QuantizedConv2d,
    QuantizedInput,
    QuantizedLinear,
    QuantizedMatmul,
    QuantizedWeightModule,
)
from passes.lower.integer_plan import layer_of, shape_of
from passes.lower.rewrite import Miss

Codes = tuple[ByteCode, ...]


def integer_nodes(graph_module: GraphModule) -> dict[Node, Codes]:
    """Nodes that can run as integers, in graph order, with the codes of their inputs."""
    found = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            codes = integer_codes(graph_module.get_submodule(str(node.target)), node)
            if not isinstance(codes, Miss):
                found[node] = codes
    return found


def simulated_layers(graph_module: GraphModule) -> list[Miss]:
    """Layers that compute in bits and cannot run as integers, each with the reason."""
    found = []
    for node in nodes_with_role(graph_module):
        if node.op == "call_module" and annotation_of(node).has_bits:
            codes = integer_codes(graph_module.get_submodule(str(node.target)), node)
            found += [codes] if isinstance(codes, Miss) else []
    return found


def integer_codes(module: nn.Module | None, node: Node) -> Codes | Miss:
    """The codes on which a node runs exactly as integers; or why it must stay simulated."""
    found = _codes(module, node)
    return Miss(layer_of(node), found) if isinstance(found, str) else found


def _codes(module: nn.Module | None, node: Node) -> Codes | str:
    # Subclasses may compute something else: they are not for the kernels.
    if type(module) is QuantizedLinear:
        return _of_weight(module, node)
    if type(module) is QuantizedConv2d:
        return _of_convolution(module, node)
    if type(module) is QuantizedMatmul:
        return _of_matmul(module, node)
    if type(module) is QuantizedInput:
        return f"no kernel computes {type(module.inner).__name__} on codes: leave fully_quantized out"
    return f"no kernel computes what {type(module).__name__} does"


def _of_weight(module: QuantizedWeightModule, node: Node) -> Codes | str:
    weight, codes, quantizer = module.weight_quantizer, module.weight_codes, module.input_quantizer
    if weight is None or codes is None:
        return "its weight stays in float: give it bits"
    if not isinstance(weight, UniformQuantizer) or weight.zero_point is not None:
        return "kernels multiply by weights with a symmetric uniform quantizer: take a recipe that has these"
    code = _input_code(quantizer, "its input")
    if isinstance(code, str):
        return code
    if shape_of(node.args[0]) is None:
        return "no shape is noted of its input, float32 or bytes: compile the model again, in float32"
    if code.of_rows:
        return "row-log levels are divided by the sum of a row, which only products of two activations do"
    if weight.scale.numel() not in (1, len(codes)):
        return "its weight has a scale for each input channel: take one for each output channel"
    return (code,) if codes[0].numel() <= MAX_INNER else f"sums of more than {MAX_INNER} products may overflow"


def _of_convolution(module: QuantizedConv2d, node: Node) -> Codes | str:
    geometry = module.geometry
    if geometry["groups"] != 1 or geometry["dilation"] not in (1, (1, 1), [1, 1]):
        return "no kernel computes convolutions with groups or dilation"
    if isinstance(geometry["padding"], str):
        return f"no kernel pads by {geometry['padding']!r}: give numbers"
    found = _of_weight(module, node)
    is_padded = geometry["padding"] not in (0, (0, 0), [0, 0])
    if is_padded and not isinstance(found, str) and not found[0].identity:
        return "it pads, and zero has a byte of its own only in uniform quantizers and codebooks"
    return found


def _of_matmul(module: QuantizedMatmul, node: Node) -> Codes | str:
    left, right = (
        _input_code(module.left_quantizer, "its left operand"),
        _input_code(module.right_quantizer, "its right operand"),
    )
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else str(right)
    if not right.identity:
        return "its right operand needs a uniform quantizer or a codebook"
    shapes = [shape_of(source) for source in node.args]
    if len(shapes) != 2 or shapes[0] is None or shapes[1] is None:
        return "no shapes are noted of its operands, float32 or bytes: compile the model again, in float32"
    if len(shapes[0]) < 3 or shapes[0][:-2] != shapes[1][:-2]:
        return f"its operands {shapes[0]} and {shapes[1]} are not equally many matrices"
    return (left, right) if shapes[0][-1] <= MAX_INNER else f"sums of more than {MAX_INNER} products may overflow"


def _input_code(quantizer: Quantizer | None, what: str) -> ByteCode | str:
    if quantizer is None:
        return f"{what} stays in float: give it bits"
    code = byte_code(quantizer)
    if code is not None:
        return code
    remedy = "compile with backend='cpu-native', which takes none of these"
    return f"levels of {what} ({quantizer.kind}, {quantizer.bits} bits) are no bytes: {remedy}"
