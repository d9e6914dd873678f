"""Proof of a lowering: the integer graph must give the answers of the simulated one, on two images.

The tolerance is that of known answers (`fxquant.runtime.known_answers`), which leaves room for codes at the edge
between two levels. Where the ends differ, the model is lowered again without chains, whose layers are invisible, and
the two graphs are compared layer by layer: what a kernel gives is, in float, what the layer gives in the simulated
graph, or what the node after it gives where the kernel does that too (a sum, a GELU). What flows in bytes is not
compared; it is named as the place where the fault may be.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxquant.errors import BackendError
from fxquant.graph.annotation import annotation_of
from fxquant.runtime.known_answers import KnownAnswers
from passes.pipeline.contract import Pass, PassContext


@torch.no_grad()
def prove_lowering(
    simulated: GraphModule, lowered: GraphModule, lower: Pass, by_layer: Pass, answers: KnownAnswers | None
) -> tuple[float, float]:
    """How far the lowered graph is from the simulated one, relative, and how far it may be; neither is changed.

    Args:
        simulated: the graph that was lowered.
        lowered: what it became.
        lower: the pass that did it.
        by_layer: a pass that lowers every layer on its own, as `lower` does, so that layers can be compared.
        answers: known answers of the simulated graph; None: it is run.

    Raises BackendError beyond the tolerance, naming the first layer that differs; or saying that the simulated graph
    itself does not give its known answers here. CalibrationError where it has none and gives NaN for their images.
    """
    known = answers or KnownAnswers.measured(simulated)
    images = known.images_for(simulated)
    output = lowered(images)
    found = known.difference(output)
    if found <= known.tolerance:
        return found, known.tolerance
    here = simulated(images)
    if KnownAnswers.of(here).difference(output) <= known.tolerance:
        raise BackendError(
            known.described(here, known.difference(here), "the simulated model, run here,")
            + "; its integer kernels agree with it: the model was saved on a machine or with versions of torch that "
            "round otherwise; compile or save it again here"
        )
    raise BackendError(
        known.described(output, found, f"the model lowered by {lower!r}")
        + f": {first_difference(simulated, by_layer, known)}; run it simulated, load(path), or with another backend, "
        "and report this"
    )


def first_difference(simulated: GraphModule, by_layer: Pass, answers: KnownAnswers) -> str:
    """The first layer whose output is another one when lowered, beyond the answers' tolerance, in words.

    Args:
        simulated: the graph before it was lowered.
        by_layer: a pass that lowers it so that the graph shows every layer.
        answers: the images, and how far outputs may be apart.
    """
    images = answers.images_for(simulated)
    lowered = copy.deepcopy(simulated)
    by_layer.apply(lowered, PassContext())
    wanted, found = _Values(simulated), _Values(lowered)
    wanted.run(images.clone())
    found.run(images.clone())
    names = {node.name: node for node in simulated.graph.nodes}
    hidden: list[str] = []
    for node in lowered.graph.nodes:
        layer = annotation_of(node).layer
        if node.name not in names or not annotation_of(node).has_bits:
            continue
        value = found.values.get(node.name)
        if value is None or not value.is_floating_point():
            hidden.append(layer)
            continue
        likely = [
            value_of for n in _with_readers(names[node.name]) if (value_of := wanted.values.get(n.name)) is not None
        ]
        same = [_relative(value, fit) for expected in likely if (fit := _rows_like(value, expected)) is not None]
        if not same:
            hidden.append(layer)
        elif min(same) > answers.tolerance:
            between = f" (or one whose bytes it reads: {', '.join(hidden)})" if hidden else ""
            return f"the first layer that differs is '{layer}'{between}, by {min(same):.3g} of its output"
        else:
            hidden = []
    rest = f"; what differs is behind {', '.join(hidden)}" if hidden else ""
    return f"no layer differs when each is run on its own, so chains of layers are at fault{rest}"


def _with_readers(node: Node) -> list[Node]:
    """The node, its readers, and theirs."""
    near = list(node.users)
    return [node, *near, *(far for reader in near for far in reader.users)]


def _rows_like(value: Tensor, expected: Tensor) -> Tensor | None:
    """What a lowered value is compared with: the first tokens where it has only those that are read; None: nothing."""
    if value.shape == expected.shape:
        return expected
    is_less = value.ndim == expected.ndim == 3 and value.shape[1] < expected.shape[1]
    fits = is_less and value.shape[::2] == expected.shape[::2]
    return expected[:, : value.shape[1]] if fits else None


def _relative(found: Tensor, expected: Tensor) -> float:
    spread = (expected.double() - expected.double().mean()).square().mean().sqrt().clamp_min(1e-12)
    return float((found.double() - expected.double()).square().mean().sqrt() / spread)


class _Values(Interpreter):
    """Keeps every tensor."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            self.values[node.name] = result.clone()
        return result
