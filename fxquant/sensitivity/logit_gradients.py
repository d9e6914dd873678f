"""Logit gradients from which a backward pass estimates the Fisher matrix, without labels.

The Fisher matrix of the model's own output distribution p is J^T (diag(p) - p p^T) J with J = d logits / d anything,
and any logit gradient v with E[v v^T] = diag(p) - p p^T estimates it. Drawing a label y from p and taking v = p - e_y
is one (the cross-entropy's); for a confident model it is rarely large and mostly zero. With random signs r,
v = sqrt(p) * r - p (sqrt(p) . r) has the same mean and far less variance. Given labels y, v = p - e_y is the empirical
Fisher matrix's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional

from fxquant.errors import CalibrationError
from fxquant.graph.structure.class_scores import why_no_class_scores

Fisher = Literal["signs", "sampled", "arg-max"]
"""Which v; "arg-max" takes the prediction for the label: biased, vanishes for confident models."""


NEEDS_NO_SCORES = (
    "fxquant.compile(..., recipe='repq_vit') takes any output, and so does a pipeline that weighs errors at each "
    "layer's own output, recipe=best('W4A4', allocator=Uniform()).changed(Calibrate, gradient=False, output_error=True)"
)
"""What to do with a model that gives features; part of errors."""


def check_class_scores(graph_module: GraphModule, needed_by: str, remedy: str) -> None:
    """Raise CalibrationError, saying what is there instead, unless a graph's output are class scores.

    What counts as such: `fxquant.graph.structure.class_scores`.

    Args:
        graph_module: traced; observers may be in place.
        needed_by: what needs class scores, as the subject of the sentence.
        remedy: what to do without them, for the message.
    """
    reason = why_no_class_scores(graph_module)
    if reason is not None:
        raise CalibrationError(
            f"{needed_by} needs class scores (B, classes) as the model's output, and {reason}: {remedy}; if its output "
            f"are class scores, say so on the model, model.num_classes = <number of outputs>"
        )


def class_scores(output: Any, needed_by: str, remedy: str, finite: bool = True) -> Tensor:
    """The logits (B, classes) in a model's output, at least two classes.

    Args:
        output: what the model returned.
        needed_by: what needs class scores, as the subject of the sentence.
        remedy: what to do without them, for the message.
        finite: whether scores that are not finite are refused.

    Raises CalibrationError where there are none, or, if `finite` is asked, where one is not finite.
    """
    logits = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        raise CalibrationError(
            f"{needed_by} needs class scores (B, classes) as the model's output; this model gives something else: "
            f"{remedy}"
        )
    if finite and not bool(torch.isfinite(logits).all()):
        raise CalibrationError("the model's output on a calibration batch is not finite")
    return logits


def logit_gradients(probabilities_bc: Tensor, fisher: Fisher, draws: int, seed: int, first: int = 0) -> Tensor:
    """v for each draw, float32 (draws, B, classes); drawn image by image, so the batch size has no say in it.

    Args:
        probabilities_bc: float (B, classes).
        fisher: the rule that gives v, see the module.
        draws: how many gradients each image gets.
        seed: what they are drawn by.
        first: index of the batch's first image among all.
    """
    classes = probabilities_bc.shape[1]
    found = []
    for index, p in enumerate(probabilities_bc, start=first):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        if fisher == "signs":
            signs = torch.randint(0, 2, (draws, classes), generator=generator) * 2.0 - 1.0
            spread = p.sqrt() * signs
            found.append(spread - p * spread.sum(1, keepdim=True))
            continue
        if fisher == "sampled":
            labels = torch.multinomial(p, draws, replacement=True, generator=generator)
        else:
            labels = p.argmax().expand(draws)
        found.append(p - functional.one_hot(labels, classes))
    return torch.stack(found, dim=1)


def label_gradients(probabilities_bc: Tensor, labels_b: Tensor) -> Tensor:
    """v = p - e_y for given labels, int64 (B,): float (1, B, classes)."""
    return (probabilities_bc - functional.one_hot(labels_b, probabilities_bc.shape[1]))[None]
