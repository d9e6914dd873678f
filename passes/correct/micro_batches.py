"""A training step's gradients as a sum over micro-batches, which ranks share out.

    g = (g_0 + g_1) + (g_2 + g_3)        g_i: the gradient of micro-batch i's share of the loss

Sums of floating-point numbers depend on how they are put in brackets. So a step's images are cut into a number of
micro-batches that is a power of two, of which the number of ranks knows nothing, and gradients are added up in a binary
tree over them. Each rank computes a subtree, and all ranks are told what all subtrees came to and add up the rest: on
any number of ranks the sum has the same bits. As many ranks have something to do as the largest power of two among them
and the number of micro-batches allows. A process alone computes one after another, in the memory of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxquant import ranks
from fxquant.errors import CalibrationError

Gradients = list[Tensor | None]
"""Of every parameter, None where a micro-batch has none."""


def check_count(options: object, count: int) -> None:
    """Raise CalibrationError unless the number of micro-batches is a power of two. options: for the error."""
    if count < 1 or count & (count - 1):
        raise CalibrationError(f"micro_batches must be 1 or a power of two, such as 2, 4 or 8; found {options}")


def cut(batch: Tensor, count: int) -> tuple[Tensor, ...]:
    """A batch (N, ...) in micro-batches of nearly equal length; as many as asked for, or half as many and so on until
    each has an image.

    count: a power of two.
    """
    while count > len(batch):
        count //= 2
    return torch.tensor_split(batch, count)


def backward(
    label: str,
    loss_of: Callable[[int, dict[str, Tensor]], Tensor],
    count: int,
    made: Mapping[str, Tensor],
    direct: Sequence[Tensor],
) -> None:
    """Add to the gradients of what learns those of a step's loss, the sum over its micro-batches.

    Args:
        label: what is done, for errors.
        loss_of: a micro-batch's share of the loss, float (), given its number and by name what `made` has; called on
            one rank.
        count: how many micro-batches there are, a power of two.
        made: by name, tensors made of what learns, through which gradients go back once a step.
        direct: what else learns, and has a say in the loss by itself.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in made.items()}
    reached = [*direct, *leaves.values()]

    def gradients_of(number: int) -> Gradients:
        found = torch.autograd.grad(loss_of(number, leaves), reached, allow_unused=True)
        # As they come from another rank: how a tensor lies in memory has a say in how it is summed.
        return [None if gradient is None else gradient.contiguous() for gradient in found]

    pairs = list(zip([*direct, *made.values()], summed(label, gradients_of, count), strict=True))
    found = [(tensor, gradient.to(tensor.device)) for tensor, gradient in pairs if gradient is not None]
    torch.autograd.backward([tensor for tensor, _ in found], [gradient for _, gradient in found])


def summed(label: str, gradients_of: Callable[[int], Gradients], count: int) -> Gradients:
    """The sum over all micro-batches, on every rank; see the module.

    Args:
        label: what is done, for errors.
        gradients_of: those of one micro-batch; called on one rank.
        count: how many there are, a power of two.
    """
    shares = 1
    while 2 * shares <= min(count, ranks.count()):
        shares *= 2
    each = count // shares
    found = ranks.dealt(label, lambda share: _tree(gradients_of, share * each, each), range(shares))
    return _tree(found.__getitem__, 0, shares)


def _tree(of: Callable[[int], Gradients], first: int, count: int) -> Gradients:
    """Summed from `first` on, half by half."""
    if count == 1:
        return of(first)
    left, right = _tree(of, first, count // 2), _tree(of, first + count // 2, count // 2)
    return [_sum(one, other) for one, other in zip(left, right, strict=True)]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other.to(one.device)
