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
        "_assert abs absolute acos add addcdiv addcmul addmm all amax amin any arange argmax argmin argsort asin "
        "atan atan2 avg_pool1d baddbmm bmm broadcast_to bucketize cat ceil channel_shuffle chunk clamp clip clone "
        "concat cos cosh cosine_similarity cumprod cumsum deg2rad diag diagonal div divide einsum empty_like eq "
        "erf erfc exp exp2 expm1 eye flatten flip floor floor_divide fmax fmin fmod frac full full_like gather ge "
        "gt hstack hypot index_select inner isfinite isinf isnan layer_norm le lerp linspace log log10 log1p log2 "
        "log_softmax logaddexp logical_and logical_not logical_or logsumexp lt masked_fill matmul max maximum "
        "mean meshgrid min minimum movedim mul multiply nan_to_num narrow ne neg negative norm ones ones_like "
        "outer permute pixel_shuffle pixel_unshuffle pow prod rad2deg reciprocal relu remainder repeat_interleave "
        "reshape roll rot90 round rsqrt rsub select select_scatter selu sgn sigmoid sign sin sinh slice_scatter "
        "softmax split sqrt square squeeze stack std std_mean sub subtract sum swapaxes swapdims t take tan tanh "
        "tensordot tile topk transpose tril triu true_divide trunc unbind unflatten unsqueeze var var_mean where "
        "zeros zeros_like",
    ),
    "functional": (
        functional,
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d batch_norm celu conv1d "
        "conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d dropout elu fold gelu glu grid_sample "
        "group_norm hardshrink hardsigmoid hardswish hardtanh instance_norm interpolate layer_norm leaky_relu linear "
        "log_softmax logsigmoid max_pool1d max_pool2d mish normalize one_hot pad pixel_shuffle pixel_unshuffle "
        "prelu relu relu6 rms_norm scaled_dot_product_attention selu sigmoid silu softmax softmin softplus "
        "softshrink softsign tanh tanhshrink unfold upsample",
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
    "abs absolute acos add add_ addcmul all amax amin any argmax argmin argsort asin atan bmm bool broadcast_to "
    "ceil chunk clamp clamp_max clamp_min clip clone contiguous cos cosh cumprod cumsum deg2rad detach diagonal "
    "dim div div_ divide double eq erf erfc exp exp2 expand expand_as expm1 flatten flip float floor floor_divide "
    "fmax fmin frac gather ge gt half hypot index_select int isfinite isinf isnan le lerp log log10 log1p log2 "
    "log_softmax logaddexp logical_and logical_not logical_or logsumexp long lt masked_fill matmul max maximum "
    "mean min minimum movedim mul mul_ multiply nan_to_num narrow ne neg negative new_full new_ones new_zeros "
    "norm numel permute pow prod rad2deg reciprocal relu relu_ remainder repeat repeat_interleave reshape "
    "reshape_as roll round rsqrt scatter select sgn sigmoid sign sin sinh size softmax split split_with_sizes "
    "sqrt square squeeze std sub sub_ subtract sum swapaxes swapdims t tan tanh tile to topk transpose tril triu "
    "true_divide trunc type_as unbind unflatten unfold unsqueeze var view view_as where"
)
METHODS = frozenset(_METHOD_NAMES.split())

ATTRIBUTES = frozenset({"H", "T", "device", "dtype", "is_cuda", "mH", "mT", "ndim", "shape"})
