"""A copy of the caller's model that is its own: nothing that runs on it reaches the caller's model.

`copy_of` copies what `copy.deepcopy` copies, and three things that it cannot or does not copy: tensors that were
computed or made in inference mode, attributes such as locks (they are shared), and what functions close over. The last
matters where a forward was replaced, `layer.forward = lambda x: old(x) + lora(x)`: deepcopy takes the function as it
is, and the copy would run the caller's own layer.

`settle_weights` gives weights that are computed anew in every forward (parametrizations, weight and spectral
normalization, pruning) the value they have: in inference it is always the same.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from fxquant.errors import ModelError

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_COMPILED_FROM = "_torchdynamo_orig_callable"
_DEEPEST = 4  # lists of lists in which functions are looked for


def has_own_code(module: nn.Module) -> bool:
    """Whether more runs than the forward of its class: hooks, or a forward that was set on the module itself."""
    return "forward" in vars(module) or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after every forward of this module."""
    return any(getattr(module, name) for name in _HOOKS)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `nn.DataParallel` and `DistributedDataParallel`; any other as it is.

    Raises ModelError where the wrapper has hooks of its own, which the model inside does not have.
    """
    while (inner := _inner(model)) is not None:
        if has_hooks(model):
            raise ModelError(
                f"the {type(model).__name__} around the model has hooks: register them on the model inside, a "
                f"{type(inner).__name__}"
            )
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    return model._modules.get("_orig_mod")  # what torch.compile makes


def copy_of(model: nn.Module) -> nn.Module:
    """A copy in inference mode without gradients, unwrapped, which shares no tensor with the model.

    Raises ModelError where it cannot be copied.
    """
    model = unwrapped(model)
    tensors = {id(tensor): _own_tensor(tensor) for tensor in _tensors(model)}
    try:
        memo: dict[int, Any] = dict(tensors)
        copied = _deep_copy(model, memo)
    except Exception:
        memo = {**tensors, **{id(value): value for value in _not_copyable(model, tensors)}}
        try:
            copied = _deep_copy(model, memo)
        except Exception as error:  # whatever a model's own __deepcopy__ or __setstate__ raises
            raise ModelError(
                f"{type(model).__name__} cannot be copied, and compiling works on a copy: {error}. Change the model so "
                f"that copy.deepcopy(model) works"
            ) from error
    callers = set(model.modules())
    for path, module in copied.named_modules():
        if module in callers:
            raise ModelError(
                f"copy.deepcopy does not copy '{path}' ({type(module).__name__}), and compiling works on a copy: "
                f"remove its __deepcopy__"
            )
        _own_functions(module, memo)
        module._compiled_call_impl = None  # set by module.compile()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which has zeros for padded tokens, where others compute them
    return copied.eval().requires_grad_(False)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors kept as plain attributes."""
    for module in model.modules():
        for group in (module._parameters, module._buffers, vars(module)):
            yield from (value for value in group.values() if isinstance(value, Tensor))


