"""RotateResidual: turn the residual stream so that no channel stands out, exactly.

Residual channels of a trained transformer differ by orders of magnitude, and one scale for all of them wastes most of
its levels. LayerNorm commutes with any orthogonal Q that keeps the mean, Q 1 = 1: mean and norm of a token do not
change, so LN(x Q) = LN(x) Q once LN's gamma and beta are folded into the layers that read it. Everything that writes
the stream (patch embedding, class and position embeddings, proj, fc2) is multiplied by Q, everything that reads it by
Q^T, and the model computes the same numbers, from activations and weights that look Gaussian in every channel.

The idea is QuaRot's (Ashkboos et al., 2024) and SliceGPT's, for RMSNorm there; with Q 1 = 1 no mean has to be
subtracted anywhere. Q is random otherwise, drawn from the seed. A linear layer or convolution that reads the stream
without a norm, as SAM's neck does, is multiplied by Q^T as well. Streams that something else reads or something else
than a linear layer writes (Swin's patch merging) stay as they are; the note says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.facts import TRACED, Fact
from fxquant.graph.nodes import device_of, module_uses
from fxquant.graph.structure.channel_paths import channel_paths
from fxquant.graph.structure.residual_stream import ResidualStream, residual_streams
from fxquant.graph.structure.stream_channels import mixed_channels
from passes.pipeline.contract import Effect, PassContext
from passes.pipeline.journal import Journal
from passes.prepare.folds import FOLDED, note_fold

ROWS = 256  # of a weight that are in float64 at a time


@dataclass(frozen=True)
class RotateResidual:
    """Rotate every residual stream that can be; run it before FoldSqb, which balances what is left."""

    requires: ClassVar[frozenset[Fact]] = frozenset({TRACED})
    provides: ClassVar[frozenset[Fact]] = frozenset({FOLDED})
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, graph_module: GraphModule, context: PassContext) -> int:
        """Rotate in place; returns the number of norms, layers and parameters changed."""
        modules = dict(graph_module.named_modules())
        readers: dict[Node, list[Node]] = {}
        paths = channel_paths(graph_module, context.images, context.padded)
        rotated, refused = [], {}
        changed = 0
        for index, stream in enumerate(residual_streams(graph_module)):
            reasons = [*stream.refusals, *_width_refusals(graph_module, stream, modules)]
            for norm in stream.norms:
                path = paths[norm]
                readers[norm] = path.consumers
                if path.refusal or path.padded:
                    reasons.append(path.refusal or f"zeros are padded in after {norm.name}")
            reasons += _shared(graph_module, stream, readers)
            reasons = reasons or mixed_channels(graph_module, stream, context.images)
            if reasons:
                refused[stream.norms[0].name] = reasons[0]
                continue
            width = _width(modules[str(stream.norms[0].target)])
            q = _drawn(context.seed, index, width).to(device_of(graph_module))
            changed += _rotate(graph_module, stream, {norm: readers[norm] for norm in stream.norms}, q)
            rotated.append(stream.norms[0].name)
        graph_module.graph.lint()
        graph_module.recompile()
        note_fold(graph_module, type(self).__name__)
        context.note(rotated=rotated, refused=refused)
        return changed


def rotate_constants(graph_module: GraphModule, journal: Journal, seed: int) -> None:
    """Do to a graph's constants, in place, what the passes in a journal have done to those of the same model's graph at
    another image size; layers, whose weights both graphs share, stay as they are.

    Args:
        graph_module: traced, and not rotated.
        journal: of the pipeline that the other graph went through.
        seed: of its context.
    """
    for entry in journal.entries:
        rotated = entry.notes.get("rotated", ()) if entry.step == repr(RotateResidual()) else ()
        for index, stream in enumerate(residual_streams(graph_module)):
            if stream.norms[0].name not in rotated:
                continue
            for product, vector, layer in stream.layer_scales:
                _drop_layer_scale(graph_module, product, vector, layer)
            norm: Any = graph_module.get_submodule(str(stream.norms[0].target))
            _turn_parameters(graph_module, stream, _drawn(seed, index, _width(norm)))


def _drawn(seed: int, index: int, width: int) -> Tensor:
    """The rotation of the index-th stream."""
    return mean_keeping_rotation(width, torch.Generator().manual_seed(seed * 7919 + index))


def mean_keeping_rotation(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal Q, float64 (width, width), with Q 1 = 1 (rows and columns add up to one)."""
    inner, _ = torch.linalg.qr(torch.randn(width - 1, width - 1, dtype=torch.float64, generator=generator))
    turned = torch.eye(width, dtype=torch.float64)
    turned[1:, 1:] = inner
    # The Householder reflection that takes the first axis to the direction of the mean.
    normal = torch.full((width,), width**-0.5, dtype=torch.float64)
    normal[0] -= 1
    reflection = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(normal, normal) / normal.square().sum()
    return reflection @ turned @ reflection


