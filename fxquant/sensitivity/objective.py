"""What quantization must keep of a model's output: the one value that says how far two outputs are apart.

    CLASSES       KL divergence between distributions over classes, nats                 classifiers
    FEATURES      relative squared error, mean over the tensors of the output            features, tokens, maps
    EMBEDDINGS    cosine distance                                                        what is compared by angles

Everything that weighs errors by what they do to the output asks the objective: calibration's gradients, Fisher traces,
measured divergences, reconstruction, training, frontiers. An objective D says it twice, by the divergence itself and by
random cotangents v of the output y with

    D(y, y + e)  =  1/2 E[(v . e)^2]  +  o(|e|^2)

so that half the mean squared gradient of v . y predicts D for small errors, whatever D is. Signs r are random:

    CLASSES       v = sqrt(p) r - p (sqrt(p) . r)                  E[v v^T] = diag(p) - p p^T   (`logit_gradients`)
    FEATURES      v = sqrt(2 / tensors) r / |y|                    the root mean square of y, all entries alike
    EMBEDDINGS    v = (r - u (u . r)) / |y|,  u = y / |y|          what turns y; what only lengthens it costs nothing

One's own is one file: docs/how_to/adding_an_objective.md.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.checks.finite import is_finite
from fxquant.errors import CalibrationError, OptionError
from fxquant.graph.nodes import image_of, shape_of
from fxquant.graph.output_tree import flatten, leaves
from fxquant.graph.structure.class_scores import why_no_class_scores
from fxquant.sensitivity.divergence import cosine_distance, kl_divergence, power, relative_squared_error
from fxquant.sensitivity.logit_gradients import Fisher, logit_gradients, random_signs

Outputs = tuple[Tensor, ...]
"""The tensors of a model's output that an objective looks at, each (B, ...)."""

_PROCESS = secrets.token_hex(8)


@dataclass(frozen=True)
class Draws:
    """Random cotangents, drawn image by image, so that the batch size has no say in them.

    Args:
        count: how many draws each image gets.
        seed: the seed that all draws follow from.
        first: index of the batch's first image among all.
        fisher: for class scores, how they are drawn; see `fxquant.sensitivity.logit_gradients`.
    """

    count: int
    seed: int = 0
    first: int = 0
    fisher: Fisher = "signs"

    def signs(self, outputs: Outputs) -> Outputs:
        """-1 or 1 for every entry of every draw, float32 (count, B, ...) of each tensor; see `Draws`.

        Raises CalibrationError where they are to be drawn as labels.
        """
        if self.fisher != "signs":
            raise CalibrationError(
                f'fisher={self.fisher!r} draws classes, which this objective has none of: use "signs"'
            )
        shapes = [tuple(output.shape[1:]) for output in outputs]
        images = range(self.first, self.first + len(outputs[0]))
        return random_signs(shapes, images, self.count, self.seed)


