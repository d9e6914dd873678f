"""A device that stands in for a GPU: it computes on the CPU, and refuses what CUDA refuses.

    device = stand_in()
    model.to(device)(images.to(device))

It is torch's PrivateUse1 device, called "standin", so a tensor says that it is on `standin:0`, autograd and modules
treat it as one of a device, and torch's own checks hold. Every operation that reaches the device goes through
`_compute`:

- Tensors of the CPU may not be mixed in, except those of no dimensions in binary operations, indices, and what is
  copied from one device to the other.
- `numpy()`, and numpy's functions, raise. `item()`, `tolist()`, `cpu()` and `to("cpu")` are allowed.
- Nothing on the host can read its memory: `data_ptr` gives an address where there is none.
- It has no operators but torch's own and torchvision's: kernels that are written for the CPU do not run.
- It draws no random numbers. CUDA would draw others than the CPU; they are to be made on the CPU and moved.

Values are those of the CPU's kernels bit for bit, so what is compiled here can be compared with what is compiled there.
Not imitated: streams, the size of the memory, and the rounding of another chip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

_NAME, _KEY = "standin", "PrivateUse1"
_ATEN = torch.ops.aten
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_ADDRESSES = count(1 << 60, 1 << 40)  # no program has memory there
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_TAKE_NUMBERS = {*_INDEXING, "aten::where", "aten::fill_", "aten::masked_fill", "aten::masked_fill_"}
_COMPOSITE = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
_LIBRARIES: list[torch.library.Library] = []  # what they register ends with them


class DeviceError(RuntimeError):
    """What CUDA would refuse as well, or draw other random numbers for."""


class _Module(_DummyBackendModule):
    """What torch asks of a device by its name."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: object = None) -> Tensor:
        """Nothing: the device draws no random numbers. torch's own tools keep every device's state."""
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        """There is none to set."""


@cache
def stand_in() -> torch.device:
    """The device; registered when it is first asked for, for the rest of the process."""
    _setup_privateuseone_for_python_backend(_NAME, _Module())
    everything, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_compute, _KEY)
    # Of some operations torch has a kernel for the CPU and a slower one for devices without, which rounds differently.
    on_cpu = set(torch._C._dispatch_get_registrations_for_dispatch_key("CPU"))
    slower = {name for key in _COMPOSITE for name in torch._C._dispatch_get_registrations_for_dispatch_key(key)}
    for name in sorted(name for name in on_cpu & slower if name.startswith("aten::")):
        own.impl(name.removeprefix("aten::"), partial(_compute, _overload(name)), _KEY)
    own.impl("_copy_from", _copy, _KEY)
    own.impl("set_.source_Storage_storage_offset", _set, _KEY)
    own.impl("convolution_overrideable", partial(_compute, _ATEN.convolution.default), _KEY)
    own.impl("convolution_backward_overrideable", _convolution_backward, _KEY)
    _LIBRARIES.extend((everything, own))
    return torch.device(_NAME, 0)


def _memory(host: torch.UntypedStorage) -> torch.UntypedStorage:
    """Memory of the device whose bytes this memory of the CPU holds; it is the result's `host`."""
    size, device = host.nbytes(), torch.device(_NAME, 0)
    memory: Any = torch._C._construct_storage_from_data_pointer(next(_ADDRESSES), device, size)
    memory.host, memory.clone = host, lambda: _memory(host.clone())  # by which tensors are copied
    return memory  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Rules:
    """What one operation may be given.

    Args:
        is_ours: whether the device has it at all.
        draws: whether it draws random numbers.
        takes_numbers: how many tensors it may have for one of no dimensions to be the CPU's; 0: none may.
        indexes: whether its second argument is indices, which may be the CPU's.
        written: places of the arguments that it changes.
        tensors: places of the arguments that are tensors.
    """

    is_ours: bool
    draws: bool
    takes_numbers: int
    indexes: bool
    written: tuple[int, ...]
    tensors: tuple[int, ...]


@cache
def _rules(operation: Any) -> _Rules:
    schema, tags = operation._schema, operation.tags
    name, arguments = schema.name, list(enumerate(schema.arguments))
    binary = 2 if torch.Tag.pointwise in tags else 0
    return _Rules(
        operation.namespace in ("aten", "prims", "torchvision"),
        torch.Tag.nondeterministic_seeded in tags,
        9 if name in _TAKE_NUMBERS else binary,
        name in _INDEXING,
        tuple(i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write),
        tuple(i for i, a in arguments if str(a.type) in ("Tensor", "Optional[Tensor]")),
    )