def _own_tensor(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def _deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for module in list(model.modules()):
        if _inner(module) is not None:
            memo[id(module)] = copy.deepcopy(unwrapped(module), memo)
    return copy.deepcopy(model, memo)


def _not_copyable(model: nn.Module, tensors: dict[int, Any]) -> Iterator[Any]:
    """Attributes and hooks, such as locks and open files, that the copy has to share with the model."""
    for module in model.modules():
        hooks = (hook for name in _HOOKS for hook in getattr(module, name).values())
        own = (value for name, value in vars(module).items() if name not in vars(nn.Module()))
        for value in (*own, *hooks):
            try:
                copy.deepcopy(value, dict(tensors))
            except Exception:  # an object may raise anything when it is copied
                yield value


def _own_functions(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let functions kept on the module, and its hooks, refer to the copy where they referred to the model."""
    for group in (vars(module), *(getattr(module, name) for name in _HOOKS)):
        for name, value in list(group.items()):
            group[name] = _own_copied(value, memo)
    forward = getattr(type(module).forward, _COMPILED_FROM, None)
    if forward is not None:  # a class whose forward is decorated with torch.compile
        module.forward = MethodType(forward, module)


def _own_copied(value: Any, memo: dict[int, Any], depth: int = 0) -> Any:
    """What deepcopy has copied, with the functions in it, which it takes as they are, copied too."""
    if isinstance(value, MethodType):
        return MethodType(_own_function(value.__func__, memo), memo.get(id(value.__self__), value.__self__))
    if isinstance(value, functools.partial):
        return functools.partial(_own_copied(value.func, memo), *value.args, **value.keywords)
    if type(value) in (list, tuple, dict) and depth < _DEEPEST:
        items = list(value.values()) if isinstance(value, dict) else list(value)
        own = [_own_copied(item, memo, depth + 1) for item in items]
        if all(new is old for new, old in zip(own, items, strict=True)):
            return value
        return dict(zip(value, own, strict=True)) if isinstance(value, dict) else type(value)(own)
    return _own_function(value, memo) if isinstance(value, FunctionType) else value


def _own_function(function: Any, memo: dict[int, Any]) -> Any:
    """The function with its closure and defaults copied; a compiled one is the one it was compiled from."""
    function = getattr(function, _COMPILED_FROM, function)
    if isinstance(function, MethodType):
        return MethodType(_own_function(function.__func__, memo), _own_value(function.__self__, memo))
    holds = isinstance(function, FunctionType) and (
        function.__closure__ or function.__defaults__ or function.__kwdefaults__
    )
    if not holds:
        return function
    if id(function) not in memo:
        cells = tuple(CellType() for _ in function.__closure__ or ())
        own = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        memo[id(function)] = memo[id(own)] = own
        own.__defaults__ = tuple(_own_value(value, memo) for value in function.__defaults__ or ()) or None
        keywords = function.__kwdefaults__ or {}
        own.__kwdefaults__ = {name: _own_value(value, memo) for name, value in keywords.items()} or None
        for cell, given in zip(cells, function.__closure__ or (), strict=True):
            try:
                cell.cell_contents = _own_value(given.cell_contents, memo)
            except ValueError:  # a name that was never given a value
                continue
    return memo[id(function)]


def _own_value(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, FunctionType | MethodType):
        return _own_function(value, memo)
    try:
        return _own_copied(copy.deepcopy(value, memo), memo)
    except Exception:  # as an attribute that cannot be copied: shared
        return value


def settle_weights(root: nn.Module) -> None:
    """Make weights that are computed in every forward plain parameters, in place; `root` is a copy, in inference mode.

    Raises ModelError naming the module where that fails.
    """
    for path, module in root.named_modules():
        try:
            _settle_parametrizations(module)
            for hook in reversed(list(module._forward_pre_hooks.values())):
                _settle_hook(module, hook)
        except Exception as error:  # a parametrization is the caller's own code
            raise ModelError(
                f"the weights of '{path}' ({type(module).__name__}) are computed anew in every forward, and could not "
                f"be computed here: {error}. Make them plain with torch.nn.utils.parametrize.remove_parametrizations, "
                f"remove_weight_norm, remove_spectral_norm or prune.remove"
            ) from error


def _settle_parametrizations(module: nn.Module) -> None:
    """As parametrize.remove_parametrizations does, which would change the class that the caller's module has too."""
    lists = module._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict) or not parametrize.is_parametrized(module):
        return
    if not all(isinstance(group, parametrize.ParametrizationList) for group in lists.values()):
        return
    values = {name: getattr(module, name).detach().clone() for name in lists}
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for name, value in values.items():
        if list(lists[name].parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(name, value)


def _settle_hook(module: nn.Module, hook: Any) -> None:
    if isinstance(hook, WeightNorm):
        remove_weight_norm(module, hook.name)
    elif isinstance(hook, SpectralNorm):
        remove_spectral_norm(module, hook.name)
    elif isinstance(hook, prune.BasePruningMethod):
        name = hook._tensor_name
        module._parameters[f"{name}_orig"] = _own_parameter(module.get_parameter(f"{name}_orig"))
        prune.remove(module, name)  # type: ignore[no-untyped-call]


def _own_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """One that no other module has: pruning overwrites it, and where it is shared the others have no mask."""
    return nn.Parameter(parameter.detach().clone(), requires_grad=False)
