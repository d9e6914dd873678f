"""Metrics for ScoreLayers: LampQ's Fisher traces, VT-PTQ's nuclear norms, and what the scale search knows already.

    Fisher             gamma^-b tr(F_l)                                  LampQ without its second idea
    type-aware Fisher  gamma^(beta-b) alpha_t tr(F_l)                    LampQ; alpha_t tr(F_l) is the drop at beta bits
    nuclear norm       ||Y_m||_* ||Q_b(W_l) - W_l||_F^2                  VT-PTQ; m is the module of layer l
    noise ratio        10^(-SQNR_b / 10), weights and inputs             what MPTQ-ViT's greedy rule looks at
    predicted loss     the candidates' losses                            the Hessian-guided metric

LampQ writes gamma^-b alpha_t tr(F): the same but for a constant, which brings the score to the unit of the drop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Literal

import torch
from torch.fx import GraphModule, Node

from fxquant.artefact.cache import signature
from fxquant.checks.hints import check_fields
from fxquant.errors import SensitivityError
from fxquant.graph.annotation import Candidate, annotation_of
from fxquant.graph.nodes import device_of
from fxquant.sensitivity.fisher import fisher_traces, type_factors
from fxquant.sensitivity.measured import Bits, Divergence
from fxquant.sensitivity.nuclear_norm import MODULE_OF, nuclear_norms
from fxquant.sensitivity.objective import CLASSES, Objective, Outputs
from fxquant.sensitivity.one_layer import with_layer_quantized
from fxquant.sensitivity.sums import Sums
from passes.allocate.score_layers import Scores, described_candidates
from passes.pipeline.contract import PassContext


@dataclass(frozen=True)
class FisherTrace:
    """gamma^-b tr(F).

    Args:
        gamma: what one bit divides the score by; 4 is that of uniform quantization noise.
        draws: random cotangents per image.
        labels: class of every calibration image, for the empirical Fisher matrix; none needed.
    """

    gamma: float = 4.0
    draws: int = 4
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise SensitivityError for options out of range."""
        check_fields(self, SensitivityError)
        if not self.gamma > 1 or self.draws < 1:
            raise SensitivityError(f"gamma must be above 1, and draws at least 1; found {self}")

    def score(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> Scores:
        """Scores of the nodes that have a weight. Notes `fisher_trace` by layer.

        Args: see `Metric.score`.
        """
        traces = self.traces(graph_module, nodes, context)
        scores = {layer: [trace * self.gamma**-b for b in _widths(nodes)] for layer, trace in traces.items()}
        return Scores.shared(scores, {"fisher_trace": traces})

    def traces(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> dict[str, float]:
        """tr(F) by layer.

        Args:
            graph_module: a graph whose nodes have candidates.
            nodes: the nodes to score.
            context: gives the calibration images.
        """
        sums, weighted = Sums(), _weighted(nodes)
        settings = [self.draws, self.labels, [node.name for node in weighted]]
        found = fisher_traces(
            graph_module,
            weighted,
            context.gather("Fisher traces", sums, graph_module, settings),
            draws=self.draws,
            seed=context.seed,
            objective=context.objective,
            labels_n=torch.tensor(self.labels) if self.labels else None,
            sums=sums,
        )
        return {annotation_of(node).layer: trace for node, trace in found.items()}


@dataclass(frozen=True)
class TypeAwareFisher(FisherTrace):
    """gamma^(beta-b) alpha_t tr(F), with alpha_t = mean drop / mean tr(F) over sampled layers of each type.

    Args:
        mu: layers sampled of each type; the same blocks for all types that every block has.
        beta: width of a sampled layer, weights and inputs, from 2 to 8, while the others stay float; the nearest
            candidate where it is none, the narrower of two. The paper's 1 is refused: quantizers have 2 bits at least.
        drop: "divergence" from the float model's output, in the objective's unit; "disagreement", the share of images
            whose predicted class changes; "accuracy", the share of correct predictions lost, which needs labels.
        traces_of: tr(F) in alpha_t, of each sampled layer: "quantized" to beta bits while it is measured (Algorithm 1,
            line 5), which takes a forward and a backward pass for each; or of the "float" model, known already.
    """

    mu: int = 4
    beta: int = 3
    drop: Literal["divergence", "disagreement", "accuracy"] = "divergence"
    traces_of: Literal["quantized", "float"] = "quantized"

    def __post_init__(self) -> None:
        """Raise SensitivityError for options out of range."""
        super().__post_init__()
        if self.mu < 1 or (self.drop == "accuracy" and not self.labels):
            raise SensitivityError(f'mu >= 1 is needed, and labels for drop="accuracy"; found {self}')
        if not 2 <= self.beta <= 8:
            raise SensitivityError(f"beta is a width from 2 to 8, of which layers have candidates, not {self.beta}")

    def score(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> Scores:
        """Scores of nodes with a weight. Notes `fisher_trace`, `drop` by sampled layer, `alpha` by type and `beta`.

        With traces of quantized layers, `quantized_trace` by sampled layer too.

        Args: see `Metric.score`.
        """
        widths, beta = _widths(nodes), self._width(nodes)
        traces = self.traces(graph_module, nodes, context)
        weighted = [node for node in nodes if annotation_of(node).layer in traces]
        drops = self.drops(graph_module, weighted, context)
        notes = {"fisher_trace": traces, "beta": beta, "drop": drops}
        sampled = traces
        if self.traces_of == "quantized":
            sampled = notes["quantized_trace"] = self.quantized_traces(graph_module, weighted, context)
        types = {annotation_of(node).layer: str(annotation_of(node).role) for node in nodes}
        alpha = type_factors(sampled, drops, types)
        scores = {
            layer: [self.gamma ** (beta - b) * alpha[types[layer]] * trace for b in widths]
            for layer, trace in traces.items()
        }
        return Scores.shared(scores, {**notes, "alpha": alpha})

    def _width(self, nodes: Sequence[Node]) -> int:
        """The candidate width nearest to beta."""
        return min(_widths(nodes), key=lambda bits: (abs(bits - self.beta), bits))

    def drops(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> dict[str, float]:
        """The drop of each sampled layer at beta bits, in graph order.

        Args:
            graph_module: a graph whose nodes have candidates.
            nodes: the nodes to score.
            context: gives the calibration images.
        """
        objective = context.objective if self.drop == "divergence" else CLASSES
        divergence = Divergence(graph_module, context.images, context.batch_size, objective=objective)
        exact: Outputs | None = None

        def measure(node: Node, bits: Bits) -> float:
            nonlocal exact
            exact = divergence.outputs({}) if exact is None else exact
            return self._drop(exact, divergence.outputs({node: bits}), objective)

        return self._measured(graph_module, nodes, context, ("layer types", self.drop), measure)

    def quantized_traces(
        self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext
    ) -> dict[str, float]:
        """tr(F) of each sampled layer while it alone, weight and input, has beta bits; in graph order.

        Args:
            graph_module: a graph whose nodes have candidates.
            nodes: the nodes to score.
            context: gives the calibration images.
        """

        def measure(node: Node, bits: Bits) -> float:
            alone, its = with_layer_quantized(graph_module, node, bits)
            batches = torch.split(context.images, context.batch_size)
            (trace,) = fisher_traces(
                alone,
                [its],
                zip(count(0, context.batch_size), (batch.to(device_of(alone)) for batch in batches), strict=False),
                draws=self.draws,
                seed=context.seed,
                objective=context.objective,
                labels_n=torch.tensor(self.labels) if self.labels else None,
            ).values()
            return trace

        return self._measured(graph_module, nodes, context, ("quantized traces", self.draws), measure)

    def _measured(
        self,
        graph_module: GraphModule,
        nodes: Sequence[Node],
        context: PassContext,
        what: tuple[str, object],
        measure: Callable[[Node, Bits], float],
    ) -> dict[str, float]:
        """A number of each sampled layer at beta bits, kept in the cache one by one."""
        beta, sampled = self._width(nodes), self._sampled(_weighted(nodes), context.seed)
        common = context.signature(graph_module, *what, self.labels, context.batch_size)

        def number(node: Node) -> float:
            annotation = annotation_of(node)
            bits = tuple(beta if operand.candidates else None for operand in annotation.operands)
            key = signature(common, annotation.layer, bits, described_candidates(annotation))
            found: float = context.cache.recall(key, partial(measure, node, bits))
            return found

        found = context.deal(f"measuring {what[0]}", number, sampled)
        return dict(zip((annotation_of(node).layer for node in sampled), found, strict=True))

    def _sampled(self, nodes: Sequence[Node], seed: int) -> list[Node]:
        chosen: list[Node] = []
        for role in dict.fromkeys(annotation_of(node).role for node in nodes):
            of_type = [node for node in nodes if annotation_of(node).role is role]
            order = torch.randperm(len(of_type), generator=torch.Generator().manual_seed(seed))
            chosen += [of_type[index] for index in order[: self.mu].tolist()]
        return [node for node in nodes if node in chosen]

    def _drop(self, exact: Outputs, quantized: Outputs, objective: Objective) -> float:
        """The drop between two outputs for all images."""
        if self.drop == "divergence":
            return max(float(objective.divergence(exact, quantized)) / len(exact[0]), 0.0)
        before, after = exact[0].argmax(1), quantized[0].argmax(1)
        if self.drop == "disagreement":
            return float((before != after).double().mean())
        if len(self.labels) != len(before):
            raise SensitivityError(
                f"there are {len(self.labels)} labels for {len(before)} images: give one label for each image"
            )
        labels = torch.tensor(self.labels, device=before.device)
        return max(float(((before == labels).double() - (after == labels).double()).mean()), 0.0)


@dataclass(frozen=True)
class NuclearNorm:
    """VT-PTQ: nuclear norm of the module's feature times the squared error of the layer's quantized weight.

    The attention map stands for MSA (qkv, proj), the output of fc2 for MLP (fc1, fc2); other layers are not scored. The
    paper counts weights only, so the score is one of the whole layer.
    """

    def score(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> Scores:
        """Scores of qkv, proj, fc1 and fc2. Notes `nuclear_norm` by layer.

        Args: see `Metric.score`.
        """
        sums = Sums()
        batches = (batch for _, batch in context.gather("nuclear norms", sums, graph_module))
        norms = nuclear_norms(graph_module, batches, sums)
        scores, used = {}, {}
        for node in nodes:
            annotation = annotation_of(node)
            module = MODULE_OF.get(annotation.role) if annotation.role else None
            if module is None or annotation.block is None:
                continue
            if (annotation.block, module) not in norms:
                raise SensitivityError(f"{annotation.layer}: no {module} feature was found in block {annotation.block}")
            used[annotation.layer] = norms[annotation.block, module]
            scores[annotation.layer] = [used[annotation.layer] * c.noise for c in _weight_candidates(node)]
        return Scores.shared(scores, {"nuclear_norm": used})


@dataclass(frozen=True)
class NoiseRatio:
    """Quantization noise relative to the signal, 10^(-SQNR / 10); the mean over inputs that share a width."""

    def score(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> Scores:
        """Scores of all nodes.

        Args: see `Metric.score`.
        """
        found = {}
        for node in nodes:
            annotation = annotation_of(node)
            sharing = {index: len(group) for group in annotation.groups for index in group}
            found[annotation.layer] = [
                [candidate.noise_ratio / sharing[index] for candidate in operand.candidates]
                for index, operand in enumerate(annotation.operands)
            ]
        return Scores(found)


@dataclass(frozen=True)
class PredictedLoss:
    """The losses that the scale search predicted: what AllocateBits takes without ScoreLayers."""

    def score(self, graph_module: GraphModule, nodes: Sequence[Node], context: PassContext) -> Scores:
        """Scores of all nodes.

        Args: see `Metric.score`.
        """
        annotations = [annotation_of(node) for node in nodes]
        return Scores({a.layer: [[c.loss for c in operand.candidates] for operand in a.operands] for a in annotations})


def _weighted(nodes: Sequence[Node]) -> list[Node]:
    return [node for node in nodes if _weight_candidates(node)]


def _widths(nodes: Sequence[Node]) -> list[int]:
    """The candidate widths; SearchScales gives all nodes the same."""
    return [candidate.bits for node in _weighted(nodes)[:1] for candidate in _weight_candidates(node)]


def _weight_candidates(node: Node) -> tuple[Candidate, ...]:
    weight = annotation_of(node).weight
    return () if weight is None else weight.candidates
