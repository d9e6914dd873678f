"""One form for every operation that later passes look for, whatever way the model's authors wrote it.

After `normalize`, whatever the source said:

- linear and convolution are `call_module` of `nn.Linear` / `nn.Conv*d`, also where the model called `F.linear` with a
  parameter of its own; softmax is `nn.Softmax`, GELU is `nn.GELU`, layer norm is `nn.LayerNorm`;
- a transposed convolution whose kernel is as large as its stride, as feature pyramids have it, is `nn.Conv2d` with a
  kernel of 1 and a pixel shuffle; every other one stays a function, in float;
- a product of two activations is `call_function torch.matmul`, the sums of products that einsum and its kin spell too
  (`contractions`, while tracing); a product with a constant matrix is `nn.Linear`;
- fused attention is written out as matmul, softmax, matmul (`attention_forms`, while tracing); the scores under every
  softmax have one form, a factor of the queries and a constant that is added (`attention_scores`);
- operations without effect in inference (dropout, padding by zero, whole slices) are gone, and so is dead code;
- no node names a device: what the model makes where it is, it makes where its images are;
- every call is of a module of its own, also where the model calls one module several times.

A new module takes the place of the module it came from (`blocks.3.attn.qkv`, `blocks.3.norm1`) where nothing else lives
there, else it is a child of it (`blocks.3.attn.softmax`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.nn import functional

from fxquant.graph.capture.attention_scores import normalize_scores
from fxquant.graph.names import add_module, separate_calls
from fxquant.graph.nodes import argument, constant_of, scope_of, shape_of

MATMULS = {operator.matmul, torch.matmul, torch.linalg.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", "__matmul__"}
SOFTMAXES = {functional.softmax, torch.softmax, torch.special.softmax, "softmax"}
CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    functional.conv1d: nn.Conv1d,
    functional.conv2d: nn.Conv2d,
    functional.conv3d: nn.Conv3d,
}


def normalize(graph_module: GraphModule) -> GraphModule:
    """The same computation in the one form described above; parameters that nothing uses are dropped.

    Expects a graph recorded by `ShapeTracer`, which notes the shapes it saw; raises nothing of its own.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        rewrite = _rewrite_of(node)
        if rewrite is not None:
            rewrite(graph_module, node)
    graph.eliminate_dead_code()  # sizes that nobody needs are no readers
    normalize_scores(graph_module)
    graph.eliminate_dead_code()
    _name_no_device(graph)
    normalized = GraphModule(graph_module, graph, class_name=type(graph_module).__name__.removesuffix("Impl"))
    separate_calls(normalized)
    return normalized


def _name_no_device(graph: Graph) -> None:
    """Where the model's code named a device, let the graph take that of the images, so that it can be moved."""
    naming = [node for node in graph.nodes if any(isinstance(found, torch.device) for found in _arguments(node))]
    if not naming:
        return
    image = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(image):
        place = graph.call_function(getattr, (image, "device"))
    for node in naming:
        node.args, node.kwargs = (
            map_aggregate(given, lambda value: place if isinstance(value, torch.device) else value)
            for given in (node.args, node.kwargs)
        )


def _arguments(node: Node) -> list[Any]:
    """All values in the arguments of a call."""
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), found.append)
    return found


def _rewrite_of(node: Node) -> Callable[[GraphModule, Node], None] | None:
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in MATMULS:
        return _rewrite_matmul
    if node.target in SOFTMAXES:
        return _rewrite_softmax
    if node.target in CONVOLUTIONS:
        return _rewrite_convolution
    return _REWRITES.get(node.target)


def _replace(node: Node, replacement: Node) -> None:
    """Let the replacement take the node's users, its shape and where it came from."""
    for key in ("nn_module_stack", "stack_trace", "tensor_meta"):
        if key in node.meta:
            replacement.meta[key] = node.meta[key]
    node.replace_all_uses_with(replacement)
    constants = [source for source in node.all_input_nodes if source.op == "get_attr"]
    node.graph.erase_node(node)
    for constant in constants:
        if not constant.users:
            node.graph.erase_node(constant)


