"""einops inside a model: its table of tensor libraries learns the tracer's proxies.

einops chooses what to call by the type of its argument, from a table of types, and calls torch's functions for torch's
tensors; of proxies it says "Tensor type unknown to einops". The types of proxies belong to nobody else, so that the
table may keep them. Shapes are handed over as lists, which einops does not cache: they hold proxies of a trace that
ends. Layers of `einops.layers.torch` need none of this.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

from fxquant.graph.capture.batch_proxy import BatchProxy, ConstantProxy


def register_proxies() -> None:
    """Let einops take proxies for tensors of torch, where something has imported it."""
    found: Any = sys.modules.get("einops._backends")
    table = getattr(found, "_type2backend", None)
    if not isinstance(table, dict) or BatchProxy in table:
        return
    backend = copy.copy(found.get_backend(torch.zeros(())))
    backend.shape = lambda tensor: list(tensor.shape)
    table[BatchProxy] = table[ConstantProxy] = backend
