"""Tensors that take nothing but a size from an activation, `x.new_zeros(h, w)`: constants where the batch is not in it.

A mask that a forward fills in, as Swin's, is then computed while tracing and enters the graph as one constant.
"""

from __future__ import annotations

from typing import Any

import torch

from fxquant.graph.capture.batch_proxy import varies

_FILLED: dict[Any, float | None] = {
    "new_zeros": 0, "new_ones": 1, "new_full": None, torch.zeros_like: 0, torch.ones_like: 1, torch.full_like: None,
}  # fmt: skip


def made_of_sizes(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], values: tuple[Any, Any]) -> Any:
    """The tensor that a call makes; None where the call does something else or its size depends on the batch.

    Args:
        target: the method's name or the function.
        args, kwargs: its arguments, with proxies for tensors.
        values: what it gives at two batch sizes, without data.
    """
    if target not in _FILLED or varies((args[1:], kwargs)):
        return None
    first, second = values
    fill = _FILLED[target]
    if fill is None:
        fill = kwargs.get("fill_value", args[-1])
    is_constant = first.shape == second.shape and isinstance(fill, int | float)
    return torch.full(first.shape, fill, dtype=first.dtype, device=first.device) if is_constant else None
