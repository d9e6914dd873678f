"""A lowered graph as a program: each module of integers is one operation, moves are carried out on places.

What a program has: the integer modules of `fxquant.runtime.integer`, layer norms and means in float32 by their
kernels, sums, products and quotients of float32 tensors. All these round alike from Python and from C, so both give the
same bits. Whatever else a graph computes (simulated layers, matrix products of torch, softmax or GELU in float) is
refused by the name of its node: torch rounds it in its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.nn import functional

from fxquant.errors import ExportError
from fxquant.export.program_tensors import IMAGES, Numbers, Program
from fxquant.graph.annotation import annotation_of
from fxquant.graph.nodes import module_of, tensor_at
from fxquant.graph.notes import IMAGE_SHAPE
from fxquant.graph.output_tree import leaves
from fxquant.runtime.integer import lowered
from fxquant.runtime.integer.chain import IntegerChain
from fxquant.runtime.integer.float_rows import AverageRows, NormRows
from fxquant.runtime.integer.row_order import ReorderRows
from fxquant.runtime.native.program import Do

_MOVES = frozenset(
    {
        "view", "reshape", "permute", "transpose", "contiguous", "flatten", "unflatten", "unsqueeze", "squeeze", "roll",
        "clone", "select", "narrow", "expand", "swapaxes", "movedim", "getitem", "pad", "cat", "concat", "stack",
        "chunk", "split", "unbind", "flip", "size", "dim",
    }
)  # fmt: skip
_BY_TORCH = "{} is computed by torch, not by the integer kernels; compile for them, backend='cpu-native'"
_ATTRIBUTES = ("shape", "ndim", "mT")
_ARITHMETIC = {
    "add": Do.ADD, "iadd": Do.ADD, "mul": Do.MULTIPLY, "imul": Do.MULTIPLY, "truediv": Do.DIVIDE, "div": Do.DIVIDE,
}  # fmt: skip


def program_of(graph_module: GraphModule) -> tuple[Program, list[tuple[int, tuple[int, ...]]]]:
    """The program of a graph that was lowered to "cpu-native", and its outputs: number of a tensor, shape of one image.

    Raises ExportError, naming the node, for what a program does not have.
    """
    program = Program(tuple(IMAGE_SHAPE.of(graph_module)))
    values: dict[Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op == "output":
            break
        arguments, keywords = map_arg((node.args, node.kwargs), values.__getitem__)
        try:
            values[node] = _value(program, graph_module, node, arguments, keywords)
        except ExportError as error:
            layer = annotation_of(node).layer or node.name
            raise ExportError(f"'{layer}' cannot run without Python: {error}") from error
    return program, [_output(program, values[result], result) for result in _results(graph_module)]


def _results(graph_module: GraphModule) -> tuple[Node, ...]:
    return leaves(graph_module.graph.output_node().args[0])


def _output(program: Program, value: Any, node: Node) -> tuple[int, tuple[int, ...]]:
    reason = None
    if not isinstance(value, Numbers) or value.dtype != torch.float32:
        reason = "it is no float32 tensor"
    elif node.op == "get_attr" or value.places.shape[:1] != (IMAGES,):
        reason = "it is not one tensor for each image"
    if reason is not None:
        raise ExportError(f"output '{node.name}' cannot be given without Python: {reason}")
    return program.stored(value), tuple(value.places.shape[1:])


def _value(program: Program, graph_module: GraphModule, node: Node, arguments: Any, keywords: Any) -> Any:
    """What a node holds: Numbers, or whatever is known without images."""
    if node.op == "placeholder":
        return program.image
    if node.op == "get_attr":
        tensor = tensor_at(graph_module, node)
        return program.constant_numbers(tensor) if tensor.dtype in (torch.float32, torch.uint8) else tensor
    if node.op == "call_module":
        module = module_of(graph_module, node)
        run = _RUNS.get(type(module))
        if run is None:
            raise ExportError(_BY_TORCH.format(type(module).__name__))
        return run(program, module, *arguments, **keywords)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    given: list[Numbers] = []
    map_aggregate((arguments, keywords), lambda value: given.append(value) if isinstance(value, Numbers) else None)
    if not given:
        return _called(node, arguments, keywords)
    if name in _ARITHMETIC:
        return _arithmetic(program, _ARITHMETIC[name], arguments, keywords)
    if name in _MOVES or (name == "getattr" and arguments[1] in _ATTRIBUTES):
        return _moved(node, name, given[0].dtype, arguments, keywords)
    raise ExportError(_BY_TORCH.format(f"'{name}'"))


def _called(node: Node, arguments: Any, keywords: Any) -> Any:
    """What a function of sizes and numbers gives."""
    if isinstance(node.target, str):
        return getattr(arguments[0], node.target)(*arguments[1:], **keywords)
    return node.target(*arguments, **keywords)


def _moved(node: Node, name: str, dtype: torch.dtype, arguments: Any, keywords: Any) -> Any:
    """What a move makes of places."""
    if name == "pad":
        keywords = {"value": None, **keywords}
        arguments, fill = arguments[:2], arguments[3] if len(arguments) > 3 else keywords["value"]
        if keywords.get("mode", "constant") != "constant" or (fill and dtype != torch.uint8):
            raise ExportError("it pads with numbers other than zero, which programs do not have")
        keywords = {"mode": "constant", "value": -1 - int(fill or 0)}

    def places_of(value: Any) -> Any:
        if isinstance(value, Numbers) and value.dtype != dtype:
            raise ExportError("it puts bytes and floats together")
        return value.places if isinstance(value, Numbers) else value

    found = _called(node, *map_aggregate((arguments, keywords), places_of))
    if isinstance(found, Tensor):
        return Numbers(found, dtype)
    if isinstance(found, tuple | list) and any(isinstance(part, Tensor) for part in found):
        return tuple(Numbers(part, dtype) for part in found)
    return found


def _arithmetic(program: Program, kind: Do, arguments: Any, keywords: Any) -> Numbers:
    if len(arguments) != 2 or keywords:
        raise ExportError("programs have sums, products and quotients of two tensors, without further options")
    x, y = arguments
    if kind is not Do.DIVIDE and (not isinstance(x, Numbers) or program.is_constant(x)):
        x, y = y, x
    if not isinstance(x, Numbers) or program.is_constant(x):
        raise ExportError("programs have no quotient of a number or a constant and a tensor")
    if not isinstance(y, Numbers):
        y = program.constant_numbers(torch.tensor([float(y)], dtype=torch.float32))
    if {x.dtype, y.dtype} != {torch.float32}:
        raise ExportError("programs compute with float32 tensors")
    shape = torch.broadcast_shapes(x.places.shape, y.places.shape)  # type: ignore[no-untyped-call]
    left = Numbers(x.places.expand(shape), x.dtype)
    sizes = tuple(y.places.shape)
    while sizes[:1] == (1,):
        sizes = sizes[1:]
    if program.is_constant(y) and tuple(shape[len(shape) - len(sizes) :]) == sizes:
        right = program.constant(program.content(y))  # the same again and again
    else:
        right = program.stored(Numbers(y.places.expand(shape), y.dtype))
    return program.operation(kind, torch.float32, tuple(shape), (program.stored(left), right))


def _optional(program: Program, tensor: Tensor | None) -> int:
    return -1 if tensor is None else program.constant(tensor.float())


def _quantize(program: Program, module: lowered.ToCodes, x: Numbers) -> Numbers:
    inputs = (program.stored(x), program.constant(module.spec))
    return program.operation(Do.QUANTIZE, torch.uint8, tuple(x.places.shape), inputs)


def _layer_norm(program: Program, module: lowered.LayerNormToCodes, x: Numbers) -> Numbers:
    vectors = (_optional(program, module.weight), _optional(program, module.bias))
    inputs = (program.stored(x), program.constant(module.spec), *vectors)
    shape = tuple(x.places.shape)
    return program.operation(Do.LAYER_NORM, torch.uint8, shape, inputs, shape[-1:], module.epsilon)


def _norm(program: Program, module: NormRows, x: Numbers) -> Numbers:
    inputs = (program.stored(x), -1, _optional(program, module.weight), _optional(program, module.bias))
    shape = tuple(x.places.shape)
    return program.operation(Do.NORM, torch.float32, shape, inputs, shape[-1:], module.epsilon)


def _average(program: Program, module: AverageRows, x: Numbers) -> Numbers:
    rows = x.places.flatten(1, -2).shape
    return program.operation(Do.MEAN, torch.float32, (rows[0], rows[2]), (program.stored(x),), tuple(rows[1:]))


def _linear(
    program: Program, module: lowered.IntegerLinear, codes: Numbers, residual: Numbers | None = None
) -> Numbers:
    added = -1 if residual is None else program.stored(residual)
    inputs = (program.stored(codes), program.constant(module.layout), added)
    dtype = torch.uint8 if module.epilogue.gives_codes else torch.float32
    return program.operation(Do.LINEAR, dtype, (*codes.places.shape[:-1], module.out_features), inputs)


def _convolution(program: Program, module: lowered.IntegerConv2d, codes: Numbers) -> Numbers:
    places = functional.pad(codes.places, module.padding, value=-1 - module.zero)
    for dim in range(2):
        places = places.unfold(2 + dim, module.kernel[dim], module.stride[dim])
    patches = Numbers(places.permute(0, 2, 3, 1, 4, 5).flatten(3), codes.dtype)
    return Numbers(_linear(program, module, patches).places.permute(0, 3, 1, 2), torch.float32)


def _attention(program: Program, module: lowered.IntegerAttention, qkv: Numbers) -> Numbers:
    batch, tokens, channels = qkv.places.shape
    inputs = (program.stored(qkv), program.constant(module.spec), _optional(program, module.bias))
    return program.operation(Do.ATTENTION, torch.uint8, (batch, tokens, channels // 3), inputs, (tokens,))


def _separate_attention(
    program: Program, module: lowered.SeparateAttention, query: Numbers, transposed_key: Numbers, value: Numbers
) -> Numbers:
    packed = torch.stack([query.places, transposed_key.places.mT, value.places], -2).flatten(-2)
    found = _attention(program, module.kernel, Numbers(packed.reshape(-1, *packed.shape[-2:]), torch.uint8))
    return Numbers(found.places.reshape(value.places.shape), torch.uint8)


def _chain(program: Program, module: IntegerChain, x: Numbers) -> Numbers:
    last = x.places.shape[-1]
    rows = x.places.flatten(1, -2) if module.rows is None else x.places.reshape(-1, module.rows, last)
    shape = (rows.shape[0], rows.shape[1] // module.parts, module.width)
    inputs = (program.stored(x), program.constant(module.layout))
    dtype = torch.uint8 if module.gives_codes else torch.float32
    return program.operation(Do.CHAIN, dtype, shape, inputs, (module.tokens or shape[1],))


def _tokens(program: Program, module: lowered.AssembleTokens, x: Numbers) -> Numbers:
    placed = _arithmetic(program, Do.ADD, (x, program.constant_numbers(module.positions)), {})
    if not len(module.first):
        return placed
    first = program.constant_numbers(module.first).places.expand(len(x.places), *module.first.shape)
    return Numbers(torch.cat([first, placed.places], 1), torch.float32)


def _reorder(program: Program, module: ReorderRows, x: Numbers) -> Numbers:
    return Numbers(module(x.places), x.dtype)


def _same(program: Program, module: nn.Module, x: Numbers) -> Numbers:
    return x


_RUNS: dict[type | None, Callable[..., Numbers]] = {
    lowered.ToCodes: _quantize,
    lowered.LayerNormToCodes: _layer_norm,
    lowered.IntegerLinear: _linear,
    lowered.IntegerConv2d: _convolution,
    lowered.IntegerAttention: _attention,
    lowered.SeparateAttention: _separate_attention,
    lowered.AssembleTokens: _tokens,
    IntegerChain: _chain,
    NormRows: _norm,
    AverageRows: _average,
    ReorderRows: _reorder,
    nn.Identity: _same,
    nn.Dropout: _same,
}
