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

FORMS: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: scaled_dot_product_attention,
    functional.multi_head_attention_forward: multi_head_attention_forward,
    torch.einsum: functools.partial(contractions.einsum, is_constant),
    torch.tensordot: functools.partial(contractions.tensordot, is_constant),
    torch.inner: functools.partial(contractions.inner, is_constant),
    "inner": functools.partial(contractions.inner, is_constant),
    **dict.fromkeys(
        (torch.baddbmm, torch.addmm, "baddbmm", "addmm"), functools.partial(contractions.baddbmm, is_constant)
    ),
}
"""By function or method's name; each returns NotImplemented for what it leaves as it is."""
