"""What the figures of the papers show, measured on a model: tensors and their quantizers, means, single layers.

    session = fxquant.Session(model, images, recipe="mptq_vit")
    figure_of_tensor(session, "gelu.png", "blocks.3.mlp.fc2", bits=4)     # MPTQ-ViT, Figures 2 and 4
    figure_of_boxes(session, "boxes.png", Source.POST_GELU, bits=4)       # MPTQ-ViT, supplement, Figure 1
    figure_of_means(session, "means.png")                                 # MPTQ-ViT, Figure 3
    figure_of_layers(session, "layers.png", bits=2)                       # LampQ, Figures 1, 6 and 8

LampQ's figures show accuracies; ours show the divergence, which needs no labels. Not drawn: widths of one bit.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import OptionError
from fxquant.graph.annotation import Operand, Source, annotation_of, planned_nodes
from fxquant.graph.capture.tracing import trace
from fxquant.graph.nodes import device_of
from fxquant.graph.recorder import Recorder
from fxquant.report.plots import check_plot, plot_sensitivity
from fxquant.report.tensor_plots import Values, plot_boxes, plot_histograms, plot_mean_distances
from fxquant.sensitivity.measured import Divergence
from fxquant.session.session import Session
from passes.pipeline.contract import PassContext
from passes.prepare.assign_roles import AssignRoles
from passes.search.plan_operands import PlanOperands

_PER_IMAGE = 20_000  # values kept of an image, evenly spread, for boxes


def figure_of_tensor(session: Session, path: str | PathLike[str], layer: str, bits: int, place: str = "input") -> None:
    """Histograms of one operand before and after its quantizer of so many bits.

    Args:
        session: the model, with images and a recipe.
        path: of the figure.
        layer: its name.
        bits: width of the quantizer, one of the recipe's candidates.
        place: "weight", "input", or "left" or "right" of a product.

    Raises OptionError for an unknown layer, place or width, and what `Session.searched` raises.
    """
    check_plot(path)
    searched = session.searched()
    node = _node(searched, layer)
    operand = _operand(node, place)
    before = (
        _weight(searched, node) if operand.argument is None else _gathered(searched, session, {node: operand})[node]
    )
    after = _quantized(operand, bits, layer)(before)
    title = f"{layer}, {place}, {bits} bits"
    plot_histograms(path, before.flatten().cpu().numpy(), after.flatten().cpu().numpy(), title)


def figure_of_boxes(session: Session, path: str | PathLike[str], source: Source, bits: int) -> None:
    """Box plots of all operands that hold the same, before and after their quantizers of so many bits.

    Args:
        session: the model, with images and a recipe.
        path: of the figure.
        source: what they hold, such as POST_GELU.
        bits: width of the quantizers.

    Raises OptionError where no operand holds that, or there is no such width.
    """
    check_plot(path)
    searched = session.searched()
    wanted = _holding(searched, source)
    values = _gathered(searched, session, wanted)
    before, after = {}, {}
    for node, operand in wanted.items():
        found = values[node]
        quantized = _quantized(operand, bits, annotation_of(node).layer)(found)
        before[_label(node)], after[_label(node)] = _thinned(found, session), _thinned(quantized, session)
    plot_boxes(path, before, after, f"{source.replace('_', ' ')} values, {bits} bits")


def figure_of_means(session: Session, path: str | PathLike[str]) -> None:
    """How representative the channel means of LayerNorm outputs are, as SQ-b takes them and as midranges.

    The distance is |mu_r - mu| over channels, mu_r of one image, mu of all, averaged over the images.
    """
    check_plot(path)
    images = session.calibration
    graph_module = trace(session.float_model(), images[:2])
    for step in (AssignRoles(), PlanOperands()):
        step.apply(graph_module, PassContext(images))
    wanted = _holding(graph_module, Source.POST_LAYER_NORM)
    rules: dict[str, Callable[[Tensor], Tensor]] = {
        "mean (SQ-b)": lambda rows: rows.mean(0),
        "midrange (Outlier Suppression+)": lambda rows: (rows.amin(0) + rows.amax(0)) / 2,
    }
    distances: dict[str, list[float]] = {name: [] for name in rules}
    for found in _gathered(graph_module, session, wanted).values():
        rows_btc = found.reshape(len(found), -1, found.shape[-1])
        for name, rule in rules.items():
            mean = rule(rows_btc.reshape(-1, found.shape[-1]))
            distances[name].append(float(np.mean([float((rule(rows) - mean).norm()) for rows in rows_btc])))
    plot_mean_distances(path, distances, [annotation_of(node).layer for node in wanted])


def figure_of_layers(session: Session, path: str | PathLike[str], bits: int) -> None:
    """The divergence when one layer alone is quantized to so many bits, one line a role along the blocks.

    Args:
        session: the model, with images and a recipe.
        path: of the figure.
        bits: width of the quantizers.

    Raises OptionError where there is no such width.
    """
    check_plot(path)
    searched = session.searched()
    nodes = [node for node in planned_nodes(searched) if annotation_of(node).block is not None]
    divergence = Divergence(searched, session.calibration, objective=session.objective)
    losses: dict[str, float] = {}
    with session.step("quantizing single layers", len(nodes)) as advance:
        for node in nodes:
            annotation = annotation_of(node)
            for operand in annotation.operands:
                if operand.candidates:
                    _quantized(operand, bits, annotation.layer)
            alone = {node: tuple(bits if operand.candidates else None for operand in annotation.operands)}
            losses[annotation.layer] = divergence.of(alone)
            advance(1)
    roles = {annotation_of(node).layer: str(annotation_of(node).role) for node in nodes}
    plot_sensitivity(path, {f"one layer at {bits} bits, {session.objective.unit}": losses}, roles)


def _node(graph_module: GraphModule, layer: str) -> Node:
    nodes = {annotation_of(node).layer: node for node in planned_nodes(graph_module)}
    if layer not in nodes:
        raise OptionError(f"there is no layer {layer!r}; there are {', '.join(list(nodes)[:8])}, ...")
    return nodes[layer]


def _operand(node: Node, place: str) -> Operand:
    annotation = annotation_of(node)
    inputs = dict(zip(("left", "right") if len(annotation.inputs) == 2 else ("input",), annotation.inputs, strict=True))
    found = {**({} if annotation.weight is None else {"weight": annotation.weight}), **inputs}
    quantized = {name: operand for name, operand in found.items() if operand.candidates}
    if place not in quantized:
        raise OptionError(f"{annotation.layer} has no quantized operand {place!r}; it has {', '.join(quantized)}")
    return quantized[place]


def _quantized(operand: Operand, bits: int, layer: str) -> Callable[[Tensor], Tensor]:
    """The quantizer of a width, on values of any shape whose last dimension is the tensor's."""
    widths = {candidate.bits: candidate.quantizer for candidate in operand.candidates}
    if bits not in widths:
        raise OptionError(f"{layer} has no quantizer of {bits} bits; there are {', '.join(map(str, widths))}")
    return widths[bits]