def _compute(operation: Any, *arguments: Any, **keywords: Any) -> Any:
    """What the CPU's kernel of the operation gives, on the device."""
    rules = _rules(operation)
    if not rules.is_ours:
        raise NotImplementedError(f"{operation} has no kernel for {_NAME}")
    if rules.draws:
        raise DeviceError(f"{operation} draws on the device other numbers than on the CPU: draw there, and move them")
    given = list(_tensors((*arguments, *keywords.values())))
    _refuse_mixed(operation, rules, arguments, given)
    aliases = {id(tensor): _alias(tensor) for tensor in given if _is_here(tensor)}
    if _names_device(keywords):
        keywords["device"] = torch.device("cpu")
    arguments = tuple(_replaced(value, aliases) for value in arguments)
    keywords = {name: _replaced(value, aliases) for name, value in keywords.items()}
    if any(isinstance(arguments[i], int | float) for i in rules.tensors if i < len(arguments)):
        operation = operation.overloadpacket  # a number took the place of a tensor: it has an overload for that
    found = operation(*arguments, **keywords)
    owners = {id(aliases[id(tensor)]): tensor for tensor in given if id(tensor) in aliases}
    bases = {tensor.untyped_storage().host._cdata: tensor for tensor in owners.values()}
    for tensor in owners.values():
        alias = aliases[id(tensor)]
        if alias.shape != tensor.shape or alias.stride() != tensor.stride():  # results that are given are resized
            _place(tensor, alias, _memory(alias.untyped_storage()))
    return _moved(found, owners, bases)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _replaced(value: Any, aliases: dict[int, Tensor]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, aliases) for item in value)
    return aliases.get(id(value), value)


def _moved(found: Any, owners: dict[int, Tensor], bases: dict[int, Tensor]) -> Any:
    """Results on the device: what was given itself, a view of it, or a tensor of its own."""
    if isinstance(found, list | tuple):
        return type(found)(_moved(item, owners, bases) for item in found)
    if not isinstance(found, Tensor) or id(found) in owners:
        return owners.get(id(found), found)
    base = bases.get(found.untyped_storage()._cdata)
    if base is None:
        return _placed(found, _memory(found.untyped_storage()))
    with torch.inference_mode(base.is_inference()):  # a view is what its base is
        return _placed(found, base.untyped_storage())


def _refuse_mixed(operation: Any, rules: _Rules, arguments: Sequence[Any], given: Sequence[Tensor]) -> None:
    """Raise DeviceError for tensors of the CPU in an operation of the device that takes none."""
    if all(map(_is_here, given)):
        return
    written = [arguments[place] for place in rules.written if place < len(arguments)]
    indices = [id(index) for index in _tensors(arguments[1:2])] if rules.indexes and _is_here(arguments[0]) else []
    for tensor in given:
        is_number = tensor.ndim == 0 and len(given) <= rules.takes_numbers
        is_written = any(tensor is value for value in written)
        if not _is_here(tensor) and (is_written or not (is_number or id(tensor) in indices)):
            raise DeviceError(
                f"{operation}: expected all tensors to be on the same device, found {tensor.device} (shape "
                f"{tuple(tensor.shape)}) beside {_NAME}"
            )


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    hosts = [_alias(tensor) if _is_here(tensor) else tensor for tensor in (source, target)]
    hosts[1].copy_(hosts[0])
    return target


def _set(tensor: Tensor, memory: Any, offset: int, shape: Sequence[int], strides: Sequence[int] = ()) -> Tensor:
    return _ATEN.set_.source_Storage_storage_offset.redispatch(_CPU, tensor, memory, offset, shape, strides)


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, *options: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *rest, mask = options
    bias = [gradient.shape[1]] if mask[2] else None
    return _compute(_ATEN.convolution_backward.default, gradient, x, weight, bias, *rest, mask)


def _is_here(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == _NAME


def _names_device(keywords: dict[str, Any]) -> bool:
    return keywords.get("device") is not None and torch.device(keywords["device"]).type == _NAME


def _alias(tensor: Tensor) -> Tensor:
    """A tensor of the CPU with the same memory."""
    memory: Any = tensor.untyped_storage()
    host = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return host.set_(memory.host, tensor.storage_offset(), tensor.shape, tensor.stride())


def _placed(host: Tensor, memory: torch.UntypedStorage) -> Tensor:
    """A tensor of the device, with the memory of one of the CPU."""
    return _place(torch._C._acc.create_empty_tensor((0,), host.dtype), host, memory)


def _place(tensor: Tensor, host: Tensor, memory: torch.UntypedStorage) -> Tensor:
    return _set(tensor, memory, host.storage_offset(), host.shape, host.stride())


def _overload(name: str) -> Any:
    """The operation of a name such as aten::add.Tensor."""
    packet, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(_ATEN, packet), overload or "default")
