"""Proof of a lowering: the integer graph must give the answers of the simulated one, on two images.

The ends are compared first, with the tolerance of known answers (`fxquant.runtime.known_answers`), which leaves room
for codes at the edge between two levels: 5 % of the spread of scores, and more at few bits. Where they agree to EXACT,
all codes were the same, and that is all. Where they do not, single codes fell the other way, or something is wrong by
little: then the model is lowered again without chains, whose layers are invisible, and every layer is compared on equal
inputs, tightly (`passes.lower.compare_layers`); and the chains must give what it gives without them. That takes another
lowering and a run of each graph, one to two CPU seconds for a ViT-tiny, so it is not done where the ends leave nothing
to ask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.errors import BackendError
from fxquant.graph.annotation import annotation_of
from fxquant.runtime.integer.chain import IntegerChain
from fxquant.runtime.known_answers import KnownAnswers
from passes.lower.compare_layers import first_difference
from passes.pipeline.contract import Pass

EXACT = 5e-4
"""Relative difference of outputs that float rounding explains without a code that fell the other way."""

_REMEDY = "run it simulated, load(path), or with another backend, and report this"


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
        if found > EXACT and _shows_layers(lowered):
            _check_layers(simulated, output, lower, by_layer, images)
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
        + f": {_where(simulated, by_layer, images)}; {_REMEDY}"
    )


def _shows_layers(lowered: GraphModule) -> bool:
    """Whether layers can be told apart: not where another runtime has taken the whole model."""
    has_chains = any(isinstance(module, IntegerChain) for module in lowered.modules())
    return has_chains or any(annotation_of(node).has_bits for node in lowered.graph.nodes)


def _check_layers(simulated: GraphModule, output: Tensor, lower: Pass, by_layer: Pass, images: Tensor) -> None:
    """Raise BackendError where a layer differs on equal inputs, or chains from layers."""
    problem, apart = first_difference(simulated, by_layer, images)
    if not problem and KnownAnswers.of(apart).difference(output) > EXACT:
        problem = "its layers, each run on its own, give something else than chains of them"
    if problem:
        raise BackendError(f"the model lowered by {lower!r} computes something else: {problem}; {_REMEDY}")


def _where(simulated: GraphModule, by_layer: Pass, images: Tensor) -> str:
    problem, _ = first_difference(simulated, by_layer, images)
    return problem or "no layer differs when each is run on its own, so chains of layers are at fault"
