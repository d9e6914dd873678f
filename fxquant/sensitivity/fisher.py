"""The trace of each layer's Fisher matrix: how much the output cares for the weights of a layer.

    tr(F) = mean over images of E ||dL/dW||_F^2,    dL/dW of one image = sum over tokens of g_t x_t^T = G^T X

LampQ's starting point (Lemma 2: the Fisher matrix stands for the expected Hessian of the log-likelihood). The gradient
of one image is never kept: its squared norm is either sum((X X^T) * (G G^T)), which costs T^2 (in + out) for T tokens,
or that of one image's product, T in out; the cheaper one is taken. The expectation is over labels drawn from the
model's own output, estimated without labels (`logit_gradients`), or there are labels (the empirical Fisher matrix).

Deliberately not done: weights that several nodes share count per node; grouped convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import CalibrationError, SensitivityError
from fxquant.graph.annotation import annotation_of
from fxquant.graph.recorder import Recorder
from fxquant.graph.rows import gradient_rows, has_rows, weight_rows
from fxquant.sensitivity.logit_gradients import Fisher, label_gradients
from fxquant.sensitivity.objective import CLASSES, Draws, Objective, Outputs
from fxquant.sensitivity.sums import Sums

_SEEN = "images summed"  # among the sums, which else have the names of nodes
_NEEDED_BY = "the Fisher trace"


def fisher_traces(
    graph_module: GraphModule,
    nodes: Sequence[Node],
    batches: Iterable[tuple[int, Tensor]],
    *,
    fisher: Fisher = "signs",
    draws: int = 4,
    seed: int = 0,
    labels_n: Tensor | None = None,
    objective: Objective = CLASSES,
    sums: Sums | None = None,
) -> dict[Node, float]:
    """tr(F) of each node's weight, summed in float64.

    Args:
        graph_module: the graph.
        nodes: linear layers and convolutions (call_module), images outermost in their inputs; those that are not one
            matrix product (grouped convolutions) are left out of the answer.
        batches: images, float (B, C, H, W), with the index of the first among all; one batch of activations is alive at
            a time.
        fisher: how cotangents of class scores are drawn.
        draws: random cotangents of the output per image.
        seed: the seed that gradients are drawn from.
        labels_n: int64, one per image of all batches; then `fisher`, `draws` and `seed` say nothing.
        objective: whose cotangents are drawn; with labels they are those of the cross-entropy of class scores.
        sums: of the batches before these, where there were any.

    Raises CalibrationError where the output is not what the objective takes or with too few labels, SensitivityError
    for a trace that is not finite.
    """
    objective = objective if labels_n is None else CLASSES
    objective.check(graph_module, _NEEDED_BY)
    sums = Sums() if sums is None else sums
    scored = [node for node in nodes if has_rows(graph_module.get_submodule(str(node.target)))]
    recorder = Recorder(graph_module, set(scored))
    for first, batch in batches:
        with torch.enable_grad():
            output = recorder.run(batch.clone().requires_grad_())
        outputs = objective.outputs(output, _NEEDED_BY)
        differentiated = [node for node in scored if node in recorder.differentiated]
        tensors = [recorder.differentiated[node] for node in differentiated]
        count = draws if labels_n is None else 1
        if labels_n is None:
            drawn = objective.gradients(outputs, tensors, Draws(count, seed, first, fisher))
        else:
            drawn = iter([_label_gradients(outputs, tensors, labels_n, first)])
        for gradients in drawn:
            for node, gradient in zip(differentiated, gradients, strict=True):
                if gradient is not None:
                    module = graph_module.get_submodule(str(node.target))
                    squares = _squares(module, recorder.inputs[node][0].detach(), gradient, len(batch))
                    sums.add(node.name, squares / count)
        recorder.forget()
        sums.add(_SEEN, len(batch))
    for node in scored:
        if not sums[node.name] < float("inf"):
            raise SensitivityError(f"the Fisher trace of {annotation_of(node).layer} is not finite")
    return {node: sums[node.name] / max(sums[_SEEN], 1) for node in scored}


def _label_gradients(
    outputs: Outputs, tensors: Sequence[Tensor], labels_n: Tensor, first: int
) -> tuple[Tensor | None, ...]:
    """Gradients of the cross-entropy by these tensors for the labels of a batch whose first image is `first`."""
    (scores,) = outputs
    if len(labels_n) < first + len(scores):
        raise CalibrationError(
            f"there are {len(labels_n)} labels for at least {first + len(scores)} images: give one label for each image"
        )
    cotangent = label_gradients(scores.detach().softmax(1), labels_n[first : first + len(scores)].to(scores.device))[0]
    return torch.autograd.grad(scores, tensors, cotangent.to(scores.dtype), allow_unused=True)


def _squares(module: nn.Module, x: Tensor, gradient: Tensor, images: int) -> float:
    """Sum over the images of ||dL/dW||_F^2, where the weight of a module is one matrix; else 0."""
    rows = weight_rows(module, x)
    if rows is None:
        return 0.0
    columns = gradient_rows(module, gradient)
    rows_bti, columns_bto = (each.reshape(images, -1, each.shape[1]) for each in (rows, columns))
    return float(squared_norms(rows_bti, columns_bto).sum())


def squared_norms(rows_bti: Tensor, gradients_bto: Tensor) -> Tensor:
    """||X_b^T G_b||_F^2 of each image b, float64 (B,); at most one image's product is alive.

    rows_bti: inputs, float (B, T, in). gradients_bto: dL/dO, float (B, T, out).
    """
    tokens, inner, outer = *rows_bti.shape[1:], gradients_bto.shape[2]
    if tokens * (inner + outer) < inner * outer:
        products = (x @ x.T * (g @ g.T) for x, g in zip(rows_bti, gradients_bto, strict=True))
    else:
        products = ((x.T @ g).square_() for x, g in zip(rows_bti, gradients_bto, strict=True))
    # The first form is never negative but for rounding.
    return torch.stack([product.sum(dtype=torch.float64) for product in products]).clamp_min(0)


def type_factors(traces: dict[str, float], drops: dict[str, float], type_of: dict[str, str]) -> dict[str, float]:
    """LampQ's alpha_t = mean drop / mean tr(F) over the sampled layers of each type (Algorithm 1, lines 3 to 7).

    Args:
        traces, drops: by layer; drops has the sampled layers only.
        type_of: by layer. A type whose sampled layers have no trace at all gets 0: no loss depends on them.
    """
    factors = {}
    for kind in dict.fromkeys(type_of[layer] for layer in drops):
        sampled = [layer for layer in drops if type_of[layer] == kind]
        trace = sum(traces[layer] for layer in sampled)
        factors[kind] = sum(drops[layer] for layer in sampled) / trace if trace > 0 else 0.0
    return factors
