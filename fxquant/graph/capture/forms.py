"""Which functions are written out while a model is traced, and as what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fxquant.graph.capture import contractions
from fxquant.graph.capture.attention_forms import scaled_dot_product_attention
from fxquant.graph.capture.batch_proxy import is_constant
from fxquant.graph.capture.multi_head_attention import multi_head_attention_forward


def _embedding(input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> Any:
    """`torch.nn.functional.embedding`, rows of a table; what limits their norm writes to the table, and stays.

    Args:
        input: whole numbers of any shape, which rows.
        weight: (rows, columns).
        padding_idx: a row that training leaves alone.
        max_norm: of a row; None for no limit.
    """
    return weight[input] if max_norm is None else NotImplemented


FORMS: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: scaled_dot_product_attention,
    functional.multi_head_attention_forward: multi_head_attention_forward,
    functional.embedding: _embedding,
    torch.einsum: functools.partial(contractions.einsum, is_constant),
    torch.tensordot: functools.partial(contractions.tensordot, is_constant),
    torch.inner: functools.partial(contractions.inner, is_constant),
    "inner": functools.partial(contractions.inner, is_constant),
    **dict.fromkeys(
        (torch.baddbmm, torch.addmm, "baddbmm", "addmm"), functools.partial(contractions.baddbmm, is_constant)
    ),
}
"""By function or method's name; each returns NotImplemented for what it leaves as it is."""
