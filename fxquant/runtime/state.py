"""The state dict of a quantized model: complete, and taken only by a model in which its numbers mean the same.

Beside tensors the state has one entry, `_extra_state`: which graph and which quantizers the tensors belong to, JSON as
uint8. Codes of 8 bits in a model of 4 would otherwise load without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.checks.finite import is_finite
from fxquant.checks.untrusted import check_positive
from fxquant.errors import ArtefactError, StateError
from fxquant.quantizers.quantizer import Quantizer
from fxquant.runtime.simulated import QuantizedWeightModule

EXTRA = "_extra_state"


def description(graph_module: GraphModule, sizes: Iterable[GraphModule] = ()) -> Tensor:
    """What the tensors of a simulated graph belong to: the graph's code and every quantizer's settings; uint8 (n,).

    sizes: graphs of the same modules for other image sizes.
    """
    quantizers = {path: m.settings() for path, m in graph_module.named_modules() if isinstance(m, Quantizer)}
    codes = [graph.code for graph in (graph_module, *sizes)]
    code = hashlib.sha256("".join(codes).encode()).hexdigest()
    text = json.dumps({"graph": code, "quantizers": quantizers}, sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def check_names(own: Iterable[str], state: Any) -> None:
    """Raise StateError unless a state has all the names of a model's own, and no others."""
    if not isinstance(state, Mapping):
        raise StateError.for_type(f"a state dict is a mapping from names to tensors, not a {type(state).__name__}")
    missing, unknown = sorted(set(own) - state.keys()), sorted(map(str, state.keys() - set(own)))
    if missing or unknown:
        found = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the model does not have"
        raise StateError(f"the state {found}; {len(missing)} names are missing and {len(unknown)} unknown")


def check_state(graph_module: GraphModule, prefix: str, state: Mapping[str, Any], own: Tensor) -> None:
    """Raise StateError, before anything is loaded, unless what a state has of a simulated graph fits it.

    Args:
        graph_module: the simulated graph that the state is to be loaded into.
        prefix: of the names of its tensors; the description stands beside them.
        state: tensors and the description by name, as `state_dict` gave them.
        own: the model's own description.
    """
    whole = prefix.removesuffix("graph_module.")
    for name, found in state.items():
        if name.startswith(whole) and isinstance(found, Tensor) and found.is_meta:
            raise StateError(f"'{name}' of the state is on the meta device, where it has no values: load them first")
    _check_description(own, state.get(f"{whole}{EXTRA}"))
    mine = graph_module.state_dict(prefix=prefix)
    for name, tensor in mine.items():
        if name in state:
            _check_like(name, state[name], tensor)
    for path, module in graph_module.named_modules():
        if isinstance(module, QuantizedWeightModule):
            module.check_codes(state, f"{prefix}{path}")
        elif isinstance(module, Quantizer):
            _check_scales(f"{prefix}{path}", module, state)
    for name, tensor in mine.items():
        # A mask may be infinite, where it was before.
        if name in state and not is_finite(state[name]) and is_finite(tensor):
            raise StateError(f"'{name}' of the state has NaN or infinite values: take that of a model that works")


def _check_description(own: Tensor, found: Any) -> None:
    remedy = "load the artefact it was saved as, fxquant.load, or compile the float model with these weights"
    if not isinstance(found, Tensor) or found.dtype != torch.uint8:
        raise StateError(f"the state is not one of a quantized model, which has {EXTRA!r}: {remedy}")
    if torch.equal(found.cpu(), own):
        return
    try:
        theirs = json.loads(bytes(found.cpu().tolist()))["quantizers"]
        mine = json.loads(bytes(own.tolist()))["quantizers"]
        differs = next((path for path in mine if theirs.get(path) != mine[path]), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        differs = None
    reason = "is of another graph" if differs is None else f"has other settings for the quantizer '{differs}'"
    raise StateError(f"the state {reason}, so its numbers mean something else here: {remedy}")


def _check_like(name: str, found: Any, own: Tensor) -> None:
    if not isinstance(found, Tensor) or found.dtype != own.dtype or found.shape != own.shape:
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise StateError(f"'{name}' of the state is {what}, not {own.dtype} {tuple(own.shape)}")


def _check_scales(path: str, quantizer: Quantizer, state: Mapping[str, Any]) -> None:
    for name in quantizer.state_dict():
        found = state.get(f"{path}.{name}")
        if found is not None and found.is_floating_point():
            try:
                check_positive(found, f"{path}.{name}")
            except ArtefactError as error:
                raise StateError(f"the state does not fit: {error}") from error
