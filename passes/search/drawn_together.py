"""Predicted losses of weights, drawn to their mean: how much a layer counts is known from few images.

Taken as 32 images predict them, they make an integer program choose worse bits than one width for all weights: it finds
whatever is underestimated. With c_l the geometric mean over widths of a weight's predicted losses by element, and c the
mean of all weights, by element and in logarithms, they are multiplied by (c / c_l)^shrinkage. How they fall from width
to width stays, and so do losses of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fxquant.graph.annotation import Candidate

Candidates = tuple[Candidate, ...]


def drawn_together(found: Sequence[Candidates], elements: Sequence[int], shrinkage: float) -> list[Candidates]:
    """The candidates of every weight with losses closer to those of the others; a weight that loses nothing stays.

    Args:
        found: candidates of each weight, of the same widths.
        elements: of each weight.
        shrinkage: 0 leaves losses as they are; at 1 all weights lose alike by element.
    """
    losses = [np.array([candidate.loss for candidate in candidates]) for candidates in found]
    counted = [bool(len(each)) and bool((each > 0).all()) for each in losses]
    if not shrinkage or not any(counted):
        return list(found)
    pairs = zip(losses, elements, counted, strict=True)
    logarithms = [float(np.log(each).mean() - np.log(count)) if counts else 0.0 for each, count, counts in pairs]
    mean = float(np.average(logarithms, weights=np.array(elements) * np.array(counted)))
    factors = np.exp(shrinkage * (mean - np.array(logarithms)))
    return [
        tuple(replace(c, loss=c.loss * float(factor)) for c in candidates) if counts else candidates
        for candidates, factor, counts in zip(found, factors, counted, strict=True)
    ]
