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
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import CalibrationError, SensitivityError
from fxquant.graph.annotation import annotation_of
from fxquant.graph.recorder import Recorder
from fxquant.graph.rows import gradient_rows, has_rows, weight_rows
from fxquant.sensitivity.logit_gradients import (
    Fisher,
    check_class_scores,
    class_scores,
    label_gradients,
    logit_gradients,
)
from fxquant.sensitivity.sums import Sums

_SEEN = "images summed"  # among the sums, which else have the names of nodes
_NEEDED_BY, _REMEDY = "the Fisher trace", "choose another metric, NuclearNorm()"


def fisher_traces(
    graph_module: GraphModule,
    nodes: Sequence[Node],
    batches: Iterable[Tensor],
    *,
    fisher: Fisher = "signs",
    draws: int = 4,
    seed: int = 0,
    labels_n: Tensor | None = None,
    sums: Sums | None = None,
) -> dict[Node, float]:
    """tr(F) of each node's weight, summed in float64.

    Args:
        graph_module: traced; its output are class scores.
        nodes: linear layers and convolutions (call_module), images outermost in their inputs; those that are not one
            matrix product (grouped convolutions) are left out of the answer.
        batches: images, float (B, C, H, W); one batch of activations is alive at a time.
        fisher, draws, seed: of the logit gradients.
        labels_n: int64, one per image of all batches; then fisher, draws and seed say nothing.
        sums: of the batches before these, where there were any.

    Raises CalibrationError without class scores or with too few labels, SensitivityError for a trace that is not
    finite.
    """
    check_class_scores(graph_module, _NEEDED_BY, _REMEDY)
    sums = Sums() if sums is None else sums
    scored = [node for node in nodes if has_rows(graph_module.get_submodule(str(node.target)))]
    recorder = Recorder(graph_module, set(scored))
    for batch in batches:
        seen = int(sums[_SEEN])
        with torch.enable_grad():
            output = recorder.run(batch.clone().requires_grad_())
        logits = class_scores(output, _NEEDED_BY, _REMEDY)
        p = logits.detach().softmax(1)
        if labels_n is None:
            cotangents = logit_gradients(p, fisher, draws, seed, seen)
        elif len(labels_n) < seen + len(batch):
            raise CalibrationError(f"{len(labels_n)} labels for at least {seen + len(batch)} images")
        else:
            cotangents = label_gradients(p, labels_n[seen : seen + len(batch)])
        _add_batch(graph_module, recorder, logits, cotangents.to(logits.dtype), scored, sums)
        recorder.forget()
        sums.add(_SEEN, len(batch))
    for node in scored:
        if not sums[node.name] < float("inf"):
            raise SensitivityError(f"the Fisher trace of {annotation_of(node).layer} is not finite")
    return {node: sums[node.name] / max(sums[_SEEN], 1) for node in scored}


def _add_batch(
    graph_module: GraphModule,
    recorder: Recorder,
    logits: Tensor,
    cotangents: Tensor,
    scored: Sequence[Node],
    sums: Sums,
) -> None:
    """Add the batch's mean over draws of the sum over images of the squared gradient norms."""
    nodes = [node for node in scored if node in recorder.differentiated]
    outputs = [recorder.differentiated[node] for node in nodes]
    for draw, cotangent in enumerate(cotangents):
        more = draw + 1 < len(cotangents)
        gradients = torch.autograd.grad(logits, outputs, cotangent, retain_graph=more, allow_unused=True)
        for node, gradient in zip(nodes, gradients, strict=True):
            module = graph_module.get_submodule(str(node.target))
            rows = weight_rows(module, recorder.inputs[node][0].detach())
            if gradient is None or rows is None:
                continue
            rows_bti = rows.reshape(len(logits), -1, rows.shape[1])
            columns = gradient_rows(module, gradient)
            columns_bto = columns.reshape(len(logits), -1, columns.shape[1])
            sums.add(node.name, float(squared_norms(rows_bti, columns_bto).sum()) / len(cotangents))


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
