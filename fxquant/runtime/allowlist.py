"""What a graph in a file may call: functions, methods and attributes that compute on tensors and do nothing else.

Names are looked up in these tables and nowhere else, so a file cannot reach code that is not listed. To allow another
operation, add its name: it must have no effect besides its result (no files, no processes, no callbacks).
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import _get_qualified_name
from torch.nn import functional

_NAMES: dict[str, tuple[Any, str]] = {
    "operator": (
        operator,
        "abs add and_ contains eq floordiv ge getitem gt iadd imul invert isub itruediv le lt matmul mod mul ne neg "
        "not_ or_ pos pow sub truediv xor",
    ),
    "torch": (
        torch,
        "_assert abs absolute add addcdiv addcmul addmm all amax amin any arange argmax argmin argsort atan2 "
        "avg_pool1d baddbmm bmm broadcast_to bucketize cat ceil chunk clamp clip clone concat cos cumsum "
        "deg2rad diag diagonal div einsum empty_like eq erf exp exp2 expm1 eye flatten flip floor floor_divide fmod "
        "full full_like gather ge gt index_select inner isfinite layer_norm le linspace log log10 log1p log2 "
        "logical_and logical_not logical_or logsumexp lt masked_fill matmul max maximum mean meshgrid min minimum "
        "mul multiply narrow ne neg norm ones ones_like outer permute pixel_shuffle "
        "pixel_unshuffle pow prod reciprocal relu remainder repeat_interleave reshape roll rot90 round rsqrt rsub "
        "select select_scatter selu sigmoid sign sin sinh slice_scatter softmax split sqrt square squeeze stack std "
        "sub sum swapaxes swapdims "
        "t take tan tanh tensordot tile topk transpose tril triu unbind unflatten unsqueeze var var_mean where "
        "zeros zeros_like",
    ),
    "functional": (
        functional,
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d batch_norm celu conv1d "
        "conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d dropout elu fold gelu glu group_norm "
        "hardsigmoid hardswish hardtanh "
        "instance_norm interpolate layer_norm leaky_relu linear log_softmax logsigmoid max_pool1d max_pool2d mish "
        "normalize one_hot pad pixel_shuffle pixel_unshuffle prelu relu relu6 rms_norm scaled_dot_product_attention "
        "selu sigmoid silu softmax softmin softplus softsign tanh unfold upsample",
    ),
    "math": (math, "ceil cos exp floor log log2 pow prod sin sqrt"),
    "builtins": (builtins, "abs float getattr int len max min"),
}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module}.{name}": getattr(owner, name)
    for module, (owner, names) in _NAMES.items()
    for name in names.split()
    if hasattr(owner, name)
}

# An object reached under two names keeps the first.
FUNCTION_NAMES: dict[Callable[..., Any], str] = {call: name for name, call in reversed(FUNCTIONS.items())}

CODE_NAMES = frozenset(_get_qualified_name(call).replace(".", "_") for call in FUNCTIONS.values()) | {
    "abs", "complex", "float", "getattr", "int", "len", "max", "min", "slice",
}  # fmt: skip
"""Globals of the code that torch.fx writes for a graph of these functions, which no value in it may hide."""

_METHOD_NAMES = (
    "abs add add_ addcmul all amax amin any argmax argmin argsort bmm bool broadcast_to ceil chunk clamp clamp_max "
    "clamp_min clip clone contiguous cos cumsum detach diagonal dim div div_ double eq exp expand expand_as flatten "
    "flip float floor floor_divide gather ge gt half index_select int le log logical_and logical_not logical_or long "
    "lt masked_fill matmul max maximum mean min minimum movedim mul mul_ narrow ne neg new_full new_ones new_zeros "
    "norm numel permute pow prod reciprocal relu relu_ repeat repeat_interleave reshape reshape_as roll round rsqrt "
    "scatter select sigmoid sign sin size softmax split split_with_sizes sqrt square squeeze std sub sub_ sum "
    "swapaxes swapdims t tanh tile to topk transpose tril triu type_as unbind unflatten unfold unsqueeze var view "
    "view_as where"
)
METHODS = frozenset(_METHOD_NAMES.split())

ATTRIBUTES = frozenset({"H", "T", "device", "dtype", "is_cuda", "mH", "mT", "ndim", "shape"})