def _holding(graph_module: GraphModule, source: Source) -> dict[Node, Operand]:
    """The first operand of every node that holds this."""
    found: dict[Node, Operand] = {}
    for node in planned_nodes(graph_module):
        for operand in annotation_of(node).inputs:
            if operand.source is source and operand.families and node not in found:
                found[node] = operand
    if not found:
        raise OptionError(f"no operand of this model holds {source.replace('_', ' ')} values and is quantized")
    return found


def _weight(graph_module: GraphModule, node: Node) -> Tensor:
    module: Any = graph_module.get_submodule(str(node.target))
    return torch.as_tensor(module.weight.detach().flatten(1))


def _label(node: Node) -> str:
    annotation = annotation_of(node)
    return annotation.layer if annotation.block is None else str(annotation.block)


def _thinned(values: Tensor, session: Session) -> Values:
    """At most so many values of an image, evenly spread, float32."""
    flat = values.flatten()
    step = max(1, len(flat) // (_PER_IMAGE * len(session.calibration)))
    return np.asarray(flat[::step].cpu().numpy())


@torch.no_grad()
def _gathered(graph_module: GraphModule, session: Session, wanted: dict[Node, Operand]) -> dict[Node, Tensor]:
    """What operands hold, of all calibration images, float (B, ...)."""
    recorder = Recorder(graph_module, set(wanted))
    kept: dict[Node, list[Tensor]] = {node: [] for node in wanted}
    images = session.calibration
    with session.step("running images", len(images)) as advance:
        for batch in torch.split(images, 8):
            recorder.run(batch.to(device_of(graph_module)))
            for node, operand in wanted.items():
                kept[node].append(recorder.inputs[node][operand.argument or 0])
            recorder.forget()
            advance(len(batch))
    return {node: torch.cat(found) for node, found in kept.items()}
