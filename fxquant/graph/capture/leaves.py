"""Which modules become one node of the graph: those of which every pass knows what they compute.

That is a module of exactly a class of torch.nn, with the forward of that class and nothing around it. A subclass, a
module with hooks or with a forward of its own is traced through, and so whatever it does is in the graph. So are
containers, and modules that are in training mode in spite of `eval()`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.modules import module as module_file

from fxquant.graph.capture.plain_model import has_own_code

_NO_OPERATION: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    }
)  # fmt: skip
_CONTAINERS = frozenset(
    {
        nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.DataParallel,
        nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer, nn.MultiheadAttention,
    }
)  # fmt: skip
_KEPT_AS_FUNCTIONS = frozenset({nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding})  # float
_CLASSES = frozenset(kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module))
_LEAVES = _CLASSES - _CONTAINERS - _KEPT_AS_FUNCTIONS
_TORCH_FOLDER = str(Path(torch.__file__).parent)


def is_leaf(module: nn.Module) -> bool:
    """Whether the module is taken as one node."""
    if isinstance(module, nn.Softmax) and module.dim is None:
        return False  # its axis depends on the shape
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return False  # padding becomes a node, and the convolution one that every pass knows
    return type(module) in _LEAVES and not module.training and _is_plain(module)


def has_no_effect(module: nn.Module) -> bool:
    """Whether the module hands on what it is given, in inference."""
    return type(module) in _NO_OPERATION and not module.training and _is_plain(module)


def has_global_hooks() -> bool:
    """Whether hooks are registered for every module of the process."""
    return bool(module_file._global_forward_hooks or module_file._global_forward_pre_hooks)


def _is_plain(module: nn.Module) -> bool:
    """Whether it runs torch's own forward and nothing else; somebody may have replaced that of the class, too."""
    code = getattr(type(module).forward, "__code__", None)
    is_torch = code is not None and code.co_filename.startswith(_TORCH_FOLDER)
    return is_torch and not has_own_code(module) and not has_global_hooks()