def _call_module(graph_module: GraphModule, node: Node, home: str, stem: str, module: nn.Module) -> None:
    """Replace the node by a call of `module` on its first input, in the place of the module at `home` if nothing else
    needs that, else at `home.stem`."""
    taken = {n.target for n in node.graph.nodes if n.op == "call_module"} | {
        str(n.target).rpartition(".")[0] for n in node.graph.nodes if n.op == "get_attr" and set(n.users) - {node}
    }
    present = dict(graph_module.named_modules())
    module = module.eval().requires_grad_(False)
    path = home
    if home and home in present and home not in taken and not list(present[home].children()):
        graph_module.add_submodule(path, module)
    else:
        path = add_module(graph_module, f"{home}.{stem}".lstrip("."), module)
    with node.graph.inserting_before(node):
        _replace(node, node.graph.call_module(path, (argument(node, 0, "input"),)))


def _home_of_weight(weight: Node, default: str) -> tuple[str, str]:
    """Where the module made from a weight belongs: the weight's owner, and the name of a child if that is taken."""
    owner, _, name = str(weight.target).rpartition(".")
    stem = name.removesuffix("weight").rstrip("_")
    return owner, default if not stem or stem.startswith("constant") else stem


def _rewrite_matmul(graph_module: GraphModule, node: Node) -> None:
    left = argument(node, 0, "input")
    right: Any = next(
        value for value in (*node.args[1:], *map(node.kwargs.get, ("other", "mat2"))) if value is not None
    )
    weight_ic_oc = constant_of(graph_module, right)
    if weight_ic_oc is not None and weight_ic_oc.ndim == 2 and constant_of(graph_module, left) is None:
        channels_in, channels_out = weight_ic_oc.shape
        linear = nn.Linear(channels_in, channels_out, bias=False, device="meta")
        _set_parameters(linear, weight_ic_oc.t().contiguous(), None)
        _call_module(graph_module, node, *_home_of_weight(right, "linear"), linear)
        return
    with node.graph.inserting_before(node):
        _replace(node, node.graph.call_function(torch.matmul, (left, right)))


def _rewrite_softmax(graph_module: GraphModule, node: Node) -> None:
    source, shape, dtype = argument(node, 0, "input"), shape_of(node), node.kwargs.get("dtype")
    axis = argument(node, 1, "dim")
    if shape is None or not isinstance(source, Node):
        return
    if axis is None:  # what torch takes then, with a warning
        axis = 0 if len(shape) in (0, 1, 3) else 1
    if dtype is not None and dtype != source.meta["tensor_meta"].dtype:
        with node.graph.inserting_before(node):
            converted = node.graph.call_method("to", (source, dtype))
        converted.meta["tensor_meta"] = source.meta["tensor_meta"]._replace(dtype=dtype)
        node.replace_input_with(source, converted)
    _call_module(graph_module, node, scope_of(node), "softmax", nn.Softmax(-1 if axis == len(shape) - 1 else axis))


def _rewrite_gelu(graph_module: GraphModule, node: Node) -> None:
    _call_module(graph_module, node, scope_of(node), "act", nn.GELU(node.kwargs.get("approximate", "none")))  # type: ignore[arg-type]


def _rewrite_linear(graph_module: GraphModule, node: Node) -> None:
    weight, bias = (argument(node, 1, "weight"), argument(node, 2, "bias"))
    weight_oc_ic, bias_oc = constant_of(graph_module, weight), constant_of(graph_module, bias)
    if weight_oc_ic is None or (bias is not None and bias_oc is None):
        return
    channels_out, channels_in = weight_oc_ic.shape
    linear = nn.Linear(channels_in, channels_out, bias=bias_oc is not None, device="meta")
    _set_parameters(linear, weight_oc_ic, bias_oc)
    _call_module(graph_module, node, *_home_of_weight(weight, "linear"), linear)


def _rewrite_convolution(graph_module: GraphModule, node: Node) -> None:
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    kernel, bias_oc = constant_of(graph_module, weight), constant_of(graph_module, bias)
    if kernel is None or (bias is not None and bias_oc is None):
        return
    groups = argument(node, 6, "groups", 1)
    convolution = CONVOLUTIONS[node.target](
        kernel.shape[1] * groups,
        kernel.shape[0],
        tuple(kernel.shape[2:]),
        stride=argument(node, 3, "stride", 1),
        padding=argument(node, 4, "padding", 0),
        dilation=argument(node, 5, "dilation", 1),
        groups=groups,
        bias=bias_oc is not None,
        device="meta",
    )
    _set_parameters(convolution, kernel, bias_oc)
    _call_module(graph_module, node, *_home_of_weight(weight, "conv"), convolution)