def _rotate(graph_module: GraphModule, stream: ResidualStream, readers: dict[Node, list[Node]], q: Tensor) -> int:
    modules: dict[str, Any] = dict(graph_module.named_modules())
    norms = {node: modules[str(node.target)] for node in stream.norms}
    for product, vector, layer in stream.layer_scales:
        _fold_layer_scale(graph_module, product, vector, layer)
    for node in (*stream.layers, *(layer for _, _, layer in stream.layer_scales)):
        module = modules[str(node.target)]
        weight = module.weight.detach()
        # In the precision that the weight keeps: float64 would take twice as long.
        _set(module, "weight", (q.T.to(weight.dtype) @ weight.flatten(1)).reshape(weight.shape))
        if module.bias is not None:
            _set(module, "bias", (module.bias.detach().double() @ q).to(weight.dtype))
    _turn_parameters(graph_module, stream, q)
    for node in stream.readers:
        module = modules[str(node.target)]
        weight = module.weight.detach().movedim(1, -1)
        _set(module, "weight", (weight @ q.to(weight.dtype)).movedim(-1, 1).contiguous())
    for node, norm in norms.items():
        _read_rotated(norm, [modules[str(reader.target)] for reader in readers[node]], q)
    others = len(stream.layer_scales) + len(stream.parameters) + len(stream.readers)
    return len(stream.layers) + others + len(norms)


def _turn_parameters(graph_module: GraphModule, stream: ResidualStream, q: Tensor) -> None:
    for node in {str(node.target): node for node in stream.parameters}.values():
        owner, _, name = str(node.target).rpartition(".")
        value = _parameter(graph_module, node)
        turned = (value.detach().double() @ q.to(value.device)).to(value.dtype)
        if isinstance(value, nn.Parameter):
            turned = nn.Parameter(turned, requires_grad=False)
        setattr(graph_module.get_submodule(owner), name, turned)


def _read_rotated(norm: Any, linears: list[Any], q: Tensor) -> None:
    """Fold gamma and beta into the linear layers, and let them read rotated channels."""
    one = torch.ones(len(q), dtype=linears[0].weight.dtype if linears else None, device=q.device)
    gamma = one if norm.weight is None else norm.weight.detach()
    beta = 0 * one if norm.bias is None else norm.bias.detach()
    for linear in linears:
        weight = linear.weight.detach()
        bias = 0.0 if linear.bias is None else linear.bias.detach().double()
        _set(linear, "bias", (bias + _product(weight, beta.double())).to(weight.dtype))
        _set(linear, "weight", (weight * gamma) @ q.to(weight.dtype))
    norm.elementwise_affine = True
    _set(norm, "weight", torch.ones_like(gamma))
    _set(norm, "bias", torch.zeros_like(beta))


def _product(weight_oi: Tensor, vector_i: Tensor) -> Tensor:
    """weight @ vector in float64, some rows at a time: a float64 copy of a whole weight takes longer than its product.

    vector_i: float64.
    """
    return torch.cat([rows.double() @ vector_i for rows in torch.split(weight_oi, ROWS)])


def _fold_layer_scale(graph_module: GraphModule, product: Node, vector: Node, layer: Node) -> None:
    linear: Any = graph_module.get_submodule(str(layer.target))
    scale = _parameter(graph_module, vector).detach().reshape(-1)
    _set(linear, "weight", linear.weight.detach() * scale[:, None])
    if linear.bias is not None:
        _set(linear, "bias", linear.bias.detach() * scale)
    _drop_layer_scale(graph_module, product, vector, layer)


def _drop_layer_scale(graph_module: GraphModule, product: Node, vector: Node, layer: Node) -> None:
    product.replace_all_uses_with(layer)
    graph_module.graph.erase_node(product)
    if not vector.users:
        graph_module.graph.erase_node(vector)


def _parameter(graph_module: GraphModule, node: Node) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    value: Tensor = getattr(graph_module.get_submodule(owner), name)
    return value


def _width(norm: Any) -> int:
    return int(norm.normalized_shape[0])


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def _width_refusals(graph_module: GraphModule, stream: ResidualStream, modules: dict[str, Any]) -> list[str]:
    """Norms and writers must agree on one width, found in the last dimension of parameters."""
    widths = {f"norm {n.name}": _width(modules[str(n.target)]) for n in stream.norms}
    for node in (*stream.layers, *(layer for _, _, layer in stream.layer_scales)):
        widths[f"layer {node.name}"] = len(modules[str(node.target)].weight)
    for node in stream.readers:
        widths[f"reader {node.name}"] = modules[str(node.target)].weight.shape[1]
    for node in stream.parameters:
        widths[f"parameter {node.name}"] = _parameter(graph_module, node).shape[-1]
    if len(set(widths.values())) > 1:
        return ["widths differ along the stream: " + ", ".join(f"{name} {width}" for name, width in widths.items())]
    return []


def _shared(graph_module: GraphModule, stream: ResidualStream, readers: dict[Node, list[Node]]) -> list[str]:
    counts = module_uses(graph_module)
    nodes = [*stream.layers, *stream.readers, *stream.norms, *(layer for _, _, layer in stream.layer_scales)]
    nodes += [reader for norm in stream.norms for reader in readers[norm]]
    reasons = [f"{n.target} is used {counts[str(n.target)]} times" for n in nodes if counts[str(n.target)] > 1]
    targets = {str(node.target) for node in stream.parameters}
    inside = set(stream.parameters)
    outside = [n for n in graph_module.graph.nodes if n.op == "get_attr" and n.target in targets and n not in inside]
    return reasons + [f"parameter {node.target} is read outside the stream too" for node in outside]
