"""Logit gradients from which a backward pass estimates the Fisher matrix, without labels.

The Fisher matrix of the model's own output distribution p is J^T (diag(p) - p p^T) J with J = d logits / d anything,
and any logit gradient v with E[v v^T] = diag(p) - p p^T estimates it. Drawing a label y from p and taking v = p - e_y
is one (the cross-entropy's); for a confident model it is rarely large and mostly zero. With random signs r,
v = sqrt(p) * r - p (sqrt(p) . r) has the same mean and far less variance. Given labels y, v = p - e_y is the empirical
Fisher matrix's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Fisher = Literal["signs", "sampled", "arg-max"]
"""Which v; "arg-max" takes the prediction for the label: biased, vanishes for confident models."""


def logit_gradients(probabilities_bc: Tensor, fisher: Fisher, draws: int, seed: int, first: int = 0) -> Tensor:
    """v for each draw, float32 (draws, B, classes); drawn image by image, so the batch size has no say in it.

    Args:
        probabilities_bc: the model's distribution over classes, float (B, classes).
        fisher: the rule that gives v, see the module.
        draws: how many gradients each image gets.
        seed: what they are drawn by.
        first: index of the batch's first image among all.
    """
    classes = probabilities_bc.shape[1]
    found = []
    for index, p in enumerate(probabilities_bc, start=first):
        if fisher == "signs":
            signs = random_signs([(classes,)], [index], draws, seed)[0][:, 0]
            spread = p.sqrt() * signs
            found.append(spread - p * spread.sum(1, keepdim=True))
            continue
        if fisher == "sampled":
            generator = _generator(seed, index)
            labels = torch.multinomial(p, draws, replacement=True, generator=generator)
        else:
            labels = p.argmax().expand(draws)
        found.append(p - functional.one_hot(labels, classes))
    return torch.stack(found, dim=1)


def random_signs(shapes: Sequence[tuple[int, ...]], images: Iterable[int], draws: int, seed: int) -> tuple[Tensor, ...]:
    """-1 or 1 at random, float32 (draws, B, *shape) for each shape.

    Args:
        shapes: the shapes of one image's tensors.
        images: indices of the B images among all; each has random numbers of its own.
        draws: how many signs each element gets.
        seed: the seed that all signs follow from.
    """
    found = []
    for index in images:
        generator = _generator(seed, index)
        found.append([torch.randint(0, 2, (draws, *shape), generator=generator) * 2.0 - 1.0 for shape in shapes])
    return tuple(torch.stack(signs, dim=1) for signs in zip(*found, strict=True))


def _generator(seed: int, image: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + image)


def label_gradients(probabilities_bc: Tensor, labels_b: Tensor) -> Tensor:
    """v = p - e_y for given labels, int64 (B,): float (1, B, classes)."""
    return (probabilities_bc - functional.one_hot(labels_b, probabilities_bc.shape[1]))[None]