def _rewrite_transposed(graph_module: GraphModule, node: Node) -> None:
    """Kernels that do not overlap: every pixel becomes a square of its own, a linear map of its channels.

    y[c, r i + a, r j + b] = sum_k x[k, i, j] w[k, c, a, b] + bias[c]
    """
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    kernel, bias_oc = constant_of(graph_module, weight), constant_of(graph_module, bias)
    if kernel is None or (bias is not None and bias_oc is None):
        return
    options = (("stride", 3, 1), ("padding", 4, 0), ("output_padding", 5, 0), ("groups", 6, 1), ("dilation", 7, 1))
    stride, *rest = (argument(node, place, name, default) for name, place, default in options)
    channels_in, channels_out, side, _ = kernel.shape
    is_square = tuple(kernel.shape[2:]) == (side, side) and stride in (side, (side, side), [side, side])
    if not is_square or any(
        value not in (plain, (plain, plain)) for value, plain in zip(rest, (0, 0, 1, 1), strict=True)
    ):
        return
    convolution = nn.Conv2d(channels_in, channels_out * side**2, 1, bias=bias_oc is not None, device="meta")
    bias_oc = None if bias_oc is None else bias_oc.repeat_interleave(side**2)
    _set_parameters(convolution, kernel.flatten(1).t()[..., None, None].contiguous(), bias_oc)
    shape, meta = shape_of(argument(node, 0, "input")), node.meta["tensor_meta"]
    if shape is None:
        return
    with node.graph.inserting_after(node):
        shuffled = node.graph.call_function(functional.pixel_shuffle, (node, side))
    node.replace_all_uses_with(shuffled, delete_user_cb=lambda user: user is not shuffled)
    shuffled.meta.update({key: value for key, value in node.meta.items() if key != "tensor_meta"}, tensor_meta=meta)
    between = torch.Size((shape[0], channels_out * side**2, *shape[2:]))
    node.meta["tensor_meta"] = meta._replace(shape=between)
    _call_module(graph_module, node, *_home_of_weight(weight, "conv"), convolution)


def _rewrite_layer_norm(graph_module: GraphModule, node: Node) -> None:
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    weight_c, bias_c = constant_of(graph_module, weight), constant_of(graph_module, bias)
    if (weight is None) != (weight_c is None) or (bias is None) != (bias_c is None):
        return
    norm = nn.LayerNorm(
        argument(node, 1, "normalized_shape"),
        eps=argument(node, 4, "eps", 1e-5),
        elementwise_affine=weight_c is not None,
        bias=bias_c is not None,
        device="meta",
    )
    _set_parameters(norm, weight_c, bias_c)
    home = _home_of_weight(weight, "norm") if weight is not None else (scope_of(node), "norm")
    _call_module(graph_module, node, *home, norm)


def _set_parameters(module: nn.Module, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            setattr(module, name, nn.Parameter(tensor.detach(), requires_grad=False))


def _drop(node: Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def _drop_dropout(graph_module: GraphModule, node: Node) -> None:
    if argument(node, 2, "training", True) is False or argument(node, 1, "p", 0.5) == 0:
        _drop(node)


def _drop_empty_padding(graph_module: GraphModule, node: Node) -> None:
    if not any(argument(node, 1, "pad")):
        _drop(node)


def _drop_whole_slice(graph_module: GraphModule, node: Node) -> None:
    """x[:, :56, :56] of an x that has 56 rows and 56 columns; the batch must be taken whole."""
    source, index = node.args
    if not isinstance(index, tuple) or shape_of(node) is None or shape_of(node) != shape_of(source):
        return
    is_whole = index[0] == slice(None) and all(isinstance(i, slice) and i.step in (None, 1) for i in index)
    if is_whole:
        _drop(node)


def _spell_operator(graph_module: GraphModule, node: Node) -> None:
    """mask & other, which torch hands on as a method where the mask is a constant."""
    node.op, node.target = "call_function", _OPERATORS[node.target]


_OPERATORS: dict[Any, Callable[..., Any]] = {
    "__and__": operator.and_, "__or__": operator.or_, "__xor__": operator.xor,
}  # fmt: skip
_REWRITES: dict[Any, Callable[[GraphModule, Node], None]] = {
    functional.linear: _rewrite_linear,
    functional.gelu: _rewrite_gelu,
    functional.conv_transpose2d: _rewrite_transposed,
    functional.layer_norm: _rewrite_layer_norm,
    torch.layer_norm: _rewrite_layer_norm,
    functional.dropout: _drop_dropout,
    functional.pad: _drop_empty_padding,
    operator.getitem: _drop_whole_slice,
    **dict.fromkeys(_OPERATORS, _spell_operator),
}