@dataclass(frozen=True)
class Objective:
    """How far two outputs of a model are apart.

    Args:
        name: what reports and cards call it.
        unit: the unit of its divergence, such as nats per image.
        needs: what it takes the model's output for, in words.
        remedy: what to do where the output is something else.
        why_not: of a traced graph, why its output is not that; None where it is.
        tensors: of a model's output, the tensors that count, each (B, ...); None where there are none.
        cotangents: of such tensors, random cotangents (count, B, ...), float, one for each tensor; see the module.
        divergence: of the tensors wanted and found, summed over images, float (), differentiable in those found.
    """

    name: str
    unit: str
    needs: str
    remedy: str
    why_not: Callable[[GraphModule], str | None]
    tensors: Callable[[Any], Outputs | None]
    cotangents: Callable[[Outputs, Draws], Outputs]
    divergence: Callable[[Outputs, Outputs], Tensor]

    @property
    def key(self) -> str:
        """What stands for it in the signature of a result: of an objective of one's own, good in this process only."""
        return self.name if OBJECTIVES.get(self.name) == self else f"{self.name} {id(self)} {_PROCESS}"

    @property
    def described(self) -> dict[str, str]:
        """For the protocol card."""
        return {"name": self.name, "unit": self.unit}

    def check(self, graph_module: GraphModule, needed_by: str) -> None:
        """Raise CalibrationError, naming who needs it, where a graph's output is not what the objective takes."""
        reason = self.why_not(graph_module)
        if reason is not None:
            raise CalibrationError(f"{needed_by} needs {self.needs} as the model's output, and {reason}: {self.remedy}")

    def outputs(self, output: Any, needed_by: str, finite: bool = True) -> Outputs:
        """The tensors that count in a model's output.

        Args:
            output: what the model returned.
            needed_by: what asks for the outputs, which errors name.
            finite: whether NaN and infinite outputs are refused.

        Raises CalibrationError where there are none, or where one is not finite.
        """
        found = self.tensors(output)
        if not found:
            raise CalibrationError(
                f"{needed_by} needs {self.needs} as the model's output; this model gives something else: {self.remedy}"
            )
        if finite and not all(is_finite(tensor) for tensor in found):
            raise CalibrationError(
                "the model's output on a calibration batch is not finite: check its weights, and how the "
                "images were preprocessed"
            )
        return found

    def gradients(
        self, outputs: Outputs, tensors: Sequence[Tensor], draws: Draws
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """Of every draw, the gradients of v . y by these tensors; None for one that no output depends on.

        Args:
            outputs: y, from a forward pass that keeps its graph, which the last draw frees.
            tensors: the tensors whose gradients are wanted.
            draws: the random draws of the cotangents v.
        """
        drawn = zip(outputs, self.cotangents(outputs, draws), strict=True)
        pairs = [(output, cotangent) for output, cotangent in drawn if output.requires_grad]  # a mask depends on none
        reached = [output for output, _ in pairs]
        for draw in range(draws.count):
            chosen = [cotangent[draw].to(output) for output, cotangent in pairs]
            more = draw + 1 < draws.count
            yield torch.autograd.grad(reached, tensors, chosen, retain_graph=more, allow_unused=True)


def objective_named(given: str | Objective, graph_module: GraphModule) -> Objective:
    """The objective of this name, or the one given; "auto": CLASSES for class scores, FEATURES for all else.

    Raises OptionError for an unknown name.
    """
    if isinstance(given, Objective):
        return given
    check_objective(given)
    if given != AUTO:
        return OBJECTIVES[given]
    return CLASSES if why_no_class_scores(graph_module) is None else FEATURES


def check_objective(given: str | Objective) -> None:
    """Raise OptionError for a name that is none."""
    if not isinstance(given, Objective) and given not in (AUTO, *OBJECTIVES):
        known = ", ".join(map(repr, (AUTO, *OBJECTIVES)))
        raise OptionError(f"no objective is called {given!r}; there are {known}, or give an Objective of your own")


def _class_scores(output: Any) -> Outputs | None:
    scores = next(iter(flatten(output)[1]), None)
    return (scores,) if scores is not None and scores.ndim == 2 and scores.shape[1] >= 2 else None


def _class_cotangents(outputs: Outputs, draws: Draws) -> Outputs:
    (scores,) = outputs
    exact = scores.detach() if scores.dtype is torch.float64 else scores.detach().float()
    probabilities = exact.softmax(1).cpu()
    return (logit_gradients(probabilities, draws.fisher, draws.count, draws.seed, draws.first),)


def _class_divergence(wanted: Outputs, found: Outputs) -> Tensor:
    return kl_divergence(wanted[0], found[0])


def _float_tensors(output: Any) -> Outputs | None:
    found = [tensor for tensor in flatten(output)[1] if tensor.is_floating_point()]
    return tuple(found) if found and all(tensor.ndim for tensor in found) else None


def _why_no_features(graph_module: GraphModule) -> str | None:
    results = _output_nodes(graph_module)
    if any(result.op == "get_attr" for result in results):
        return "one of its tensors is the same for all images"
    shapes = [shape_of(result) for result in results]
    images = image_of(graph_module).meta["tensor_meta"].shape[0]
    other = next((shape for shape in shapes if shape is not None and (not shape or shape[0] != images)), None)
    return None if other is None else f"an output of shape {tuple(other)} does not begin with the images"


def _feature_cotangents(outputs: Outputs, draws: Draws) -> Outputs:
    share = math.sqrt(2 / len(outputs))
    norms = [power(output.detach()).sqrt().cpu() for output in outputs]
    pairs = zip(draws.signs(outputs), norms, strict=True)
    return tuple(share * signs / norm.reshape(1, -1, *[1] * (signs.ndim - 2)) for signs, norm in pairs)


def _feature_divergence(wanted: Outputs, found: Outputs) -> Tensor:
    errors = [relative_squared_error(one, other) for one, other in zip(wanted, found, strict=True)]
    return torch.stack(errors).mean()


def _vectors(output: Any) -> Outputs | None:
    found = _float_tensors(output)
    return found if found and all(leaf.ndim == 2 and leaf.shape[1] >= 2 for leaf in found) else None


def _why_no_embeddings(graph_module: GraphModule) -> str | None:
    shapes = [shape for node in _output_nodes(graph_module) if (shape := shape_of(node)) is not None]
    other = next((shape for shape in shapes if len(shape) != 2 or shape[1] < 2), None)
    return _why_no_features(graph_module) if other is None else f"an output has shape {tuple(other)}"


def _embedding_cotangents(outputs: Outputs, draws: Draws) -> Outputs:
    found = []
    for output, signs in zip(outputs, draws.signs(outputs), strict=True):
        norm = power(output.detach()).sqrt()[:, None].cpu()
        direction = output.detach().cpu() / norm
        across = signs - direction * (signs * direction).sum(2, keepdim=True)
        found.append(across / norm / math.sqrt(len(outputs)))
    return tuple(found)


def _embedding_divergence(wanted: Outputs, found: Outputs) -> Tensor:
    distances = [cosine_distance(one, other) for one, other in zip(wanted, found, strict=True)]
    return torch.stack(distances).mean()


def _output_nodes(graph_module: GraphModule) -> list[Node]:
    returned: Any = graph_module.graph.output_node().args[0]
    return [node for node in leaves(returned) if isinstance(node, Node)]


CLASSES = Objective(
    name="classes",
    unit="nats of KL divergence per image",
    needs="class scores (B, classes)",
    remedy='give objective="features" to fxquant.compile, or PassContext(objective=FEATURES) to a pipeline; if its '
    "output are class scores, say so on the model, model.num_classes = <number of outputs>",
    why_not=why_no_class_scores,
    tensors=_class_scores,
    cotangents=_class_cotangents,
    divergence=_class_divergence,
)
"""The distribution over classes, as its KL divergence from the float model's."""

FEATURES = Objective(
    name="features",
    unit="relative squared error per image",
    needs="float tensors that begin with the images, (B, ...),",
    remedy="let the model return such tensors",
    why_not=_why_no_features,
    tensors=_float_tensors,
    cotangents=_feature_cotangents,
    divergence=_feature_divergence,
)
"""Every tensor of the output, as its squared error relative to its square, image by image; their mean."""

EMBEDDINGS = Objective(
    name="embeddings",
    unit="cosine distance per image",
    needs="vectors (B, dimensions), of at least two dimensions,",
    remedy='give objective="features"',
    why_not=_why_no_embeddings,
    tensors=_vectors,
    cotangents=_embedding_cotangents,
    divergence=_embedding_divergence,
)
"""The direction of every vector of the output, as one minus the cosine; their mean."""

AUTO = "auto"
OBJECTIVES = {objective.name: objective for objective in (CLASSES, FEATURES, EMBEDDINGS)}
"""By name, as `objective=` takes them."""
