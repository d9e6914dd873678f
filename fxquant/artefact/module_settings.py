"""The leaf modules that a file may hold, and what their settings may be: numbers within bounds, names from lists.

To allow another class, add it with its constructor's arguments; each must have a `Rule` in `SETTINGS`.
"""

from __future__ import annotations

from torch import nn

from fxquant.artefact.packing import WIDTHS
from fxquant.checks.untrusted import FLAG, NOTHING, NUMBER, POSITIVE, Rule, choice, either, listed, whole
from fxquant.runtime.integer.byte_table import BITS as TABLE_BITS

_CONVOLUTION = "in_channels out_channels kernel_size stride padding dilation groups bias padding_mode"
_BATCH_NORM = "num_features eps momentum affine track_running_stats"
_AVERAGE_POOL = "kernel_size stride padding ceil_mode count_include_pad"

# Class: constructor arguments that are attributes of the same name ("bias": whether there is one).
CLASSES: dict[type[nn.Module], str] = {
    nn.Linear: "in_features out_features bias",
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.LayerNorm: "normalized_shape eps elementwise_affine bias",
    nn.RMSNorm: "normalized_shape eps elementwise_affine",
    nn.GroupNorm: "num_groups num_channels eps affine",
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.Softmax: "dim",
    nn.LogSoftmax: "dim",
    nn.GELU: "approximate",
    nn.SiLU: "",
    nn.ReLU: "",
    nn.ReLU6: "",
    nn.Hardswish: "",
    nn.Hardsigmoid: "",
    nn.Sigmoid: "",
    nn.Tanh: "",
    nn.Mish: "",
    nn.Identity: "",
    nn.LeakyReLU: "negative_slope",
    nn.ELU: "alpha",
    nn.PReLU: "num_parameters",
    nn.Softplus: "beta threshold",
    nn.Hardtanh: "min_val max_val",
    nn.Dropout: "p",
    nn.Dropout2d: "p",
    nn.AvgPool1d: _AVERAGE_POOL,
    nn.AvgPool2d: f"{_AVERAGE_POOL} divisor_override",
    nn.AdaptiveAvgPool1d: "output_size",
    nn.AdaptiveAvgPool2d: "output_size",
    nn.AdaptiveMaxPool2d: "output_size",
    nn.MaxPool2d: "kernel_size stride padding dilation ceil_mode",
    nn.Unfold: "kernel_size dilation padding stride",
    nn.Fold: "output_size kernel_size dilation padding stride",
    nn.Flatten: "start_dim end_dim",
    nn.Upsample: "size scale_factor mode align_corners",
    nn.PixelShuffle: "upscale_factor",
    nn.PixelUnshuffle: "downscale_factor",
    nn.ZeroPad2d: "padding",
}
BY_NAME = {kind.__name__: kind for kind in CLASSES}
_SIZE, _STEP = whole(1, 2**24), whole(1, 2**16)
BITS = either(whole(WIDTHS.start, WIDTHS.stop - 1), choice(TABLE_BITS))
_PAD, _AXIS = whole(0, 2**16), whole(-16, 16)
_COUNTS = (
    "in_features out_features in_channels out_channels num_features groups num_groups num_channels num_parameters "
    "upscale_factor downscale_factor"
)
_FLAGS = "bias elementwise_affine affine track_running_stats ceil_mode count_include_pad"
_NUMBERS = "negative_slope alpha beta threshold min_val max_val"


def _each(size: Rule) -> Rule:
    """One for all dimensions, or one for each."""
    return either(size, listed(size, 6))


# What the settings of all classes may be, by name.
SETTINGS: dict[str, Rule] = {
    **dict.fromkeys(_COUNTS.split(), _SIZE),
    **dict.fromkeys(_FLAGS.split(), FLAG),
    **dict.fromkeys(_NUMBERS.split(), NUMBER),
    "kernel_size": _each(_STEP),
    "dilation": _each(_STEP),
    "stride": either(NOTHING, _each(_STEP)),
    "padding": either(_each(_PAD), choice("same", "valid")),
    "padding_mode": choice("zeros", "reflect", "replicate", "circular"),
    "normalized_shape": listed(_SIZE, 8),
    "eps": POSITIVE,
    "momentum": either(NOTHING, POSITIVE),
    "approximate": choice("none", "tanh"),
    "p": Rule("a number from 0 to 1", lambda value: NUMBER.holds(value) and 0 <= value <= 1),
    "divisor_override": either(NOTHING, _SIZE),
    "output_size": either(NOTHING, _SIZE, listed(either(NOTHING, _SIZE), 3)),
    "dim": _AXIS,
    "start_dim": _AXIS,
    "end_dim": _AXIS,
    "size": either(NOTHING, _each(_SIZE)),
    "scale_factor": either(NOTHING, POSITIVE, listed(POSITIVE, 3)),
    "mode": choice("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear"),
    "align_corners": either(NOTHING, FLAG),
}
# Where a class takes what others of this setting's name do not.
_OWN: dict[type[nn.Module], dict[str, Rule]] = {nn.RMSNorm: {"eps": either(NOTHING, POSITIVE)}}


def settings_of(kind: type[nn.Module]) -> dict[str, Rule]:
    """What the settings of a class may be, by name."""
    return {name: SETTINGS[name] for name in CLASSES[kind].split()} | _OWN.get(kind, {})
